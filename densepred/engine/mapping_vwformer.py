"""Parameter names of VWFormer: ours and those of its authors' code, which builds on mmsegmentation 0.30 and Mask2Former.

Our decoder has the names of the former. Under the latter, one GroupNorm of many layers stands under each one's name, there
and here. More than a name: the output norms of MiT and of the other encoders share names there that differ here.
"""

import re
from collections.abc import Mapping

from torch import Tensor

import densepred.engine.mapping_mmsegmentation as mmsegmentation
import densepred.engine.mapping_segformer as segformer
from densepred.engine.mapping_mask2former import OFFICIAL, renamer

_MIT_NORM = re.compile(r"backbone\.(mit_)?norm([1-4])\.")
_PATCHES = "backbone.patch_embed1."
"""What starts a key of MiT and of no other encoder."""

_PAIRS = (
    *(
        (f"backbone.{theirs.replace('norm', 'mit_norm') if theirs.startswith('norm') else theirs}", f"encoder.{ours}")
        for theirs, ours in segformer.NVIDIA_MIT
    ),
    *((f"backbone.{theirs}", f"encoder.{ours}") for theirs, ours in mmsegmentation.BACKBONE),
    ("backbone.", "encoder."),
    ("decode_head.conv_seg.", "head.classifier."),
    ("decode_head.", "decoder."),
)

FINGERPRINT = (r"backbone\.", r"decode_head\.ds\.0\.conv\.", r"decode_head\.low_level_fuse\.")
DROPPED = mmsegmentation.DROPPED

vwformer_to_ours, ours_to_vwformer = renamer(_PAIRS), renamer(_PAIRS, backwards=True)
"""Of one key; values: `values_to_ours`, `values_to_theirs`."""


def values_to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Change what is more than a name, under their names but for MiT's output norms: ``mit_normK``."""
    if any(key.startswith(_PATCHES) for key in weights):
        weights = {_MIT_NORM.sub(r"backbone.mit_norm\2.", key): value for key, value in weights.items()}
        return segformer.nvidia_values_to_ours(weights)
    return mmsegmentation.import_values(weights)


def values_to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `values_to_ours`."""
    if any(key.startswith(_PATCHES) for key in weights):
        weights = {_MIT_NORM.sub(r"backbone.norm\2.", key): value for key, value in weights.items()}
        return segformer.nvidia_values_to_theirs(weights)
    return mmsegmentation.export_values(weights)


_PIXEL_DECODER = "sem_seg_head.pixel_decoder."
_BATCH_NORMS = ("linear_c1", "ds.{}")
_GROUP_NORMS = ("linear_c{}", "linear_fuse", "low_level_fuse", "cat", "short_path", "image_pool.1", "proj.{}")
_SUFFIXED = ("attn", "ds", "cat", "short_path", "image_pool")
"""Parts that bear a ``_0`` there."""


def _theirs(part: str) -> str:
    head, *rest = part.split(".")
    return ".".join([f"{head}_0" if head in _SUFFIXED else head, *rest])


_MASK2FORMER_PAIRS = (
    *(
        pair
        for parts, norm in ((_BATCH_NORMS, "bn"), (_GROUP_NORMS, "gn"))
        for part in parts
        for pair in (
            (f"{_PIXEL_DECODER}{_theirs(part)}.norm.", f"decoder.{part}.{norm}."),
            (f"{_PIXEL_DECODER}{_theirs(part)}.weight", f"decoder.{part}.conv.weight"),
            (f"{_PIXEL_DECODER}{_theirs(part)}.bias", f"decoder.{part}.conv.bias"),
        )
    ),
    (f"{_PIXEL_DECODER}attn_0.", "decoder.attn."),
    (f"{_PIXEL_DECODER}input_proj.", "decoder.deformable.input_proj."),
    (f"{_PIXEL_DECODER}transformer.level_embed", "decoder.deformable.level_embed"),
    (f"{_PIXEL_DECODER}transformer.encoder.layers.", "decoder.deformable.layers."),
    *(pair for pair in OFFICIAL if not pair[0].startswith(_PIXEL_DECODER)),
)

MASK2FORMER_FINGERPRINT = (rf"{re.escape(_PIXEL_DECODER)}attn_0\.", r"sem_seg_head\.predictor\.")

mask2former_to_ours, ours_to_mask2former = renamer(_MASK2FORMER_PAIRS), renamer(_MASK2FORMER_PAIRS, backwards=True)
"""Of one key of a Mask2Former with a VW pixel decoder."""
