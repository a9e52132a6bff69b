"""Parameter names of the three published UNet++ networks, and ours of the same networks.

* The official PyTorch one, six levels: ``locZ.K`` and ``upZ.K`` make X^{4-Z-K,K+1}; ``seg_outputs.4`` classifies X^{0,1} and
  ``seg_outputs.0`` X^{0,5}.
* The Keras one, five levels, by its layers' names, which count from one: ``conv13_2`` is the second convolution of X^{0,2}.
  The names end in ``.weight`` and ``.bias`` and the kernels have PyTorch's layout, which for convolutions and transposed
  ones alike is Keras's with the axes transposed by (3, 2, 0, 1).
* segmentation_models_pytorch over a ResNet: ``decoder.blocks.x_D_L`` makes X^{i,L-D+1} where i counts from the other end: the
  name alone does not say which node that is, the file does.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from densepred.engine.mapping_mask2former import renamer
from densepred.engine.mapping_mmsegmentation import RESNET

Pairs = tuple[tuple[str, str], ...]

NNUNET_DEPTH, KERAS_DEPTH = 5, 4
"""d of the two networks, which both code bases fix."""


def _unit(theirs: str, ours: str) -> Pairs:
    return (f"{theirs}conv.", f"{ours}conv."), (f"{theirs}instnorm.", f"{ours}norm.")


def _classifier(j: int, depth: int) -> str:
    return "head.classifier." if j == depth else f"head.deep_classifiers.{j - 1}."


def _nnunet() -> Iterable[tuple[str, str]]:
    for k in range(2):
        for i in range(NNUNET_DEPTH):
            yield from _unit(f"conv_blocks_context.{i}.blocks.{k}.", f"encoder.level{i}.conv{k + 1}.")
        yield from _unit(f"conv_blocks_context.5.{k}.blocks.0.", f"encoder.level5.conv{k + 1}.")
    for j in range(1, NNUNET_DEPTH + 1):
        yield f"seg_outputs.{NNUNET_DEPTH - j}.", _classifier(j, NNUNET_DEPTH)
        for i in range(NNUNET_DEPTH + 1 - j):
            nest, node = f"{NNUNET_DEPTH - i - j}.{j - 1}.", f"decoder.nodes.x{i}_{j}."
            yield f"up{nest}", f"{node}up."
            for k in range(2):
                yield from _unit(f"loc{nest}{k}.blocks.0.", f"{node}block.conv{k + 1}.")


def _keras() -> Iterable[tuple[str, str]]:
    for i in range(KERAS_DEPTH + 1):
        for j in range(KERAS_DEPTH + 1 - i):
            node = f"decoder.nodes.x{i}_{j}."
            block = f"{node}block." if j else f"encoder.level{i}."
            for k in (1, 2):
                yield f"conv{i + 1}{j + 1}_{k}.", f"{block}conv{k}.conv."
            if j:
                yield f"up{i + 1}{j + 1}.", f"{node}up."
    for j in range(1, KERAS_DEPTH + 1):
        yield f"output_{j}.", _classifier(j, KERAS_DEPTH)


NNUNET: Pairs = tuple(_nnunet())
KERAS: Pairs = tuple(_keras())
SMP: Pairs = (
    # mmsegmentation names a ResNet with a plain stem as torchvision does.
    *((f"encoder.{theirs}", f"encoder.{ours}") for theirs, ours in RESNET if not theirs.startswith("stem.")),
    ("segmentation_head.0.", "head.classifier."),
)

nnunet_to_ours, ours_to_nnunet = renamer(NNUNET), renamer(NNUNET, backwards=True)
keras_to_ours, ours_to_keras = renamer(KERAS), renamer(KERAS, backwards=True)
smp_to_ours, ours_to_smp = renamer(SMP), renamer(SMP, backwards=True)

NNUNET_FINGERPRINT = (r"conv_blocks_context\.0\.blocks\.0\.conv\.", r"loc4\.0\.0\.blocks\.0\.", r"seg_outputs\.0\.")
KERAS_FINGERPRINT = (r"conv11_1\.weight", r"conv15_2\.weight", r"up12\.weight", r"output_4\.weight")
SMP_FINGERPRINT = (r"encoder\.conv1\.weight", r"decoder\.blocks\.x_0_0\.conv1\.0\.weight", r"segmentation_head\.0\.")

_OURS = re.compile(r"encoder\.(level|stem|res)|decoder\.(nodes|final)\.|head\.")
"""Starts of our names that no network of the three has."""

_SMP_NODE = re.compile(r"decoder\.blocks\.x_(\d)_(\d)\.conv([12])\.([01])\.")
_OUR_NODE = re.compile(r"decoder\.(?:nodes\.x(\d)_(\d)\.block|final)\.conv([12])\.(conv|norm)\.")
_LAYERS = ("conv", "norm")


def smp_values_to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the decoder's nodes as ours; how many levels there are shows in the block without a skip, ``x_0_d``."""
    depth = max((int(m[2]) for key in weights if (m := _SMP_NODE.match(key))), default=0)

    def rename(match: re.Match) -> str:
        first, level = int(match[1]), int(match[2])
        node = "final" if level == depth else f"nodes.x{depth - 1 - level}_{level - first + 1}.block"
        return f"decoder.{node}.conv{match[3]}.{_LAYERS[int(match[4])]}."

    return {_SMP_NODE.sub(rename, key): value for key, value in weights.items()}


def smp_values_to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name our decoder's nodes as segmentation_models_pytorch does; the inverse of `smp_values_to_ours`.

    Raises:
        ValueError: they are of no network that it can build: one with deep supervision, or from another stride than 2.
    """
    depth = max((int(m[2]) for key in weights if (m := _OUR_NODE.match(key)) and m[2]), default=0)

    def rename(match: re.Match) -> str:
        level = depth if match[1] is None else depth - 1 - int(match[1])
        first = 0 if match[1] is None else level + 1 - int(match[2])
        return f"decoder.blocks.x_{first}_{level}.conv{match[3]}.{_LAYERS.index(match[4])}."

    renamed = {_OUR_NODE.sub(rename, key): value for key, value in weights.items()}
    return _whole(renamed, "segmentation_models_pytorch", [f"decoder.blocks.x_0_{depth}.", "segmentation_head.0."])


def nnunet_values_to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as they are.

    Raises:
        ValueError: they are of no network that the official PyTorch code can build.
    """
    return _whole(weights, "the official PyTorch code", [theirs for theirs, _ in NNUNET])


def keras_values_to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights as they are; the classifiers of X^{0,1} .. X^{0,3} may be absent.

    Raises:
        ValueError: they are of no network that the official Keras code can build.
    """
    deep = {f"output_{j}." for j in range(1, KERAS_DEPTH)}
    return _whole(weights, "the official Keras code", [theirs for theirs, _ in KERAS if theirs not in deep])


def _whole(weights: Mapping[str, Tensor], code: str, needed: Iterable[str]) -> dict[str, Tensor]:
    foreign = [key for key in weights if _OURS.match(key)]
    missing = [start for start in needed if not any(key.startswith(start) for key in weights)]
    if foreign or missing:
        what = f"has no place for {foreign[0]}" if foreign else f"needs {missing[0]}*, which this model has not"
        raise ValueError(
            f"{code} {what}, {len(foreign) + len(missing)} such names in all: export a model with its encoder, style, number "
            "of levels and classifiers, or keep our own format"
        )
    return dict(weights)
