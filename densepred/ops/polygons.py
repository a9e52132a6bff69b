"""Polygons as networks describe them: vertices, polar coordinates, radii at fixed angles; all relative to a centre.

Letters: V vertices; leading axes are free. x points right, y down, so angles run clockwise on the screen, from 0 right
of the centre. CenterPoly v2 (github.com/KatiaJDL/CenterPoly-v2, commit 4b5164f) names the three ``cartesian``, ``polar``
and ``polar_fixed``; what differs, and why:

* its angles are an arc tangent with 1e-8 added to both sides, which moves a vertex above or below the centre by up to
  1e-8 radians times 1 / r; here `torch.atan2` is the exact inverse;
* its radii at fixed angles are those of vertices that lie at other angles, read in the other direction; here
  `cast_radii` measures them where `radii_to_cartesian` puts them.
"""

import math

import torch
from torch import Tensor

COORDINATES = {"cartesian": 2, "polar": 2, "fixed_angles": 1}
"""Coordinate systems and how many numbers a vertex takes in each: (x, y), (r, theta), r."""


def require_coordinates(coordinates: str) -> str:
    """Return the argument.

    Raises:
        ValueError: it is none of `COORDINATES`.
    """
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates={coordinates!r}: polygons know {', '.join(map(repr, COORDINATES))}")
    return coordinates


def encode_polygons(vertices: Tensor, coordinates: str) -> Tensor:
    """Describe polygons in one of the coordinate systems.

    Args:
        vertices: (..., V, 2), x and y relative to the centre.
        coordinates: one of `COORDINATES`.

    Returns:
        (..., V, 2), or (..., V) for ``fixed_angles``: radii at V angles, see `cast_radii`.
    """
    if require_coordinates(coordinates) == "cartesian":
        return vertices
    return cartesian_to_polar(vertices) if coordinates == "polar" else cast_radii(vertices, vertices.shape[-2])


def decode_polygons(code: Tensor, coordinates: str) -> Tensor:
    """Return the vertices (..., V, 2) relative to the centre; the inverse of `encode_polygons`.

    For ``fixed_angles`` it is an inverse of radii, not of vertices: polygons become star-shaped around the centre.
    """
    if require_coordinates(coordinates) == "cartesian":
        return code
    return polar_to_cartesian(code) if coordinates == "polar" else radii_to_cartesian(code)


def cartesian_to_polar(vertices: Tensor) -> Tensor:
    """Return (r, theta) of (x, y), both (..., 2); theta in [0, 2 pi], 0 for a vertex at the centre."""
    x, y = vertices.unbind(-1)
    angles = torch.atan2(y, x)
    return torch.stack([torch.hypot(x, y), torch.where(angles < 0, angles + 2 * math.pi, angles)], -1)


def polar_to_cartesian(polar: Tensor) -> Tensor:
    """Return (x, y) of (r, theta), both (..., 2); any angle, and a negative radius lies opposite."""
    radii, angles = polar.unbind(-1)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], -1)


def fixed_angles(num_vertices: int, like: Tensor) -> Tensor:
    """Return the angles (V,) in radians, 2 pi k / V, in the type and on the device of ``like``."""
    steps = torch.arange(num_vertices, dtype=torch.float64, device=like.device)
    return (steps * (2 * math.pi / num_vertices)).to(like.dtype)


def radii_to_cartesian(radii: Tensor) -> Tensor:
    """Return the vertices (..., V, 2) of radii (..., V) at `fixed_angles`."""
    angles = fixed_angles(radii.shape[-1], radii)
    return radii[..., None] * torch.stack([angles.cos(), angles.sin()], -1)


def cast_radii(vertices: Tensor, num_rays: int) -> Tensor:
    """Measure from the centre to the outline of polygons, along rays at `fixed_angles`.

    Of several hits the farthest counts, so that a polygon that is not star-shaped stays inside what is drawn; a ray
    without a hit, from a centre outside of the polygon, has radius 0.

    Args:
        vertices: (..., V, 2) relative to the centre.
        num_rays: R.

    Returns:
        (..., R), not negative.
    """
    angles = fixed_angles(num_rays, vertices)
    x, y = vertices[..., None].unbind(-2)  # (..., V, 1)
    along, aside = x * angles.cos() + y * angles.sin(), y * angles.cos() - x * angles.sin()  # (..., V, R)
    next_along, next_aside = along.roll(-1, -2), aside.roll(-1, -2)
    on_ray = (aside == 0) & (next_aside == 0)
    part = aside / torch.where(aside == next_aside, 1.0, aside - next_aside)
    hit = torch.where(on_ray, torch.maximum(along, next_along), along + part * (next_along - along))
    return torch.where(aside * next_aside <= 0, hit, 0.0).clamp(min=0).amax(-2)


def signed_area(vertices: Tensor) -> Tensor:
    """Return the area (...) of polygons (..., V, 2) in squared units, positive where they run clockwise on the screen.

    Loops of a polygon that crosses itself count by their direction; `densepred.ops.polygon_iou` counts them even-odd.
    """
    x, y = vertices.unbind(-1)
    return (x * y.roll(-1, -1) - x.roll(-1, -1) * y).sum(-1) / 2
