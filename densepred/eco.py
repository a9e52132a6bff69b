"""ECO-M2F's second step (arXiv:2404.15244): measure every exit on every image, derive the gate's targets.

One pass through the encoder yields all exits of an image. What it measured goes to a file of records, a line an image, from
which a killed run goes on; the derived data set and the trade-off (`densepred.eco_tradeoff`) are arithmetic on the records.
"""

import base64
import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from densepred.adaptive import AdaptiveSegmentor, fingerprint
from densepred.data.derived import Derived, read_derived, with_betas, write_derived
from densepred.data.prepare import progress
from densepred.engine.config import load_config
from densepred.evaluation.panoptic import panoptic_counts, panoptic_quality
from densepred.inference import load_model
from densepred.registry import DATASETS
from densepred.structures import Features, SegSample

BETAS = (0.0, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1)
"""Those of the published tables."""
IDENTITY = ("dataset", "metainfo", "model", "settings")
"""What records of one set must have in common."""


@dataclass(frozen=True)
class Source:
    """What is measured: a parent on the images of a split.

    Attributes:
        config: path of the parent's config.
        checkpoint: path of its weights.
        split: ``train`` (the data set of ``train_dataloader`` with the test pipeline) or ``val``.
        device: where the model runs.
        cfg_options: dotted key -> value.
    """

    config: str
    checkpoint: str
    split: str = "train"
    device: str = "cpu"
    cfg_options: Mapping[str, Any] = field(default_factory=dict)


class Measurement:
    """The frozen parent and the images of a `Source`; called with an image's index it returns its record.

    Raises:
        ValueError: the model cannot leave its encoder early, predicts no panoptic maps, or the config is not the parent's.
    """

    def __init__(self, source: Source) -> None:
        cfg = load_config(source.config, dict(source.cfg_options))
        self.dataset = DATASETS.build(_dataset_config(cfg, source))
        self.model = load_model(source.config, source.checkpoint, source.device, dict(source.cfg_options))
        self.source = source
        tasks = getattr(self.model.head, "tasks", ())
        if not isinstance(self.model, AdaptiveSegmentor) or "panoptic" not in tasks:
            raise ValueError(
                f"{source.config}: model is a {type(self.model).__name__} for {', '.join(tasks)}; exits are measured by the "
                "panoptic quality of an AdaptiveSegmentor: take a config eco_*.py, with tasks=[panoptic]"
            )
        self.isthing = self.dataset.metainfo["isthing"]
        self.settings = [cfg.test_dataloader["dataset"]["pipeline"]]
        self.settings += [cfg.model["data_preprocessor"], self.model.head.panoptic_rules]

    def identity(self) -> dict[str, Any]:
        """Return what identifies the records: data set, class table, weights, exits, test settings."""
        dataset, decoder = self.dataset, self.model.decoder
        ids = [str(dataset.get_data_info(i)["img_id"]) for i in range(len(dataset))]
        relative = os.path.relpath(dataset.source, dataset.data_root)
        named = dict(type=type(dataset).__name__, split=self.source.split, source=relative, images=len(ids))
        model = dict(
            fingerprint=fingerprint(self.model.state_dict()),
            embed_dim=decoder.decoder.embed_dim,
            depths=list(decoder.depths),
        )
        identity = dict(
            dataset=named | {"digest": _digest(ids)},
            metainfo=dict(dataset.metainfo),
            model=model,
            settings=_digest(self.settings),
        )
        return json.loads(json.dumps(identity))  # tuples become lists, as in files

    @torch.no_grad()
    def __call__(self, index: int) -> dict[str, Any]:
        """Return the record of one image.

        Returns:
            ``i``; ``id`` and ``file`` of the image; ``flops`` of one layer; ``vector``, what the gate reads (base64 of
            float32); by exit ``quality``, the image's own PQ over its classes, 0..1 (0 where neither a true nor a
            predicted segment counts); ``counts``, rows of [exit, class, IoU sum, TP, FP, FN] where any is not 0.
        """
        item, model = self.dataset[index], self.model
        data = model.data_preprocessor(dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]))
        (sample,) = data["data_samples"]
        maps = model.encoder(data["inputs"])
        memory, context = model.decoder.decoder.start(maps)
        vector = model.decoder.decoder.summary(memory, context)[0]  # (C,)
        counts = [self._counts(sample, features) for _, features in model.decoder.exits(maps, (memory, context))]
        quality = [panoptic_quality(c, self.isthing)["All"]["pq"] for c in counts]
        return dict(
            i=index,
            id=sample.img_id,
            file=Path(sample.img_path).name,
            flops=model.decoder.decoder.layer_flops(context),
            vector=base64.b64encode(vector.float().cpu().numpy().tobytes()).decode(),
            quality=[0.0 if math.isnan(q) else q for q in quality],
            counts=[[e, int(k), *c[k].tolist()] for e, c in enumerate(counts) for k in np.flatnonzero(c.any(axis=1))],
        )

    def _counts(self, sample: SegSample, features: Features) -> np.ndarray:
        """Return the panoptic counts (K, 4) of one image at one exit."""
        outputs = self.model.head(features, deep_supervision=False)
        predicted = self.model.head.predict(outputs, [sample.metainfo])[0]["pred_panoptic"]
        truth = sample.gt_panoptic
        return panoptic_counts(truth.numpy(), truth.segments, predicted.numpy(), predicted.segments, len(self.isthing))


def _dataset_config(cfg: Any, source: Source) -> dict:
    if source.split not in ("train", "val"):
        raise ValueError(f"split={source.split!r}: choose 'train' or 'val'")
    test = cfg.test_dataloader["dataset"]
    if source.split == "val":
        return test
    train = cfg.train_dataloader["dataset"]
    if train["type"] == "GateDataset":
        raise ValueError(
            f"{source.config} trains a gate on vectors, it names no training images: give the parent's config"
        )
    return dict(train, pipeline=test["pipeline"], test_mode=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Records:
    """Everything that was measured on N images at E exits.

    Attributes:
        identity: see `Measurement.identity`.
        images: (N) ``id`` and ``file``.
        vectors: (N, C) float32, what the gate reads.
        layer_flops: (N,) multiply-adds of one encoder layer.
        quality: (N, E) panoptic quality of each image by itself, 0..1.
        counts: (N) arrays (M, 6), see `Measurement`.
    """

    identity: dict[str, Any]
    images: list[dict]
    vectors: np.ndarray
    layer_flops: np.ndarray
    quality: np.ndarray
    counts: list[np.ndarray]


def measure(source: Source, path: Path, workers: int = 0) -> Records:
    """Measure the images of a source that the file of records lacks, and return all records.

    Args:
        source: what is measured.
        path: file of records: a line for the identity, then a line an image, written as soon as it is known.
        workers: processes; 0: this one does it all.

    Raises:
        ValueError: the file holds records of something else.
    """
    measurement = Measurement(source)
    identity = measurement.identity()
    path.parent.mkdir(parents=True, exist_ok=True)
    known, total = _resume(path, identity), len(measurement.dataset)
    todo = [i for i in range(total) if i not in known]
    if known:
        print(f"{path}: {len(known)} of {total} images are measured already")
    with path.open("a") as file:
        for record in progress(_measured(measurement, todo, workers), "measuring all exits", len(todo)):
            file.write(json.dumps(record) + "\n")
            file.flush()
    return read_records(path)


def _resume(path: Path, identity: dict) -> set[int]:
    """Return which images a file has, after cutting off what a killed run left of its last line."""
    if not path.is_file() or not (whole := path.read_bytes().rpartition(b"\n")[0]):
        path.write_text(json.dumps(identity) + "\n")
        return set()
    os.truncate(path, len(whole) + 1)
    first, *lines = whole.splitlines()
    check_identity(json.loads(first), identity, path)
    return {json.loads(line)["i"] for line in lines}


def check_identity(found: dict, expected: dict, path: Path) -> None:
    """Raise ``ValueError`` if a file's records are of another data set, class list or model, or of other settings."""
    words = dict(
        dataset="another data set or split",
        metainfo="another class list",
        model="another model (weights or exits)",
        settings="other test settings (pipeline, preprocessor or panoptic thresholds)",
    )
    other = [words[name] for name in IDENTITY if found.get(name) != expected[name]]
    if other:
        raise ValueError(f"{path} is of {' and of '.join(other)}: choose another --out, or delete that file")


def read_records(path: Path) -> Records:
    """Read a complete file of records."""
    with path.open() as file:
        identity = json.loads(next(file))
        size = identity["dataset"]["images"]
        images, counts = [{}] * size, [np.empty((0, 6))] * size
        vectors = np.empty((size, identity["model"]["embed_dim"]), np.float32)
        flops, quality = np.empty(size), np.empty((size, len(identity["model"]["depths"])))
        for record in map(json.loads, file):
            i = record["i"]
            images[i] = dict(id=record["id"], file=record["file"])
            vectors[i] = np.frombuffer(base64.b64decode(record["vector"]), np.float32)
            flops[i], quality[i] = record["flops"], record["quality"]
            counts[i] = np.array(record["counts"], float).reshape(-1, 6)
    return Records(identity, images, vectors, flops, quality, counts)


def _measured(measurement: Measurement, todo: list[int], workers: int) -> Iterator[dict]:
    if workers == 0 or not todo:
        yield from map(measurement, todo)
        return
    threads = max(1, torch.get_num_threads() // workers)
    # Spawned, not forked: OpenCV and torch hold threads that a fork would lose.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, _begin, (measurement.source, threads, counter)) as pool:
        yield from pool.map(_measure, todo)


_of_this_worker: list[Measurement] = []


def _begin(source: Source, threads: int, counter: Any) -> None:
    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with counter.get_lock():
        rank, counter.value = counter.value, counter.value + 1
    if source.device == "cuda":
        source = Source(**{**vars(source), "device": f"cuda:{rank % torch.cuda.device_count()}"})
    _of_this_worker.append(Measurement(source))


def _follow_parent() -> None:
    """End this process with its parent: the pool's workers would wait for a killed one forever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _measure(index: int) -> dict:
    return _of_this_worker[0](index)


def derive(source: Source, out: str | Path, betas: Sequence[float] = BETAS, workers: int = 0) -> Derived:
    """Write the derived data set: every image's quality at each exit, the gate's vector, the ideal depths for betas.

    If ``out`` exists the betas are added and nothing is measured; a killed run goes on where it stopped.

    Args:
        source: the parent and the images.
        out: JSON file; the vectors go into a ``.safetensors`` beside it.
        betas: see `densepred.data.derived.ideal_depths`.
        workers: see `measure`.

    Raises:
        ValueError: ``out`` was derived from another model, data set or class list, or it is no JSON file's name.
    """
    out = Path(out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: the derived data set is a JSON file; name it {out.with_suffix('.json')}")
    if out.is_file():
        derived = read_derived(out)
        check_identity(derived.record, Measurement(source).identity(), out)
    else:
        derived = _derived(source, out, workers)
    derived = with_betas(derived, betas)
    print(_table(derived))
    return derived


def _derived(source: Source, out: Path, workers: int) -> Derived:
    path = out.with_suffix(".records.jsonl")
    records = measure(source, path, workers)
    words = [f"{key}={str(value).replace(' ', '')}" for key, value in source.cfg_options.items()]
    made = dict(config=source.config, checkpoint=str(Path(source.checkpoint).resolve()), cfg_options=words)
    images = [image | {"quality": q} for image, q in zip(records.images, records.quality.tolist(), strict=True)]
    header = records.identity | {"made_with": made}
    derived = write_derived(out, header, images, torch.from_numpy(records.vectors))
    path.unlink()
    return derived


def _table(derived: Derived) -> str:
    lines = [f"{derived.path}: {len(derived.quality)} images; those whose ideal depth is"]
    lines.append("beta".rjust(10) + "".join(str(depth).rjust(9) for depth in derived.depths) + "  mean depth")
    for entry in derived.record["betas"]:
        counts = "".join(str(count).rjust(9) for count in entry["counts"])
        lines.append(f"{entry['beta']:>10g}{counts}{entry['mean_depth']:>12.3f}")
    return "\n".join(lines)
