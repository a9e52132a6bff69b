from itertools import permutations

import pytest
import torch

from densepred.losses.matcher import hungarian_match


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (3, 5), (1, 1)])
def test_least_cost_of_all_matchings(shape):
    cost = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    query, target = hungarian_match(cost)
    assert query.dtype == target.dtype == torch.int64
    assert target.tolist() == sorted(set(target.tolist())) and len(set(query.tolist())) == min(shape)
    table = cost if shape[0] <= shape[1] else cost.T
    best = min(sum(table[i, j] for i, j in enumerate(p)) for p in permutations(range(max(shape)), min(shape)))
    assert torch.isclose(cost[query, target].sum(), best)


def test_takes_half_precision_and_gradients():
    cost = torch.tensor([[0.0, 3.0], [1.0, 0.0], [-2.0, 1.0]], dtype=torch.float16, requires_grad=True)
    query, target = hungarian_match(cost)
    assert (query.tolist(), target.tolist()) == ([2, 1], [0, 1])


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 0)])
def test_nothing_to_match(shape):
    query, target = hungarian_match(torch.zeros(shape))
    assert query.shape == target.shape == (0,)
    assert query.dtype == target.dtype == torch.int64


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_names_the_value_that_is_not_finite(value):
    cost = torch.zeros(3, 4)
    cost[1, 2] = float(value)
    with pytest.raises(
        FloatingPointError, match=f"1 of 12 values are not finite, the first is {value} at query 1, target 2"
    ):
        hungarian_match(cost)


def test_names_the_place_of_the_costs():
    with pytest.raises(
        FloatingPointError, match=r"^matching cost \(aux_outputs\[3\], image 5\): 1 of 1 values .* rate"
    ):
        hungarian_match(torch.tensor([[float("nan")]]), "aux_outputs[3], image 5")
