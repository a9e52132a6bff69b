"""Coordinate systems of polygons: inverses, rays, conventions."""

import math

import numpy as np
import pytest
import torch

from densepred.ops.polygons import (
    COORDINATES,
    cartesian_to_polar,
    cast_radii,
    decode_polygons,
    encode_polygons,
    fixed_angles,
    polar_to_cartesian,
    signed_area,
)
from tests import parity

SQUARE = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64)  # clockwise on the screen


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape))


@pytest.mark.parametrize("coordinates", ["cartesian", "polar"])
@pytest.mark.parametrize("num_vertices", [3, 8, 64])
def test_decoding_inverts_encoding(coordinates, num_vertices):
    vertices = drawn(2, 5, num_vertices, 2)
    code = encode_polygons(vertices, coordinates)
    assert code.shape == vertices.shape
    torch.testing.assert_close(decode_polygons(code, coordinates), vertices, rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_vertices", [3, 8, 16, 64])
def test_rays_find_the_radii_that_made_a_polygon(num_vertices):
    radii = 0.2 + drawn(3, 4, num_vertices).abs()
    vertices = decode_polygons(radii, "fixed_angles")
    assert vertices.shape == (3, 4, num_vertices, 2)
    torch.testing.assert_close(encode_polygons(vertices, "fixed_angles"), radii, rtol=0, atol=1e-13)
    torch.testing.assert_close(encode_polygons(vertices.flip(-2), "fixed_angles"), radii, rtol=0, atol=1e-13)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_decoding_has_gradients_and_keeps_the_type(coordinates):
    code = drawn(2, 6, COORDINATES[coordinates]).squeeze(-1).requires_grad_()
    assert decode_polygons(code.float(), coordinates).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda c: decode_polygons(c, coordinates), (code,))


def test_polar_conventions():
    polar = cartesian_to_polar(
        torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0, -2], [-1, -1], [0, 0]], dtype=torch.float64)
    )
    angles = torch.tensor([0, 0.5, 1, 1.5, 1.25, 0], dtype=torch.float64) * math.pi  # y down: clockwise on the screen
    torch.testing.assert_close(polar[:, 1], angles, rtol=0, atol=1e-15)
    torch.testing.assert_close(polar[:5, 0], torch.tensor([2, 2, 2, 2, math.sqrt(2)], dtype=torch.float64))
    opposite = polar_to_cartesian(torch.tensor([[-2.0, 0.0]]))
    torch.testing.assert_close(opposite, torch.tensor([[-2.0, 0.0]]))


def test_polar_targets_of_the_official_loader():
    """Up to the 1e-8 that it adds on both sides of its arc tangent."""
    _, case = parity.case(parity.CASES / "centerpoly_losses")
    kept = case["in_reg_mask"] > 0
    cartesian, polar = (
        torch.from_numpy(case[f"in_target_{k}"][kept]).unflatten(1, (-1, 2)) for k in ("cartesian", "polar")
    )
    torch.testing.assert_close(cartesian_to_polar(cartesian), polar, rtol=0, atol=1e-7)


def test_rays_on_a_square():
    diagonal = math.sqrt(2)
    expected = torch.tensor([1, diagonal] * 4, dtype=torch.float64)
    torch.testing.assert_close(cast_radii(SQUARE, 8), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(cast_radii(SQUARE.repeat(2, 3, 1, 1), 4), torch.ones(2, 3, 4, dtype=torch.float64))


def test_rays_meet_the_farthest_outline_and_miss_what_lies_aside():
    outside = cast_radii(SQUARE + torch.tensor([3.0, 0.0]), 4)  # the centre lies left of the square
    assert outside.tolist() == [4, 0, 0, 0]
    along = cast_radii(torch.tensor([[1.0, 0], [3, 0], [3, 1]]), 4)  # an edge on the ray
    assert along.tolist() == [3, 0, 0, 0]
    comb = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [2, 1], [2, -1], [3, -1], [3, 2], [-1, 2]])
    assert cast_radii(comb, 4)[0] == 3
    assert cast_radii(torch.zeros(2, 5, 2), 4).tolist() == [[0] * 4] * 2


def test_radii_are_those_of_points_on_the_outline():
    """By brute force: dense points along every edge, the farthest near each ray's direction."""
    vertices = 3 * drawn(7, 2, seed=4)
    steps = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:, None, None]
    points = (vertices + steps * (vertices.roll(-1, 0) - vertices)).flatten(0, 1)
    polar = cartesian_to_polar(points)
    for angle, radius in zip(fixed_angles(5, vertices), cast_radii(vertices, 5), strict=True):
        near = ((polar[:, 1] - angle + math.pi) % (2 * math.pi) - math.pi).abs() < 1e-4
        assert radius.item() == pytest.approx(polar[near, 0].max().item() if near.any() else 0, abs=0.02)


def test_area_has_the_sign_of_the_direction():
    assert signed_area(SQUARE) == 4
    assert signed_area(SQUARE.flip(0)) == -4
    assert signed_area((SQUARE + 7).expand(2, 3, 4, 2)).tolist() == [[4] * 3] * 2
    assert signed_area(SQUARE[[0, 2, 1, 3]]) == 0


def test_unknown_coordinates_are_named():
    for convert in (encode_polygons, decode_polygons):
        with pytest.raises(ValueError, match=r"'polar_fixed'.*'cartesian', 'polar', 'fixed_angles'"):
            convert(SQUARE, "polar_fixed")
