"""Parameter names of mmsegmentation 1.x: ours and those of its ``backbone.``, ``decode_head.`` and ``auxiliary_head.``.

Decoders carry mmsegmentation's names, as do MobileNetV2 and MiT, so the tables hold the other encoders and the classifiers.
Which encoder a file has shows in its keys: no two of the tables match the same name.

Two things are more than names. Patch merging in Swin unfolds 2x2 tokens channel by channel there and token by token, rows
fastest, in the official code and here. A ResNet's plain 7x7 stem and the first convolution of its deep stem share a name
here and not there.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from densepred.engine.mapping_mask2former import renamer

Pairs = tuple[tuple[str, str], ...]

RESNET: Pairs = (
    *(
        pair
        for i in range(3)
        for pair in ((f"stem.{3 * i + 1}.", f"stem.conv{i + 1}.norm."), (f"stem.{3 * i}.", f"stem.conv{i + 1}."))
    ),
    ("bn1.", "stem.conv1.norm."),
    ("conv1.weight", "stem.conv1.weight"),
    *(
        pair
        for stage in range(1, 5)
        for pair in (
            (f"layer{stage}.{{}}.bn{{}}.", f"res{stage + 1}.{{}}.conv{{}}.norm."),
            (f"layer{stage}.{{}}.conv{{}}.weight", f"res{stage + 1}.{{}}.conv{{}}.weight"),
            (f"layer{stage}.{{}}.downsample.1.", f"res{stage + 1}.{{}}.shortcut.norm."),
            (f"layer{stage}.{{}}.downsample.0.", f"res{stage + 1}.{{}}.shortcut."),
        )
    ),
)
"""ResNet V1c (``stem.0``, ``3``, ``6``), and V1b, whose plain stem `export_values` tells apart."""

SWIN: Pairs = (
    ("patch_embed.projection.", "patch_embed.proj."),
    ("stages.{}.blocks.{}.attn.w_msa.", "layers.{}.blocks.{}.attn."),
    ("stages.{}.blocks.{}.ffn.layers.0.0.", "layers.{}.blocks.{}.mlp.fc1."),
    ("stages.{}.blocks.{}.ffn.layers.1.", "layers.{}.blocks.{}.mlp.fc2."),
    ("stages.{}.blocks.", "layers.{}.blocks."),
    ("stages.{}.downsample.", "layers.{}.downsample."),
)

CONVNEXT: Pairs = (
    ("stages.{}.{}.depthwise_conv.", "stages.{}.{}.dwconv."),
    ("stages.{}.{}.pointwise_conv{}.", "stages.{}.{}.pwconv{}."),
)
"""ConvNeXt of mmpretrain and of mmcls 0.25."""

BACKBONE: Pairs = (*RESNET, *SWIN, *CONVNEXT)
"""All encoders, relative to ``backbone.`` and ``encoder.``."""

_MODEL: Pairs = (
    *((f"backbone.{theirs}", f"encoder.{ours}") for theirs, ours in BACKBONE),
    ("backbone.", "encoder."),
    ("decode_head.conv_seg.", "head.classifier."),
    ("decode_head.cca.gamma.scale", "decoder.cca.gamma"),
    ("decode_head.", "decoder."),
    ("auxiliary_head.convs.0.", "head.auxiliary.conv."),
    ("auxiliary_head.conv_seg.", "head.auxiliary.classifier."),
)

DROPPED = r".*\.relative_position_index"
"""Swin's index buffers, which follow from the window's size."""

FINGERPRINT = (
    r"backbone\.",
    r"decode_head\.conv_seg\.weight",
    r"decode_head\.(convs|conv_cat|bottleneck|psp_modules|aspp_modules|fpn_bottleneck|fusion_conv)\.",
)

_MERGING = re.compile(r"(backbone\.)?stages\.\d\.downsample\.(norm|reduction)\.(weight|bias)")
_PLAIN_STEM = re.compile(r"^(backbone\.)?stem\.([01])\.")
_GAMMA = "decode_head.cca.gamma.scale"

to_ours, to_official = renamer(_MODEL), renamer(_MODEL, backwards=True)
backbone_to_ours, backbone_to_official = renamer(BACKBONE), renamer(BACKBONE, backwards=True)
"""Of one key relative to ``backbone.`` and ``encoder.``; values: `import_values`, `export_values`."""


def pretrained_to_ours(key: str) -> str:
    """Return our name, relative to the encoder, of one in a classifier of mmpretrain."""
    return backbone_to_ours(key.removeprefix("backbone."))


def pretrained_to_official(key: str) -> str:
    """Undo `pretrained_to_ours`."""
    return f"backbone.{backbone_to_official(key)}"


PRETRAINED_DROPPED = rf"head\..*|backbone\.conv2\.(conv|bn)\..*|{DROPPED}"
"""The classifier, and MobileNetV2's last convolution before it."""

PRETRAINED_FINGERPRINT = (
    r"backbone\.(stem\.0|conv1|conv1\.conv|patch_embed\.projection|downsample_layers\.0\.0|layers\.0\.0\.projection)\.weight",
    r"head\.fc\.",
)

BARE_DROPPED = rf"(fc|norm)\..*|.*\.attn_mask|{DROPPED}"
"""The classifier, Swin's norm before it, and masks that follow from the size of ImageNet's images."""

BARE_FINGERPRINT = (
    r"stem\.0\.weight|patch_embed\.projection\.weight",
    r"layer1\.0\.conv1\.weight|stages\.0\.blocks\.0\.attn\.w_msa\.",
)
"""Files that hold an encoder without a prefix: ResNet V1c and Swin. MiT's and MobileNetV2's have our own names."""


def token_by_token(merged: Tensor) -> Tensor:
    """Reorder the last axis (..., 4C) of patch merging from mmsegmentation's order to the official one.

    From channel, row, column (the last one fastest) to column, row, channel.
    """
    return merged.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)


def channel_by_channel(merged: Tensor) -> Tensor:
    """Reorder the last axis (..., 4C) from the official order to mmsegmentation's; the inverse of `token_by_token`."""
    return merged.unflatten(-1, (2, 2, -1)).transpose(-3, -2).movedim(-1, -3).flatten(-3)


def _merging_values(weights: Mapping[str, Tensor], reorder: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    changed = {key: torch.as_tensor(value) for key, value in weights.items() if _MERGING.fullmatch(key)}
    # A length that four tokens cannot have stays as it is, for the check of shapes to name.
    return dict(weights) | {key: reorder(value) for key, value in changed.items() if value.shape[-1] % 4 == 0}


def import_values(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Change what is more than a name, of official weights: Swin's patch merging, criss-cross attention's scale."""
    weights = _merging_values(weights, token_by_token)
    if _GAMMA in weights:
        weights[_GAMMA] = torch.as_tensor(weights[_GAMMA]).reshape(1)
    return weights


def export_values(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Change weights under official names into official ones; the inverse of `import_values`."""
    weights = _merging_values(weights, channel_by_channel)
    if _GAMMA in weights:
        weights[_GAMMA] = weights[_GAMMA].reshape(())
    if any(re.match(r"(backbone\.)?stem\.3\.", key) for key in weights):
        return weights
    return {_PLAIN_STEM.sub(_plain_stem, key, count=1): value for key, value in weights.items()}


def _plain_stem(match: re.Match) -> str:
    return f"{match[1] or ''}{('conv1', 'bn1')[int(match[2])]}."
