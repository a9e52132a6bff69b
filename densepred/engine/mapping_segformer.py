"""Parameter names of NVIDIA's SegFormer and its MiT encoder: ours, which are mmsegmentation's, and theirs.

More than names: query apart from key and value there, in one matrix here; linear layers there, 1x1 convolutions here.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from densepred.engine.mapping_mask2former import renamer

NVIDIA_MIT = tuple(
    (theirs.format(stage + 1), ours.format(stage))
    for stage in range(4)
    for theirs, ours in (
        ("patch_embed{}.proj.", "layers.{}.0.projection."),
        ("patch_embed{}.norm.", "layers.{}.0.norm."),
        ("block{}.{{}}.attn.qkv.", "layers.{}.1.{{}}.attn.attn.in_proj_"),  # `nvidia_values_to_ours` makes the former
        ("block{}.{{}}.attn.proj.", "layers.{}.1.{{}}.attn.attn.out_proj."),
        ("block{}.{{}}.mlp.fc1.", "layers.{}.1.{{}}.ffn.layers.0."),
        ("block{}.{{}}.mlp.dwconv.dwconv.", "layers.{}.1.{{}}.ffn.layers.1."),
        ("block{}.{{}}.mlp.fc2.", "layers.{}.1.{{}}.ffn.layers.4."),
        ("block{}.{{}}.", "layers.{}.1.{{}}."),
        ("norm{}.", "layers.{}.2."),
    )
)
"""MiT, relative to the encoder."""

_SEGFORMER = (
    *((f"backbone.{theirs}", f"encoder.{ours}") for theirs, ours in NVIDIA_MIT),
    ("decode_head.linear_pred.", "head.classifier."),
    ("decode_head.", "decoder."),
)

nvidia_to_ours, ours_to_nvidia = renamer(NVIDIA_MIT), renamer(NVIDIA_MIT, backwards=True)
"""Of one key relative to the encoder; values: `nvidia_values_to_ours`, `nvidia_values_to_theirs`."""

segformer_to_ours, segformer_to_official = renamer(_SEGFORMER), renamer(_SEGFORMER, backwards=True)
"""Of one key of a whole SegFormer."""

_BLOCK = re.compile(
    r"(?P<block>(backbone\.)?block\d\.\d+\.)(?P<layer>attn\.(q|kv|qkv)|mlp\.fc[12])\.(?P<kind>weight|bias)"
)


def nvidia_values_to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join query with key and value into ``attn.qkv`` and make 1x1 convolutions of the MLPs, under NVIDIA's names.

    Keys are those of MiT, alone or under ``backbone.``; a query without its key and value stays, to be named as unknown.
    """
    result = {}
    for key, value in weights.items():
        match = _BLOCK.fullmatch(key)
        if not match:
            result[key] = value
        elif match["layer"].startswith("mlp"):
            result[key] = value[..., None, None] if value.ndim == 2 else value
        else:
            query, both = (f"{match['block']}attn.{part}.{match['kind']}" for part in ("q", "kv"))
            if query not in weights or both not in weights:
                result[key] = value
            elif key == query:
                parts = [torch.as_tensor(weights[query]), torch.as_tensor(weights[both])]
                result[f"{match['block']}attn.qkv.{match['kind']}"] = torch.cat(parts)
    return result


def nvidia_values_to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `nvidia_values_to_ours`."""
    result = {}
    for key, value in weights.items():
        match = _BLOCK.fullmatch(key)
        if match and match["layer"] == "attn.qkv":
            channels = len(value) // 3
            for part, rows in (("q", value[:channels]), ("kv", value[channels:])):
                result[f"{match['block']}attn.{part}.{match['kind']}"] = rows
        else:
            result[key] = value[..., 0, 0] if match and value.ndim == 4 else value
    return result
