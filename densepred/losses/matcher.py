"""Bipartite matching of queries and targets."""

import torch
from torch import Tensor


def hungarian_match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Match every target with another query so that the sum of the costs is least (SciPy's solver, on the CPU).

    Args:
        cost: (Q, N) of any float type and device; either side may be 0.

    Returns:
        Query and target numbers, each (M,) int64 on ``cost``'s device, M = min(Q, N), targets ascending.

    Raises:
        FloatingPointError: a cost is NaN or infinite.
    """
    from scipy.optimize import linear_sum_assignment

    table = cost.detach().double().cpu()  # (Q, N)
    _check_finite(table)
    targets, queries = linear_sum_assignment(table.T.numpy())
    return torch.as_tensor(queries, device=cost.device), torch.as_tensor(targets, device=cost.device)


def _check_finite(cost: Tensor) -> None:
    bad = (~cost.isfinite()).nonzero()
    if len(bad):
        query, target = bad[0].tolist()
        raise FloatingPointError(
            f"matching cost: {len(bad)} of {cost.numel()} values are not finite, the first is {cost[query, target]} at "
            f"query {query}, target {target}; the predictions hold NaN or Inf (lower the learning rate?)"
        )
