"""The derived data set of ECO-M2F: how good every exit is on every image, and what the gate sees of it.

One JSON file, written by `densepred.eco.derive`, with the vectors in a ``.safetensors`` file beside it. From the qualities
the ideal depth follows for any beta, see `ideal_depths` (arXiv:2404.15244, the second step of the recipe).
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from densepred.registry import DATASETS, TRANSFORMS
from densepred.structures import SegSample

FORMAT = "densepred derived data set 1"
COMMAND = "tools/eco_derive.py"


def ideal_depths(quality: np.ndarray, depths: Sequence[int], beta: float) -> np.ndarray:
    """Return each image's ideal depth (N,): the k with the largest quality - beta * k, of equals the shallowest.

    Args:
        quality: (N, E), panoptic quality of each image at each exit, 0..1.
        depths: (E,) layers at the exits, ascending.
        beta: the quality that one layer less is worth.
    """
    layers = np.asarray(depths)
    return layers[np.argmax(quality - beta * layers, axis=1)]


@dataclass(frozen=True)
class Derived:
    """A derived data set.

    Attributes:
        path: its JSON file.
        record: what the file holds: ``dataset`` (type, split, source, number of images, digest of their ids), ``metainfo``
            (classes, palette, isthing, category_ids), ``model`` (fingerprint of the weights, embed_dim, depths),
            ``settings`` (digest of what else decides the qualities), ``made_with``, ``vectors`` (file and digest),
            ``betas`` (beta, mean_depth, counts by exit, ideal depth of every image), ``images`` (id, file, quality).
    """

    path: Path
    record: dict[str, Any]

    @property
    def depths(self) -> list[int]:
        """Layers at the exits, ascending."""
        return self.record["model"]["depths"]

    @cached_property
    def quality(self) -> np.ndarray:
        """(N, E), panoptic quality of each image at each exit, 0..1."""
        return np.array([image["quality"] for image in self.record["images"]], float)

    def ideal(self, beta: float) -> list[int]:
        """Return each image's ideal depth.

        Raises:
            ValueError: this beta was never derived; the message names those that were, and the command.
        """
        for entry in self.record["betas"]:
            if entry["beta"] == beta:
                return entry["depths"]
        known = ", ".join(str(entry["beta"]) for entry in self.record["betas"])
        made = self.record["made_with"]
        options = " ".join(["", "--cfg-options", *made["cfg_options"]]) if made["cfg_options"] else ""
        raise ValueError(
            f"{self.path} has no ideal depths for beta={beta} (it has {known}); add them, which needs no forward pass: "
            f"{COMMAND} {made['config']} {made['checkpoint']} --out {self.path} --betas {beta}{options}"
        )

    def vectors(self) -> Tensor:
        """Return what the gate reads of every image, (N, C) float32.

        Raises:
            FileNotFoundError: the file beside the JSON is missing.
            ValueError: it is not the one that was written with the JSON.
        """
        path = self.path.parent / self.record["vectors"]["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}, which {self.path} names, does not exist: keep the two files together")
        with safe_open(path, framework="pt") as file:
            vectors = file.get_tensor("vectors")
        if digest(vectors) != self.record["vectors"]["digest"]:
            raise ValueError(f"{path} was not written together with {self.path}: derive the data set again")
        return vectors


def digest(vectors: Tensor) -> str:
    """Return the SHA-256 of a tensor's shape and values."""
    return hashlib.sha256(str(tuple(vectors.shape)).encode() + vectors.numpy().tobytes()).hexdigest()


def read_derived(path: str | os.PathLike) -> Derived:
    """Read a derived data set's JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no derived data set.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"derived data set {path} does not exist; {COMMAND} CONFIG CHECKPOINT --out {path} makes it"
        )
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); make it again with {COMMAND}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is no derived data set (its format is not {FORMAT!r}); {COMMAND} writes one")
    return Derived(path, record)


def write_derived(path: Path, header: dict, images: list[dict], vectors: Tensor) -> Derived:
    """Write the vectors, then the JSON without any beta; each file appears as a whole."""
    side = path.with_suffix(".safetensors")
    _replace(side, save({"vectors": vectors.contiguous()}))
    named = {"vectors": {"file": side.name, "digest": digest(vectors)}}
    return _written(path, {"format": FORMAT, **header, **named, "betas": [], "images": images})


def with_betas(derived: Derived, betas: Sequence[float]) -> Derived:
    """Add the ideal depths for further betas, in the file too; those it has stay."""
    known = {entry["beta"]: entry for entry in derived.record["betas"]}
    for beta in betas:
        chosen = ideal_depths(derived.quality, derived.depths, beta)
        counts = [int((chosen == depth).sum()) for depth in derived.depths]
        known[beta] = dict(beta=beta, mean_depth=float(chosen.mean()), counts=counts, depths=chosen.tolist())
    return _written(derived.path, derived.record | {"betas": [known[beta] for beta in sorted(known)]})


def _written(path: Path, record: dict) -> Derived:
    _replace(path, (json.dumps(record) + "\n").encode())
    return Derived(path, record)


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_bytes(content)
    scratch.replace(path)


@DATASETS.register_module()
class GateDataset(Dataset):
    """What the gate trains on: ``inputs`` (C,) float32 and a sample with ``ideal_depth`` in its metadata.

    Args:
        derived: file of the derived data set.
        beta: whose ideal depths are the targets.

    Attributes:
        derived: the file's content.
        metainfo: the class table of the images.

    Raises:
        FileNotFoundError, ValueError: see `read_derived`, `Derived.ideal` and `Derived.vectors`.
    """

    def __init__(self, derived: str, beta: float) -> None:
        self.derived = read_derived(derived)
        self.targets = self.derived.ideal(beta)
        self.vectors = self.derived.vectors()  # (N, C)
        self.metainfo = {name: _tuples(values) for name, values in self.derived.record["metainfo"].items()}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict:
        """Return one item; an index beyond the length is a later visit of the same image."""
        i = index % len(self)
        image = self.derived.record["images"][i]
        meta = dict(img_id=image["id"], img_path=image["file"], ideal_depth=self.targets[i])
        return dict(inputs=self.vectors[i], data_samples=SegSample(metainfo=meta))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


@TRANSFORMS.register_module()
class LoadIdealDepth(BaseTransform):
    """After `PackSegInputs`: note an image's ideal depth in its sample, for ``model.exit="oracle"``.

    Args:
        derived: derived data set of these images (of the validation set: ``--split val``).
        beta: whose ideal depths.

    Raises:
        FileNotFoundError, ValueError: see `read_derived` and `Derived.ideal`; an image that was not derived.
    """

    def __init__(self, derived: str, beta: float) -> None:
        content = read_derived(derived)
        ids = (str(image["id"]) for image in content.record["images"])
        self.depths = dict(zip(ids, content.ideal(beta), strict=True))
        self.origin = (
            f"{derived} (of {content.record['dataset']['source']}, split {content.record['dataset']['split']})"
        )

    def transform(self, results: dict) -> dict:
        sample = results["data_samples"]
        if str(sample.img_id) not in self.depths:
            raise ValueError(
                f"{self.origin} does not hold the image {sample.img_id!r} ({sample.img_path}): derive the split that is "
                f"evaluated with {COMMAND} --split"
            )
        sample.set_metainfo(dict(ideal_depth=self.depths[str(sample.img_id)]))
        return results
