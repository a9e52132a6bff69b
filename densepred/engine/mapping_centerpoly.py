"""Parameter names of CenterPoly, and of CenterNet underneath: ours and theirs, for its three families of networks.

``smallhourglass`` and ``hourglass`` hold every branch once a stack (``hm.0.*`` the first's), and a branch's convolutions under
other names than the families ``resdcn_*`` and ``dla_34`` do. The functions on values bring the first form to the second.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from densepred.engine.mapping_mask2former import renamer

BRANCHES = {"hm": "heatmap", "poly": "polygon", "pseudo_depth": "pseudo_depth", "reg": "offset"}
"""Their names and ours of what the head predicts."""

_HOURGLASS = ("pre.", "kps.", "cnvs.", "inters.", "inters_.", "cnvs_.")
_RESNET = (
    ("bn1.", "encoder.stem.conv1.norm."),
    ("conv1.", "encoder.stem.conv1."),
    *(
        pair
        for stage in range(1, 5)
        for pair in (
            (f"layer{stage}.{{}}.bn{{}}.", f"encoder.res{stage + 1}.{{}}.conv{{}}.norm."),
            (f"layer{stage}.{{}}.conv{{}}.", f"encoder.res{stage + 1}.{{}}.conv{{}}."),
            (f"layer{stage}.{{}}.downsample.1.", f"encoder.res{stage + 1}.{{}}.shortcut.norm."),
            (f"layer{stage}.{{}}.downsample.0.", f"encoder.res{stage + 1}.{{}}.shortcut."),
        )
    ),
    ("deconv_layers.", "decoder.layers."),
)
_DLA = (
    ("base.base_layer.", "encoder.base_layer."),
    ("base.level{}.", "encoder.level{}."),
    ("dla_up.", "decoder.dla_up."),
    ("ida_up.", "decoder.ida_up."),
)
_PAIRS = (
    *((name, f"encoder.{name}") for name in _HOURGLASS),
    *_RESNET,
    *_DLA,
    *((f"{theirs}.", f"head.{ours}.") for theirs, ours in BRANCHES.items()),
    *((f"deep.{{}}.{theirs}.", f"head.deep.{{}}.{ours}.") for theirs, ours in BRANCHES.items()),
)

FINGERPRINT = (
    r"hm\.0\.(0\.conv\.)?weight",
    r"(kps\.0\.up1|deconv_layers\.0\.conv_offset_mask|dla_up\.ida_0)\.",
)
DROPPED = r"(base\.(fc|level[34]\.project)|wh|fg|border_hm)\..*"
"""DLA's ImageNet classes and two projections that nothing reads; boxes (CenterNet) and foregrounds (the first CenterPoly)."""
DLA_FINGERPRINT = (r"base_layer\.0\.weight", r"level2\.tree1\.conv1\.weight")
DLA_DROPPED = r"(fc|level[34]\.project)\..*"
"""Of the ImageNet files of DLA-34."""

centerpoly_to_ours, ours_to_centerpoly = renamer(_PAIRS), renamer(_PAIRS, backwards=True)
"""Of one key; values: `values_to_ours`, `values_to_theirs`."""

_STACK = re.compile(r"(?:kps|cnvs|inters|inters_|cnvs_|hm|poly|pseudo_depth|reg)\.(\d+)\.")
_BRANCH = re.compile(rf"({'|'.join(BRANCHES)})\.(\d+)\.(0\.conv|1)\.")
_PLAIN_BRANCH = re.compile(rf"(?:deep\.(\d+)\.)?({'|'.join(BRANCHES)})\.([02])\.")
_LAYERS = {"0.conv": "0", "1": "2"}
"""Of a branch: its two convolutions under a hourglass, and elsewhere."""


def _stacks(keys: Iterable[str]) -> int:
    """Return the number of hourglasses that a network of these keys has, ours or theirs; 0 if it is of another family."""
    found = (re.match(r"(?:encoder\.)?kps\.(\d+)\.", key) for key in keys)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def without_later_stacks(weights: Mapping[str, Tensor], own: Iterable[str]) -> Mapping[str, Tensor]:
    """Leave out what belongs to stacks that the model has not; under their names.

    Args:
        weights: official key -> value.
        own: the model's keys under our names.
    """
    stacks = _stacks(own)
    if not 0 < stacks < _stacks(weights):
        return weights

    def belongs(key: str) -> bool:
        match = _STACK.match(key)
        between = key.startswith(("inters", "cnvs_"))  # layers i lead from stack i to i + 1
        return match is None or int(match[1]) + between < stacks

    return {key: value for key, value in weights.items() if belongs(key)}


def values_to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the branches of a hourglass as those of the other families, earlier stacks' under ``deep.i.``; else as they are."""
    stacks = _stacks(weights)

    def rename(match: re.Match) -> str:
        name, stack, layer = match.groups()
        deep = f"deep.{stack}." if int(stack) < stacks - 1 else ""
        return f"{deep}{name}.{_LAYERS[layer]}."

    return {_BRANCH.sub(rename, key, count=1) if stacks else key: value for key, value in weights.items()}


def values_to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `values_to_ours`; under their names."""
    stacks = _stacks(weights)
    layers = {plain: layer for layer, plain in _LAYERS.items()}

    def rename(match: re.Match) -> str:
        stack, name, layer = match.groups()
        return f"{name}.{stack or stacks - 1}.{layers[layer]}."

    return {_PLAIN_BRANCH.sub(rename, key, count=1) if stacks else key: value for key, value in weights.items()}
