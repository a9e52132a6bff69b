"""What channels-last, bfloat16 and `torch.compile` bring a model: inference and training steps, part by part.

All variants run in turn, in one process, on one batch of the config's own training data; without that data on this
machine, of Shapes in its layout. The parts of a step are timed at their ends (on a GPU after waiting for it, which the
steps of a real training do not do). ``matching`` is part of ``losses`` and not of the sum.
"""

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from densepred.engine.config import load_linked_config, merge_options, resolve_config
from densepred.engine.timing import peak_bytes
from densepred.evaluation.table import text_table
from densepred.registry import MODELS, SCOPE

SWITCHES = ("channels_last", "bf16", "compile")
"""What ``--switches`` takes: maps of NHWC memory, autocast to bfloat16, one graph each of encoder, decoder and head."""
PARTS = {
    "inference": ("encoder", "decoder", "head", "post-processing"),
    "training step": ("encoder", "decoder", "head", "losses", "backward"),
}


def benchmark_switches(
    config: str | os.PathLike,
    switches: Sequence[str] = SWITCHES,
    cfg_options: dict[str, Any] | None = None,
    batch: int = 2,
    repeats: int = 5,
    device: str = "cpu",
) -> str:
    """Time a config plain, with each switch, and with all of them; return a table for inference and one for training.

    Args:
        config: path of a config file.
        switches: names out of `SWITCHES`.
        cfg_options: dotted key -> value; ``data_root`` where the training data lie.
        batch: images.
        repeats: alternating rounds after one that does not count.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: an unknown switch, or the data set has no layout that Shapes could be written in.
    """
    for name in switches:
        if name not in SWITCHES:
            raise ValueError(f"--switches {name}: choose from {', '.join(SWITCHES)}")
    variants = [(), *((name,) for name in switches), *([tuple(switches)] if len(switches) > 1 else [])]
    with training_data(config, cfg_options or {}) as cfg:
        models, images, samples = prepared(cfg, batch, device, variants)
    size = "x".join(map(str, images.shape[-2:]))
    title = (
        f"{Path(config).name}, {batch} x {size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    tables = []
    for job, step in (("inference", _inference), ("training step", _training)):
        runs = [_Variant(model, names, images, samples, step) for model, names in zip(models, variants, strict=True)]
        tables.append(text_table(*_table(job, runs, repeats, batch, f"{title}: {job}")))
    return "\n\n".join(tables)


@contextmanager
def training_data(config: str | os.PathLike, options: dict[str, Any]) -> Iterator[Config]:
    """Yield the resolved config, with Shapes for data where its own are missing."""
    linked = load_linked_config(config, options)
    if Path(linked.data_root).is_dir():
        yield resolve_config(linked)
        return
    from densepred.data.shapes_files import FIXED_COUNTS, LAYOUTS, write_split

    kind = resolve_config(copy.deepcopy(linked)).train_dataloader.dataset.type
    layout = next((name for name in LAYOUTS if str(kind).lower().startswith(name)), None)
    if layout is None:
        raise ValueError(
            f"data_root {linked.data_root} is not there, and {kind} has no layout that Shapes is written in"
        )
    with tempfile.TemporaryDirectory() as root:
        height, width = linked.image_size
        counts = FIXED_COUNTS.get(layout, {"train": 4, "val": 1})
        for split, number in counts.items():
            write_split(root, layout, split, number, 0, height, width)
        yield resolve_config(merge_options(linked, {"data_root": root}))


def prepared(
    cfg: Config, batch: int, device: str, variants: Sequence[tuple[str, ...]]
) -> tuple[list[nn.Module], Tensor, list]:
    torch.manual_seed(0)
    loader = dict(cfg.train_dataloader, batch_size=batch, num_workers=0, persistent_workers=False)
    with DefaultScope.overwrite_default_scope(SCOPE):
        data = next(iter(Runner.build_dataloader(loader, seed=0)))
    model = MODELS.build(cfg.model).to(device)
    data = model.data_preprocessor(data, True)
    models = [_switched(copy.deepcopy(model), names) for names in variants]
    return models, data["inputs"], data["data_samples"]


def _switched(model: nn.Module, names: Sequence[str]) -> nn.Module:
    if "channels_last" in names:
        model.to(memory_format=torch.channels_last)
    if "compile" in names:
        for part in (model.encoder, model.decoder, model.head):
            part.compile()
    return model


class _Variant:
    """A model under some switches with one job; a call runs it once and returns the seconds of its parts."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], images: Tensor, samples: list, step: Callable[..., None]
    ) -> None:
        self.model, self.names, self.samples, self.step = model, names, samples, step
        self.images = images.contiguous(memory_format=torch.channels_last) if "channels_last" in names else images

    def __call__(self) -> dict[str, float]:
        watch = _Watch(self.images.device)
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled="bf16" in self.names):
            self.step(self.model, self.images, copy.deepcopy(self.samples), watch)
        return watch.seconds


class _Watch:
    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, {}
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, part: str) -> None:
        now = self.now()
        self.seconds[part], self.last = now - self.last, now

    @contextmanager
    def around(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Add up what calls of a method take."""
        method = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            start = self.now()
            result = method(*arguments)
            self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start
            return result

        setattr(owner, name, timed)
        try:
            yield
        finally:
            delattr(owner, name)


def _features(model: nn.Module, images: Tensor, watch: _Watch) -> Any:
    maps = model.encoder(images, getattr(model.decoder, "num_maps", None))
    watch.lap("encoder")
    features = model.decoder(maps)
    watch.lap("decoder")
    return features


@torch.no_grad()
def _inference(model: nn.Module, images: Tensor, samples: list, watch: _Watch) -> None:
    model.eval()
    outputs = model.head(_features(model, images, watch), deep_supervision=False)
    watch.lap("head")
    model.head.predict(outputs, [sample.metainfo for sample in samples])
    watch.lap("post-processing")


def _training(model: nn.Module, images: Tensor, samples: list, watch: _Watch) -> None:
    model.train().zero_grad()
    outputs = model.head(_features(model, images, watch))
    watch.lap("head")
    criterion = getattr(model.head, "criterion", None)
    if hasattr(criterion, "_match"):
        with watch.around(criterion, "_match", "matching"):
            losses = model.head.loss(outputs, samples)
    else:
        losses = model.head.loss(outputs, samples)
    watch.lap("losses")
    sum(value for name, value in losses.items() if "loss" in name).backward()
    watch.lap("backward")


def _table(job: str, runs: Sequence[_Variant], repeats: int, batch: int, title: str) -> tuple[list, list, str]:
    first = [run() for run in runs]  # compiles, chooses algorithms
    order = (range(len(runs))[::step] for step in (1 if turn % 2 == 0 else -1 for turn in count()))
    rounds = [{i: runs[i]() for i in next(order)} for _ in range(repeats)]
    parts = [*PARTS[job], *(["matching"] if "matching" in first[0] else [])]
    rows = []
    for i, run in enumerate(runs):
        totals = [sum(times[i][part] for part in PARTS[job]) for times in rounds]
        plain = [sum(times[0][part] for part in PARTS[job]) for times in rounds]
        middle = statistics.median(totals)
        memory = peak_bytes(run, run.images.device) / 2**20
        rows.append(
            [
                " + ".join(run.names) or "plain",
                *(f"{1e3 * statistics.median(times[i][part] for times in rounds):.1f}" for part in parts),
                f"{1e3 * middle:.1f}",
                f"{statistics.median(p / t for p, t in zip(plain, totals, strict=True)):.2f}x",
                f"{batch / middle:.2f}",
                f"{memory:.0f}",
                f"{sum(first[i][part] for part in PARTS[job]):.1f}",
            ]
        )
    columns = ["switches", *(f"{part} ms" for part in parts), "sum ms", "ratio", "images/s", "peak MiB", "first s"]
    return columns, rows, title


__all__ = ["SWITCHES", "benchmark_switches"]
