"""What a measured case of an operator is."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor


@dataclass(frozen=True)
class OpCase:
    """An operator, the formulation it is held against, and inputs.

    Attributes:
        op: name that ``--op`` takes.
        shape: the inputs in words.
        baseline: the other formulation in words.
        inputs: draws the arguments of both; floats in float32.
        ours, theirs: return one tensor.
        trained: positions of the arguments that get gradients in the backward pass.
        flops: floating-point operations, a multiplication and an addition each counted, of the forward pass and of
            both passes, from the arguments; (0, 0) where no number would say anything.
        devices: where the case is measured; ``("cuda",)`` for shapes that a CPU would take minutes for.
    """

    op: str
    shape: str
    baseline: str
    inputs: Callable[[Generator], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    trained: tuple[int, ...]
    flops: Callable[..., tuple[int, int]] = lambda *arguments: (0, 0)
    devices: tuple[str, ...] = ("cpu", "cuda")


__all__ = ["OpCase"]
