"""Our Mask2Former against Hugging Face's: the same weights, the same work, in turn, in one process on one thread.

What is measured: the forward pass in evaluation, the criterion with its backward pass, and a training step (forward, loss,
backward). Drop path is off and the norms of a ResNet are frozen on both sides, so that both do the same. Before anything
is timed, outputs and losses must agree.
"""

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, cycle
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from densepred.engine.config import load_config
from densepred.engine.conversion import to_official
from densepred.engine.timing import peak_bytes
from densepred.losses.mask2former import Points
from densepred.registry import MODELS
from densepred.structures import SegSample

ENCODERS = {
    "swin_t": dict(type="SwinTransformer", drop_path_rate=0.0),
    "r50": dict(type="ResNet", depth=50, frozen_norm=True),
}
"""Encoders by the names that ``--encoder`` takes."""

NUM_CLASSES, NUM_TARGETS = 133, 12
JOBS = ("forward", "criterion", "training step")
PURPOSES = ("matching", "candidates", "random")
STAGES = ["stage1", "stage2", "stage3", "stage4"]
THEIRS_ALONE = ("empty_weight", "swin.layernorm.weight", "swin.layernorm.bias", "num_batches_tracked")
"""Endings of keys without a counterpart: the loss's class weights, a norm that nobody reads, counters of steps."""

TOLERANCE = 2e-3
"""Largest difference of an output, relative to the largest value, and of a loss term, in float32."""


def mask2former_config(
    encoder: Mapping[str, Any], num_classes: int, decoder: Mapping[str, Any] | None = None, **head: Any
) -> dict[str, Any]:
    """Return the model config of a Mask2Former for `huggingface_twin`; what is not given is the published value."""
    criterion = dict(type="Mask2FormerCriterion", num_classes=num_classes)
    return dict(
        type="Segmentor",
        encoder=dict(encoder),
        decoder=dict(type="DeformablePixelDecoder", **(decoder or {})),
        head=dict(type="Mask2FormerHead", num_classes=num_classes, tasks=("semantic",), criterion=criterion) | head,
    )


def huggingface_twin(config: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Return Hugging Face's Mask2Former of the same architecture with the same weights and type, in evaluation mode.

    Args:
        config: from `mask2former_config`.
        model: built from it.

    Raises:
        ImportError: ``transformers`` is not installed.
        ValueError: a weight of theirs got no value from ours.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    decoder, head, weights = model.decoder, model.head, to_official(model.state_dict(), "transformers")
    theirs = Mask2FormerConfig(
        backbone_config=_twin_encoder(config["encoder"]),
        num_labels=head.num_classes,
        feature_size=decoder.embed_dim,
        mask_feature_size=decoder.channels,
        encoder_layers=decoder.num_layers,
        encoder_feedforward_dim=decoder.layers[0].linear1.out_features,
        hidden_dim=head.query_feat.shape[1],
        num_attention_heads=config["head"].get("num_heads", 8),
        dim_feedforward=head.layers[0].ffn.linear1.out_features,
        decoder_layers=len(head.layers) + 1,  # theirs counts the learned queries' prediction
        num_queries=len(head.query_feat),
        train_num_points=head.criterion.num_points,
    )
    twin, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        None,
        config=theirs,
        state_dict={key: value.clone() for key, value in weights.items()},  # or both would share their memory
        output_loading_info=True,
        dtype=head.query_feat.dtype,
    )
    without = [key for key in info["missing_keys"] if not key.endswith(THEIRS_ALONE)]
    if without or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"the twin does not take our weights: {info}")
    return twin.eval()


def _twin_encoder(encoder: Mapping[str, Any]) -> Any:
    from transformers import ResNetConfig, SwinConfig

    if encoder["type"] == "SwinTransformer":
        names = ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")
        sizes = {name: encoder[name] for name in names if name in encoder}
        return SwinConfig(out_features=STAGES, **sizes)
    from densepred.encoders.resnet import BLOCKS

    depth, widths = encoder["depth"], [64, 128, 256, 512]
    kind, widths = ("basic", widths) if depth < 50 else ("bottleneck", [4 * width for width in widths])
    return ResNetConfig(layer_type=kind, depths=BLOCKS[depth], hidden_sizes=widths, out_features=STAGES)


def equal_points(like: Tensor) -> Points:
    """Return a source of points for `Mask2FormerCriterion`: for one purpose and set the same points for every mask.

    Args:
        like: its type and device are those of the points.
    """

    def points(name: str, number: int, shape: tuple[int, ...]) -> Tensor:
        drawn = np.random.default_rng((PURPOSES.index(name), number)).random(shape[1:])
        return torch.from_numpy(drawn).to(like).expand(shape).contiguous()

    return points


@contextmanager
def points_for_the_twin(points: Points, batch: int) -> Iterator[None]:
    """Let ``torch.rand`` return ``points`` in the order in which Hugging Face's criterion draws them: set by set."""
    calls = ((name, number) for number in count() for name in (*["matching"] * batch, "candidates", "random"))

    def rand(*shape: int, **_options: Any) -> Tensor:
        return points(*next(calls), shape)

    with mock.patch.object(torch, "rand", rand):
        yield


def generated_targets(size: int, number: int = NUM_TARGETS, num_classes: int = NUM_CLASSES) -> dict[str, Tensor]:
    """Return ``labels`` (N,) and ``masks`` (N, size, size) bool of ellipses of many sizes, the same in every run."""
    random = torch.Generator().manual_seed(0)
    y, x, height, width = torch.rand(4, number, 1, 1, generator=random)
    rows = torch.arange(size)[:, None] / size
    columns = torch.arange(size) / size
    masks = ((rows - y) / (0.05 + height / 3)) ** 2 + ((columns - x) / (0.05 + width / 3)) ** 2 < 1
    return dict(labels=torch.randint(num_classes, (number,), generator=random), masks=masks)


def encoder_config(encoder: str) -> dict[str, Any]:
    """Return the encoder of a name in `ENCODERS`, or that of a Mask2Former's config file, without what is random or frozen.

    Raises:
        ValueError: neither a known name nor the config of a Mask2Former with a ResNet or a Swin Transformer.
    """
    if encoder in ENCODERS:
        return ENCODERS[encoder]
    if not encoder.endswith(".py"):
        raise ValueError(f"encoder={encoder!r}: the benchmark knows {', '.join(ENCODERS)} and config files")
    model = load_config(encoder).model
    plain = {key: value for key, value in model.encoder.items() if key not in ("init_cfg", "out_features")}
    if model.head.type != "Mask2FormerHead" or plain["type"] not in ("ResNet", "SwinTransformer"):
        raise ValueError(
            f"{encoder}: transformers is a baseline of Mask2Former with a ResNet or a SwinTransformer, not of "
            f"{plain['type']} with {model.head.type}"
        )
    return plain | (dict(frozen_norm=True) if plain["type"] == "ResNet" else dict(drop_path_rate=0.0))


class Pair:
    """Our model and its twin with one image, its targets, and the jobs of both."""

    def __init__(self, encoder: str, size: int, device: str = "cpu") -> None:
        torch.manual_seed(0)
        config = mask2former_config(encoder_config(encoder), NUM_CLASSES)
        self.model = MODELS.build(config)
        self.twin = huggingface_twin(config, self.model).to(device)
        self.model.to(device)
        for module in self.twin.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.images = torch.randn(1, 3, size, size).to(device)
        self.target = {name: value.to(device) for name, value in generated_targets(size).items()}
        self.sample = SegSample(gt_instances=InstanceData(**self.target))
        self.float_masks = self.target["masks"].float()  # what their preprocessor makes
        with torch.no_grad():
            self.outputs = self.model.eval()(self.images)

    def run(self, job: str, ours: bool) -> Any:
        """Run a job once and return what it computes."""
        return getattr(self, f"_{job.split()[0]}")(ours)

    def _forward(self, ours: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            if ours:
                model = self.model.eval()
                outputs = model.head(model.features(self.images, None), deep_supervision=False)
                return outputs["pred_logits"], outputs["pred_masks"]
            outputs = self.twin.eval()(self.images)
            return outputs.class_queries_logits, outputs.masks_queries_logits

    def _leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        sets = [self.outputs, *self.outputs["aux_outputs"]]
        return tuple([s[name].clone().requires_grad_() for s in sets] for name in ("pred_logits", "pred_masks"))

    def _criterion(self, ours: bool, points: Points | None = None) -> dict[str, Tensor]:
        logits, masks = self._leaves()
        if ours:
            pairs = [dict(pred_logits=c, pred_masks=m) for c, m in zip(logits, masks, strict=True)]
            losses = self.model.head.criterion(pairs[0] | {"aux_outputs": pairs[1:]}, [self.target], points)
        else:
            pairs = [dict(class_queries_logits=c, masks_queries_logits=m) for c, m in zip(logits, masks, strict=True)]
            targets = [self.float_masks], [self.target["labels"]]
            losses = self.twin.get_loss_dict(masks[0], logits[0], *targets, pairs[1:])
        sum(losses.values()).backward()
        return {key.replace("cross_entropy", "ce"): value.detach() for key, value in losses.items()}

    def _training(self, ours: bool) -> Tensor:
        if ours:
            model = self.model.train()
            model.zero_grad()
            loss = sum(model(self.images, [self.sample], mode="loss").values())
        else:
            self.twin.train().model.pixel_level_module.encoder.eval()  # frozen norms; nothing else of it has a mode
            self.twin.zero_grad()
            loss = self.twin(self.images, mask_labels=[self.float_masks], class_labels=[self.target["labels"]]).loss
        loss.backward()
        return loss.detach()

    def differences(self) -> dict[str, float]:
        """Return how far ours and theirs are apart in outputs and losses.

        Raises:
            ValueError: further than float32 explains; no time would mean anything.
        """
        found = {
            name: float((a - b).abs().max() / b.abs().max())
            for name, a, b in zip(
                ("class logits", "mask logits"), self.run("forward", True), self.run("forward", False), strict=True
            )
        }
        points = equal_points(self.images)
        mine = self._criterion(True, points)
        with points_for_the_twin(points, 1):
            theirs = self._criterion(False)
        found["loss terms"] = max(float((mine[key] - theirs[key]).abs() / theirs[key].abs()) for key in theirs)
        if mine.keys() != theirs.keys() or max(found.values()) > TOLERANCE:
            raise ValueError(f"ours and theirs do not agree, so their times say nothing: {found}, allowed {TOLERANCE}")
        return found


def measure_model(
    encoder: str, size: int = 512, repeats: int = 5, memory: bool = True, device: str = "cpu"
) -> dict[str, Any]:
    """Compare our Mask2Former with Hugging Face's.

    Args:
        encoder: see `encoder_config`.
        size: side of the square image, a multiple of 32.
        repeats: alternating runs.
        memory: also measure peak memory, on a CPU each job in a process of its own.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``differences`` (of outputs and losses) and, per job of `JOBS`, ``ours`` and ``theirs`` (medians: CPU seconds,
        wall seconds, MiB above the loaded model at the peak) and ``ratio`` (median of theirs / ours, CPU and wall).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pair = Pair(encoder, size, device)
        results: dict[str, Any] = {"differences": pair.differences()}
        for job in JOBS:
            results[job] = _compare(pair, job, repeats)
    finally:
        torch.set_num_threads(threads)
    for job in JOBS if memory else ():
        for side in ("ours", "theirs"):
            results[job][side]["memory"] = _peak(pair, encoder, size, job, side)
    return results


def _peak(pair: Pair, encoder: str, size: int, job: str, side: str) -> float:
    if pair.images.device.type == "cpu":
        return _peak_of_process(encoder, size, job, side)
    return peak_bytes(lambda: pair.run(job, side == "ours"), pair.images.device) / 2**20


def _compare(pair: Pair, job: str, repeats: int) -> dict[str, dict[str, float]]:
    for ours in (True, False):
        pair.run(job, ours)
    order = cycle(((True, False), (False, True)))  # nobody always goes first
    rounds = [{ours: _timed(lambda side=ours: pair.run(job, side)) for ours in next(order)} for _ in range(repeats)]
    result: dict[str, dict[str, float]] = {"ours": {}, "theirs": {}, "ratio": {}}
    for i, clock in enumerate(("cpu", "wall")):
        result["ours"][clock] = statistics.median(r[True][i] for r in rounds)
        result["theirs"][clock] = statistics.median(r[False][i] for r in rounds)
        result["ratio"][clock] = statistics.median(r[False][i] / r[True][i] for r in rounds)
    return result


def _timed(function: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_of(encoder: str, size: int, job: str, ours: bool) -> float:
    """Return the MiB that a job takes at its peak above what the process holds before it; Linux with glibc."""
    torch.set_num_threads(1)
    pair = Pair(encoder, size)
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed before would serve the job unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    pair.run(job, ours)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _peak_of_process(encoder: str, size: int, job: str, side: str) -> float:
    call = f"peak_of({encoder!r}, {size}, {job!r}, {side == 'ours'})"
    code = f"import densepred; from densepred.engine.benchmark_model import peak_of; print({call})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def benchmark_model(
    encoders: Sequence[str] = tuple(ENCODERS), size: int = 512, repeats: int = 5, device: str = "cpu"
) -> str:
    """Return the lines to print of `measure_model` for some encoders."""
    import transformers

    clock = "cpu" if device == "cpu" else "wall"  # what a GPU takes, no process's clock shows
    lines = [
        f"Mask2Former, {size}x{size}, batch 1, {NUM_CLASSES} classes, {NUM_TARGETS} targets, {device}, one thread, "
        f"{repeats} alternating runs; base: transformers {transformers.__version__}, torch {torch.__version__}"
    ]
    for encoder in encoders:
        result = measure_model(encoder, size, repeats, device=device)
        name = Path(encoder).stem[:20]
        lines += ["", f"{name:20s} {clock:>4s} s: ours   theirs    ratio    wall ratio    peak MiB: ours   theirs"]
        for job in JOBS:
            ours, theirs, ratio = (result[job][key] for key in ("ours", "theirs", "ratio"))
            lines.append(
                f"{job:15s} {ours[clock]:17.3f} {theirs[clock]:8.3f} {ratio[clock]:7.2f}x {ratio['wall']:12.2f}x "
                f"{ours['memory']:17.0f} {theirs['memory']:8.0f}"
            )
        apart = ", ".join(f"{name} {value:.1e}" for name, value in result["differences"].items())
        lines.append(f"largest relative differences: {apart}")
    return "\n".join(lines)
