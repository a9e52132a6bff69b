"""Published weights under our names, and back.

The conversion is strict both ways: every key is used or dropped by a rule of its format (`sources`), none is missing, all
shapes agree.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model.weight_init import update_init_info
from torch import Tensor, nn

from densepred.engine.checkpoint import (
    check_loadable,
    mismatches,
    read_checkpoint,
    shapes,
    state_dict_of,
    write_checkpoint,
)
from densepred.engine.mapping_mask2former import PARTS
from densepred.engine.sources import SOURCES, detect_source, source_named
from densepred.registry import WEIGHT_INITIALIZERS

COUNTER = "num_batches_tracked"
"""BatchNorm's counter of steps. Files older than PyTorch 0.4.1 and ports from other frameworks lack it: filled with 0."""

GATE = "decoder.gate."
"""The gate of an adaptive exit, which wraps the decoder that every format names ``decoder``."""


def convert_state_dict(state_dict: Mapping[str, Tensor], source: str, model: nn.Module) -> dict[str, Tensor]:
    """Rename published weights for ``model`` and check that they fit it exactly.

    Args:
        state_dict: official key -> tensor or NumPy array of any float type, which is kept; a whole checkpoint that
            holds such a table will do.
        source: one of `SOURCES`.
        model: what the weights are for: a segmentor, or an encoder by itself. Its own weights stay untouched.

    Returns:
        Our key -> tensor, in the order of ``model``. Of an encoder's format for a segmentor, the keys of its encoder;
        of a whole model for an encoder by itself, the encoder's part. What files of this format never hold
        (`Source.kept`) is there with the model's own values.

    Raises:
        ValueError: unknown source, or keys left over, missing or of another shape; the message names the first ones.
    """
    return _convert(state_dict_of(state_dict), source, model).weights


class _Converted(NamedTuple):
    weights: dict[str, Tensor]
    report: str
    kept: list[str]
    """Keys that the file lacks by its format: their values are the model's own."""


def _convert(official: Mapping[str, Tensor], source: str, model: nn.Module) -> _Converted:
    rules, own = source_named(source), model.state_dict()
    inside = "encoder." if rules.encoder_only and hasattr(model, "encoder") else ""
    own = {key: value for key, value in own.items() if key.startswith(inside)}
    taken = rules.fitted(official, own)
    renamed = _joined(_renamed(taken, source, model))
    # A frozen norm counts no steps.
    unused = [k for k in renamed if k.endswith(COUNTER) and k not in own and f"{k[: -len(COUNTER)]}running_var" in own]
    spare = [k for k in renamed if k not in own and re.fullmatch(rules.spare, k.removeprefix(inside))]
    renamed = {key: value for key, value in renamed.items() if key not in {*unused, *spare}}
    counters = [key for key in own if key.endswith(COUNTER) and key not in renamed]
    renamed |= {key: torch.zeros((), dtype=torch.int64) for key in counters}
    kept = [key for key in own if key not in renamed and re.fullmatch(rules.kept, key.removeprefix(inside))]
    renamed |= {key: own[key] for key in kept}
    differences = mismatches(shapes(own), shapes(renamed))
    if differences:
        raise ValueError(_does_not_fit(source, official, own, model, differences))
    report = f"{len(own)} tensors, {sum(v.numel() for v in renamed.values()) / 1e6:.1f} M values"
    notes = (
        f"from {len(official)} keys of {source}",
        _counted("dropped by rule", [key for key in official if re.fullmatch(rules.dropped, key)]),
        _counted("not in files of this kind, kept as initialised", kept),
        _counted("not in this model, left out", [*(key for key in official if key not in taken), *spare]),
        f"{len(counters)} absent step counters set to 0" if counters else "",
        f"{len(unused)} step counters left out: the norms are frozen" if unused else "",
    )
    report = f"{report}, {'; '.join(note for note in notes if note)}"
    return _Converted({key: renamed[key] for key in own}, report, kept)


def _counted(what: str, keys: list[str]) -> str:
    return f"{what}: {_some(keys)}" if keys else ""


def _some(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f", and {len(keys) - most} more" if len(keys) > most else "")


def _renamed(official: Mapping[str, Tensor], source: str, model: nn.Module) -> dict[str, Tensor]:
    rules, whole = source_named(source), hasattr(model, "encoder")
    adaptive = hasattr(getattr(model, "decoder", None), "gate")
    origin, renamed = {}, {}
    needed = {key: value for key, value in official.items() if not re.fullmatch(rules.dropped, key)}
    for key, value in rules.import_values(needed).items():
        ours = rules.to_ours(key)
        if rules.encoder_only and whole:
            ours = f"encoder.{ours}"
        elif not rules.encoder_only and not whole:
            if not ours.startswith("encoder."):
                continue
            ours = ours.removeprefix("encoder.")
        if adaptive and ours.startswith("decoder.") and not ours.startswith(GATE):
            ours = f"decoder.{ours}"  # the adaptive exit wraps the decoder that the format names
        if ours in renamed:
            raise ValueError(f"the keys {origin[ours]} and {key} both mean {ours}: no file of {source!r}")
        origin[ours] = key
        renamed[ours] = value.long() if key.endswith(COUNTER) else value
    return renamed


def _joined(renamed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the parts of fused weights together; parts that are alone or do not agree stay, to be named as unknown."""
    joined = dict(renamed)
    for key in renamed:
        whole = key.removesuffix(PARTS[0])
        parts = [renamed.get(whole + part) for part in PARTS]
        if whole != key and all(part is not None and part.shape == parts[0].shape for part in parts):
            joined = {k: v for k, v in joined.items() if k not in {whole + part for part in PARTS}}
            joined[whole] = torch.cat(parts)
    return joined


def _does_not_fit(source: str, official: Mapping, expected: Mapping, model: nn.Module, differences: str) -> str:
    looks = detect_source(official)
    hint = f"; it looks like {looks!r}" if looks not in (None, source) else ""
    return (
        f"the file ({len(official)} keys, read as {source!r}: {SOURCES[source].what}) does not fit "
        f"{type(model).__name__} as configured ({len(expected)} keys){hint}. Keys under our names:\n{differences}\n"
        "Check the source, and that depth, channels, number of queries and classes are those of the published model"
    )


def to_official(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename our weights to those of a published format, the inverse of `convert_state_dict`.

    Args:
        state_dict: of a segmentor or, for an encoder's format, of an encoder too; of a segmentor such a format takes the
            encoder's weights alone. An adaptive exit leaves its gate out where the format has no place for it.
        source: one of `SOURCES`.

    Raises:
        ValueError: unknown source.
    """
    rules = source_named(source)
    if rules.encoder_only and any(k.startswith("encoder.") for k in state_dict):
        state_dict = {k.removeprefix("encoder."): v for k, v in state_dict.items() if k.startswith("encoder.")}
    official = {}
    for key, value in state_dict.items():
        if key.startswith(GATE) and rules.kept:
            continue
        key = key.replace("decoder.decoder.", "decoder.", 1) if key.startswith("decoder.decoder.") else key
        parts = zip(PARTS, value.chunk(3), strict=True) if re.fullmatch(rules.fused, key) else (("", value),)
        official.update({rules.to_official(key + part): piece for part, piece in parts})
    return dict(rules.export_values(official))


def convert_file(src: str | Path, dst: str | Path, source: str, model: nn.Module) -> str:
    """Convert a published file into one of ours and return a report of one line.

    Args:
        src: any file that `read_checkpoint` reads.
        dst: ``.pth``, ``.pt``, ``.bin`` (weights under "state_dict") or ``.safetensors``; replaced only as a whole.
        source: one of `SOURCES`.
        model: what the weights are for, see `convert_state_dict`.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint` and `convert_state_dict`; the message names the file.
    """
    with naming(src):
        converted = _convert(state_dict_of(read_checkpoint(src)), source, model)
    write_checkpoint({"state_dict": converted.weights}, dst)
    return f"{src}: {converted.report} -> {dst}"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name before an error that lacks it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def load_weights(model: nn.Module, path: str | Path, source: str | None = None) -> str:
    """Load a file into ``model`` in place, converting a published format on the fly, and return a report of one line.

    Args:
        model: a segmentor or an encoder. An encoder also takes its part of a segmentor's checkpoint.
        path: any file that `read_checkpoint` reads.
        source: one of `SOURCES`; by default it is recognised by the keys.

    Raises:
        FileNotFoundError, ValueError: the file is unreadable or does not fit ``model`` exactly.
    """
    with naming(path):
        weights, report = fitting_weights(model, state_dict_of(read_checkpoint(path)), source)
    model.load_state_dict(weights, strict=len(weights) == len(model.state_dict()))
    return f"{path}: {report}"


def fitting_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str | None = None, whole: bool = False
) -> tuple[dict[str, Tensor], str]:
    """Return weights under our names that fit ``model``, and a report of one line.

    Args:
        model: a segmentor or an encoder. An encoder also takes its part of a segmentor's weights.
        weights: ours or of a published format.
        source: one of `SOURCES`; by default it is recognised by the keys.
        whole: refuse an encoder's file for a segmentor: what is evaluated must be trained in every part.

    Raises:
        ValueError: the weights do not fit exactly.
    """
    source, kept = source or detect_source(weights), []
    if source is not None:
        fitting, report, kept = _convert(weights, source, model)
    else:
        fitting = dict(weights) if hasattr(model, "encoder") else _encoder_part(weights)
        report = f"{len(fitting)} tensors of our own"
    if source is None or whole:
        check_loadable(model, fitting)
    if whole and kept:
        raise ValueError(
            f"files of {source!r} have no {_some(kept)}: an evaluation needs every weight trained. Train the model from "
            "this file first, or evaluate it with the config of the published model"
        )
    return fitting, report


def _encoder_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    part = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
    return part or dict(weights)


@WEIGHT_INITIALIZERS.register_module()
class Pretrained:
    """``init_cfg=dict(type="Pretrained", checkpoint=PATH)``: start from a published file or one of ours, or stop.

    MMEngine's initialiser of this name loads whatever fits and logs the rest; this one is strict, see `load_weights`.

    Args:
        checkpoint: the file.
        source: one of `SOURCES`; by default it is recognised by the keys.
    """

    def __init__(self, checkpoint: str, source: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.source = source

    def __call__(self, module: nn.Module) -> None:
        report = load_weights(module, self.checkpoint, self.source)
        print_log(f"{type(module).__name__} starts from {report}", logger="current")
        if hasattr(module, "_params_init_info"):  # present while MMEngine's init_weights runs
            update_init_info(module, init_info=f"Pretrained: {report}")
