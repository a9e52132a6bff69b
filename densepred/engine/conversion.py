"""Published weights under our names, and back.

One `Source` a published format: how its keys read, which of them are no part of the model, and the two renamings. The
conversion is strict both ways: every key is used or dropped by a rule written here, none is missing, all shapes agree.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from densepred.errors import nearest
from densepred.registry import WEIGHT_INITIALIZERS

Rename = Callable[[str], str]
COUNTER = "num_batches_tracked"
"""BatchNorm's counter of steps. Files older than PyTorch 0.4.1 and ports from other frameworks lack it: filled with 0."""


@dataclass(frozen=True)
class Source:
    """A published format.

    Attributes:
        what: one line for reports and ``--help``.
        to_ours, to_official: renamings of one key; for an encoder's format, of keys relative to the encoder.
        dropped: keys (by full match) that belong to another task or are bookkeeping.
        fingerprint: patterns of which each must match the start of some key of a file in this format.
        encoder_only: holds an encoder's weights alone.
    """

    what: str
    to_ours: Rename
    to_official: Rename
    dropped: str
    fingerprint: tuple[str, ...]
    encoder_only: bool = True


def _renamer(*rules: tuple[str, str | Callable[[re.Match], str]]) -> Rename:
    """Return a function that applies the first rule (pattern, replacement) which matches the start of a key."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(key: str) -> str:
        for pattern, replacement in compiled:
            if pattern.match(key):
                return pattern.sub(replacement, key, count=1)
        return key

    return rename


def _stage(shift: int, before: str, after: str) -> Callable[[re.Match], str]:
    """Return a replacement that shifts group 1 and puts it between ``before`` and ``after`` (a template)."""
    return lambda match: f"{before}{int(match[1]) + shift}{match.expand(after)}"


def _kmax_to_ours(key: str) -> str:
    from densepred.engine.mapping_kmax import rename_to_ours

    for official, ours in _KMAX_PREFIXES.items():
        if key.startswith(official):
            return rename_to_ours(ours + key.removeprefix(official))
    return key


def _kmax_to_official(key: str) -> str:
    from densepred.engine.mapping_kmax import rename_to_official

    key = rename_to_official(key)
    for official, ours in _KMAX_PREFIXES.items():
        if key.startswith(ours):
            return official + key.removeprefix(ours)
    return key


def _same(key: str) -> str:
    return key


_KMAX_PREFIXES = {
    "backbone.": "encoder.",
    "sem_seg_head.pixel_decoder.": "decoder.",
    "sem_seg_head.predictor.": "head.",
}

_TORCHVISION = dict(
    to_ours=_renamer(
        (r"conv(\d)\.", r"stem.conv\1."),
        (r"bn(\d)\.", r"stem.conv\1.norm."),
        (r"layer(\d)\.(\d+)\.conv(\d)\.", _stage(1, "res", r".\2.conv\3.")),
        (r"layer(\d)\.(\d+)\.bn(\d)\.", _stage(1, "res", r".\2.conv\3.norm.")),
        (r"layer(\d)\.(\d+)\.downsample\.0\.", _stage(1, "res", r".\2.shortcut.")),
        (r"layer(\d)\.(\d+)\.downsample\.1\.", _stage(1, "res", r".\2.shortcut.norm.")),
    ),
    to_official=_renamer(
        (r"stem\.conv(\d)\.norm\.", r"bn\1."),
        (r"stem\.conv(\d)\.", r"conv\1."),
        (r"res(\d)\.(\d+)\.conv(\d)\.norm\.", _stage(-1, "layer", r".\2.bn\3.")),
        (r"res(\d)\.(\d+)\.conv(\d)\.", _stage(-1, "layer", r".\2.conv\3.")),
        (r"res(\d)\.(\d+)\.shortcut\.norm\.", _stage(-1, "layer", r".\2.downsample.1.")),
        (r"res(\d)\.(\d+)\.shortcut\.", _stage(-1, "layer", r".\2.downsample.0.")),
    ),
    dropped=r"fc\..*",
    fingerprint=(r"conv1\.weight", r"layer1\.0\.conv1\.weight"),
)

SOURCES = {
    "kmax-deeplab": Source(
        "a whole kMaX-DeepLab (PyTorch) checkpoint",
        _kmax_to_ours,
        _kmax_to_official,
        dropped=r"criterion\..*|pixel_mean|pixel_std",
        fingerprint=(r"backbone\.", r"sem_seg_head\.pixel_decoder\._in_norms\.", r"sem_seg_head\.predictor\._"),
        encoder_only=False,
    ),
    "torchvision-resnet": Source("an ImageNet ResNet of torchvision", **_TORCHVISION),
    "timm-resnet": Source("an ImageNet ResNet of timm (torchvision's names)", **_TORCHVISION),
    "detectron2-resnet": Source(
        "an ImageNet ResNet in detectron2's layout",
        _same,
        _same,
        dropped=r"(stem\.)?fc\..*",
        fingerprint=(r"stem\.conv1\.weight", r"res2\.0\.conv1\.norm\.weight"),
    ),
    "convnext": Source(
        "an official ImageNet ConvNeXt",
        _same,
        _same,
        dropped=r"(norm|head)\..*",
        fingerprint=(r"downsample_layers\.0\.0\.weight", r"stages\.0\.0\.dwconv\.weight"),
    ),
    "timm-convnext": Source(
        "an ImageNet ConvNeXt of timm",
        _renamer(
            (r"stem\.", "downsample_layers.0."),
            (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
            (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
            (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
            (r"stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
        ),
        _renamer(
            (r"downsample_layers\.0\.", "stem."),
            (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
            (r"stages\.(\d)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
            (r"stages\.(\d)\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
            (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        ),
        dropped=r"(norm_pre|head)\..*",
        fingerprint=(r"stem\.0\.weight", r"stages\.0\.blocks\.0\.conv_dw\.weight"),
    ),
}
"""The published formats by the names that ``--source`` takes."""


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"source={name!r}: unknown published format{nearest(name, SOURCES)}")
    return SOURCES[name]


def detect_source(keys: Iterable[str]) -> str | None:
    """Return the name of the published format that keys look like, or None."""
    keys = list(keys)
    for name, source in SOURCES.items():
        if all(any(re.match(pattern, key) for key in keys) for pattern in source.fingerprint):
            return name
    return None


def convert_state_dict(state_dict: Mapping[str, Tensor], source: str, model: nn.Module) -> dict[str, Tensor]:
    """Rename published weights for ``model`` and check that they fit it exactly.

    Args:
        state_dict: official key -> tensor or NumPy array of any float type, which is kept; a whole checkpoint that
            holds such a table will do.
        source: one of `SOURCES`.
        model: what the weights are for: a segmentor, or an encoder by itself. Its own weights stay untouched.

    Returns:
        Our key -> tensor, in the order of ``model``. Of an encoder's format for a segmentor, the keys of its encoder;
        of a whole model for an encoder by itself, the encoder's part.

    Raises:
        ValueError: unknown source, or keys left over, missing or of another shape; the message names the first ones.
    """
    official = state_dict_of(state_dict)
    renamed = _renamed(official, source, model)
    inside = hasattr(model, "encoder") and _source(source).encoder_only
    expected = {k: v for k, v in shapes(model.state_dict()).items() if k.startswith("encoder." if inside else "")}
    for key in expected:
        if key.endswith(COUNTER) and key not in renamed:
            renamed[key] = torch.zeros((), dtype=torch.int64)
    differences = mismatches(expected, shapes(renamed))
    if differences:
        raise ValueError(_does_not_fit(source, official, expected, model, differences))
    return {key: renamed[key] for key in expected}


def _renamed(official: Mapping[str, Tensor], source: str, model: nn.Module) -> dict[str, Tensor]:
    rules, whole = _source(source), hasattr(model, "encoder")
    origin, renamed = {}, {}
    for key, value in official.items():
        if re.fullmatch(rules.dropped, key):
            continue
        ours = rules.to_ours(key)
        if rules.encoder_only and whole:
            ours = f"encoder.{ours}"
        elif not rules.encoder_only and not whole:
            if not ours.startswith("encoder."):
                continue
            ours = ours.removeprefix("encoder.")
        if ours in renamed:
            raise ValueError(f"the keys {origin[ours]} and {key} both mean {ours}: no file of {source!r}")
        origin[ours] = key
        renamed[ours] = value.long() if key.endswith(COUNTER) else value
    return renamed


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
            encoder's weights alone.
        source: one of `SOURCES`.

    Raises:
        ValueError: unknown source.
    """
    rules = _source(source)
    if rules.encoder_only and any(k.startswith("encoder.") for k in state_dict):
        state_dict = {k.removeprefix("encoder."): v for k, v in state_dict.items() if k.startswith("encoder.")}
    return {rules.to_official(key): value for key, value in state_dict.items()}


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
        official = state_dict_of(read_checkpoint(src))
        converted = convert_state_dict(official, source, model)
    write_checkpoint({"state_dict": converted}, dst)
    return f"{src}: {_report(official, converted, source)} -> {dst}"


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name before an error that lacks it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _report(official: Mapping[str, Tensor], converted: Mapping[str, Tensor], source: str) -> str:
    dropped = [key for key in official if re.fullmatch(SOURCES[source].dropped, key)]
    counters = sum(k.endswith(COUNTER) for k in converted) - sum(k.endswith(COUNTER) for k in official)
    values = sum(value.numel() for value in converted.values())
    report = f"{len(converted)} tensors, {values / 1e6:.1f} M values, from {len(official)} keys of {source}"
    report += f"; dropped by rule: {', '.join(dropped)}" if dropped else ""
    return report + (f"; {counters} absent step counters set to 0" if counters > 0 else "")


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
    source = source or detect_source(weights)
    if source is not None:
        fitting = convert_state_dict(weights, source, model)
        report = _report(weights, fitting, source)
    else:
        fitting = dict(weights) if hasattr(model, "encoder") else _encoder_part(weights)
        report = f"{len(fitting)} tensors of our own"
    if source is None or whole:
        check_loadable(model, fitting)
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
