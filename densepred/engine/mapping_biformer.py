"""Parameter names of BiFormer: ours and those of its ImageNet classifier and of its two ADE20K models.

The encoder's names are official but for one; around it, the ADE20K files have mmsegmentation's names, of UPerNet and of
Semantic FPN, whose pyramid is a part of its own there.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from densepred.engine.mapping_mask2former import renamer

ENCODER = tuple((f"stages.{i}.{{}}.attn.qkv.qkv.", f"stages.{i}.{{}}.attn.qkv.") for i in range(3))
"""Of the routed stages; the last stage's ``attn.qkv`` is official."""

_MODEL = (
    *((f"backbone.{theirs}", f"encoder.{ours}") for theirs, ours in ENCODER),
    ("backbone.", "encoder."),
    ("decode_head.conv_seg.", "head.classifier."),
    ("decode_head.", "decoder."),
    ("neck.", "decoder."),  # back: `pyramid_to_neck`
    ("auxiliary_head.convs.0.", "head.auxiliary.conv."),
    ("auxiliary_head.conv_seg.", "head.auxiliary.classifier."),
)

biformer_to_ours, ours_to_biformer = renamer(ENCODER), renamer(ENCODER, backwards=True)
"""Of one key relative to the encoder."""

segmentor_to_ours, ours_to_segmentor = renamer(_MODEL), renamer(_MODEL, backwards=True)
"""Of one key of a whole model."""

DROPPED = r"(norm|head)\..*"
"""The classifier and the norm before it."""

OUTPUT_NORMS = r"extra_norms\..*"
"""Of the maps handed on, which a classifier lacks."""

FINGERPRINT = (r"stages\.0\.0\.attn\.qkv\.qkv\.weight", r"downsample_layers\.0\.0\.weight")

SEGMENTOR_FINGERPRINT = (r"backbone\.stages\.0\.0\.attn\.qkv\.qkv\.weight", r"decode_head\.conv_seg\.weight")

_PYRAMID = re.compile(r"decode_head\.(?=(lateral|fpn)_convs\.)")


def pyramid_to_neck(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the pyramid of a Semantic FPN, which ``scale_heads`` tell from UPerNet, from the head to the neck."""
    if not any(key.startswith("decode_head.scale_heads.") for key in weights):
        return dict(weights)
    return {_PYRAMID.sub("neck.", key): value for key, value in weights.items()}
