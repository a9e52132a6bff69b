"""Bipartite matching of queries and targets."""

import torch
from torch import Tensor


def hungarian_match(cost: Tensor, place: str = "") -> tuple[Tensor, Tensor]:
    """Match every target with another query so that the sum of the costs is least (SciPy's solver, on the CPU).

    Args:
        cost: (Q, N) of any float type and device; either side may be 0.
        place: where the costs come from, for the message, e.g. "aux_outputs[3], image 0".

    Returns:
        Query and target numbers, each (M,) int64 on ``cost``'s device, M = min(Q, N), targets ascending.

    Raises:
        FloatingPointError: a cost is NaN or infinite.
    """
    from scipy.optimize import linear_sum_assignment

    table = cost.detach().double().cpu()  # (Q, N)
    _check_finite(table, place)
    targets, queries = linear_sum_assignment(table.T.numpy())
    return torch.as_tensor(queries, device=cost.device), torch.as_tensor(targets, device=cost.device)


def _check_finite(cost: Tensor, place: str) -> None:
    bad = (~cost.isfinite()).nonzero()
    if len(bad):
        query, target = bad[0].tolist()
        raise FloatingPointError(
            f"matching cost{f' ({place})' if place else ''}: {len(bad)} of {cost.numel()} values are not finite, the "
            f"first is {cost[query, target]} at query {query}, target {target}; the predictions hold NaN or Inf (lower "
            "the learning rate, or train in float32 or bfloat16 instead of float16)"
        )
