"""How kernels are proved: against the eager form in float64 on the rounded inputs, on a GPU or in Triton's interpreter."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels run; on a CPU in the interpreter, which `conftest` has switched on."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DTYPES = tuple(TOLERANCES)
RANDOM_SHAPES = settings(
    max_examples=200 if DEVICE.type == "cuda" else 12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""For `hypothesis.given`: as many shapes as the interpreter has time for, on a GPU more."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the L2 norm of the difference relative to the exact one's; infinite where a number is none."""
    exact = exact.double()
    difference = (found.double() - exact).norm()
    error = float(difference / exact.norm()) if exact.norm() > 0 else float(difference)
    return error if error == error else float("inf")


def results(op: Callable[..., Tensor], arguments: Sequence, trained: Sequence[int], slope: Tensor) -> list[Tensor]:
    """Return the output of an op and the gradients of (output * slope).sum() by the trained arguments."""
    leaves = [value.detach().requires_grad_() if i in trained else value for i, value in enumerate(arguments)]
    out = op(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [leaves[i] for i in trained], slope.to(out))]


def check_kernel(
    op: Callable[..., Tensor],
    arguments: Sequence,
    trained: Sequence[int],
    dtype: torch.dtype,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Hold an op's kernel, forward and every gradient, against its eager form in float64.

    Args:
        op: returns one tensor.
        arguments: of the op; its float tensors are rounded to ``dtype`` first.
        trained: the positions of those that get gradients.
        dtype: what the kernel computes in.
        tolerance: of the norm-wise relative error; None: that of `TOLERANCES`.
        seed: of the output's gradient.
    """
    rounded = [
        value.to(DEVICE, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for value in arguments
    ]
    doubled = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in rounded]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSEPRED_OPS", "eager")
        shape = op(*doubled).shape
        slope = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
        expected = results(op, doubled, trained, slope)
        patch.setenv("DENSEPRED_OPS", "triton")
        poison_new_tensors(patch)
        found = results(op, rounded, trained, slope)
    names = ["output", *(f"gradient of argument {i}" for i in trained)]
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    for name, got, exact in zip(names, found, expected, strict=True):
        assert got.shape == exact.shape, (name, got.shape, exact.shape)
        error = relative_error(got, exact)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.0e}"


def poison_new_tensors(patch: pytest.MonkeyPatch) -> None:
    """Let memory that nobody has written hold NaN (the least integer), so that a forgotten element shows."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments, **options) -> Tensor:
            tensor = function(*arguments, **options)
            if tensor.is_meta or tensor.requires_grad or not tensor.numel():
                return tensor
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        patch.setattr(owner, name, poisoned(getattr(owner, name)))
