"""CenterPoly's head: a heat map of centres, and at each centre a polygon, a sub-cell offset and a place in the depth order.

CenterPoly v2 (Jodogne-del Litto and Bilodeau, "Real-time instance segmentation with polygons using an
Intersection-over-Union loss", 2023; github.com/KatiaJDL/CenterPoly-v2), on CenterNet (arXiv:1904.07850). Reads the
decoder's finest map, published at stride 4; earlier maps of a stacked encoder get branches of their own in training.

What differs, and why:

* the region term is an exact intersection over union unless the published formula is asked for;
* radii at fixed angles are trained towards rays cast through the true outline, and drawn where the rays are;
* its exact region term compares with the true outline in every coordinate system.
"""

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.heads.polygon_inference import Detections, decode, to_file
from densepred.heads.polygon_masks import RULES, compose_masks
from densepred.heads.polygon_targets import PolygonTargets, flood, polygon_targets, trained_objects
from densepred.losses.polygon import (
    REGIONS,
    centre_l1_loss,
    heatmap_focal_loss,
    order_loss,
    polygon_l1_loss,
    polygon_relu_loss,
    polygon_smooth_l1_loss,
    region_loss,
    shift_angles,
)
from densepred.ops.polygons import COORDINATES, decode_polygons, encode_polygons, require_coordinates
from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import Features, SegSample

WEIGHTS = dict(heatmap=1.0, offset=1.0, polygon=1.0, region=1.0, order=0.0, depth=0.1)
"""Weights of the losses where a config names none: CenterPoly v2's for Cityscapes and IDD; KITTI has depth=0."""
POLYGON_LOSSES = dict(l1=polygon_l1_loss, smooth_l1=polygon_smooth_l1_loss, relu=polygon_relu_loss)
ORACLE = dict(heatmap="heatmap_logits", offset="offset", polygon="polygon", depth="pseudo_depth")
"""What the oracle protocol can replace by the ground truth, and the outputs it stands in."""
HEATMAP_BIAS = -2.19
"""Of the last convolution: every cell starts at probability 0.1."""


def branches(in_channels: int, channels: int, num_classes: int, polygon_channels: int) -> dict[str, nn.Sequential]:
    """Return the four branches by name, each 3x3 convolution, ReLU, 1x1 convolution, without norms."""
    widths = dict(heatmap=num_classes, polygon=polygon_channels, pseudo_depth=1, offset=2)
    made = {
        name: nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, width, 1))
        for name, width in widths.items()
    }
    nn.init.constant_(made["heatmap"][-1].bias, HEATMAP_BIAS)
    return made


@MODELS.register_module()
class PolygonHead(nn.Module):
    """Predict instances as polygons around centres.

    Args:
        in_channels: of ``Features.pixels``.
        level_channels, encoder_channels: not read.
        num_classes: C; every class is one of things.
        deep_channels: of ``Features.deep``, shallowest first; the losses are means over these and ``pixels``.
        num_vertices: V, at least 3.
        coordinates: ``cartesian`` (x, y), ``polar`` (r, theta) or ``fixed_angles`` (r), see `densepred.ops.polygons`.
        head_channels: hidden channels of a branch.
        polygon_loss: ``l1``, ``smooth_l1``, ``relu`` (errors below 20 cells are free) or None.
        region: ``exact``, the IoU loss; ``published`` or ``published_9913da9``, the repository's formulas; None.
        weights: of the losses by name, replacing some of `WEIGHTS`; 0 leaves a loss out. ``order`` is for ``polar`` only.
        elliptical: the heat map's Gaussians follow the boxes' shapes; else they are round.
        max_objects: of an image in training, see `polygon_targets`.
        top_k: detections of an image before the threshold.
        compose: None: `predict` delivers polygons only. A rule of `densepred.heads.polygon_masks.RULES`: masks too, and of
            the detections those that the rule writes.
        score_threshold: least score of a detection, 0..1.
        oracle: of ``heatmap``, ``offset``, ``polygon`` and ``depth``, what `apply_oracle` replaces by the ground truth.

    Raises:
        ValueError: a name or number beyond the above, or a loss whose coordinate system or branch is another.
    """

    thing_classes = None  # all are

    def __init__(
        self,
        in_channels: int,
        level_channels: Sequence[int],
        encoder_channels: Sequence[int],
        num_classes: int,
        deep_channels: Sequence[int] = (),
        num_vertices: int = 16,
        coordinates: str = "cartesian",
        head_channels: int = 256,
        polygon_loss: str | None = "l1",
        region: str | None = "exact",
        weights: dict[str, float] | None = None,
        elliptical: bool = True,
        max_objects: int = 128,
        top_k: int = 128,
        compose: str | None = None,
        score_threshold: float = 0.05,
        oracle: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if num_vertices < 3:
            raise ValueError(f"head.num_vertices={num_vertices}: a polygon has at least 3")
        _require_known("weights", weights or {}, WEIGHTS)
        _require_known("polygon_loss", [polygon_loss] if polygon_loss else [], POLYGON_LOSSES)
        _require_known("region", [region] if region else [], REGIONS)
        _require_known("compose", [compose] if compose else [], RULES)
        _require_known("oracle", oracle, ORACLE)
        self.num_classes, self.num_vertices, self.coordinates = (
            num_classes,
            num_vertices,
            require_coordinates(coordinates),
        )
        self.polygon_loss, self.region = polygon_loss, region
        self.weights = {**WEIGHTS, **(weights or {})}
        if self.weights["order"] and coordinates != "polar":
            raise ValueError(
                f"head.weights.order needs coordinates='polar', which have angles, not {coordinates!r}: set it to 0"
            )
        if region == "published" and coordinates == "fixed_angles":
            raise ValueError(
                "head.region='published' needs an angle a vertex: take 'exact' with coordinates='fixed_angles'"
            )
        self.elliptical, self.max_objects, self.top_k = elliptical, max_objects, top_k
        self.compose, self.score_threshold, self.oracle = compose, score_threshold, tuple(oracle)
        widths = (head_channels, num_classes, num_vertices * COORDINATES[coordinates])
        for name, branch in branches(in_channels, *widths).items():
            self.add_module(name, branch)
        self.deep = nn.ModuleList(nn.ModuleDict(branches(channels, *widths)) for channels in deep_channels)

    def forward(self, features: Features, deep_supervision: bool = True) -> dict:
        """Return the maps, all at the size (h, w) of what they are made from.

        Returns:
            ``heatmap_logits`` (B, C, h, w), ``polygon`` (B, 2V or V, h, w), relative to the centre in cells,
            ``offset`` (B, 2, h, w) xy and ``pseudo_depth`` (B, 1, h, w). With ``deep_supervision`` and deep maps also
            ``aux_outputs``, a list of such dicts, one a deep map.
        """
        outputs = _maps(dict(self.named_children()), features.pixels)
        if deep_supervision and len(self.deep):
            outputs["aux_outputs"] = [_maps(made, x) for made, x in zip(self.deep, features.deep, strict=True)]
        return outputs

    def loss(self, outputs: dict, samples: list[SegSample]) -> dict[str, Tensor]:
        """Return the weighted losses: ``loss_heatmap``, ``_offset``, ``_polygon``, ``_region``, ``_order`` and ``_depth``.

        Those that have no weight or are None are left out. Without an object all but the first are 0.

        Args:
            outputs: of `forward` with deep supervision.
            samples: with ``gt_polygons`` and ``pad_shape``, see `polygon_targets`.

        Raises:
            ValueError: what `polygon_targets` raises.
        """
        targets = self._targets(outputs, samples)
        stacks = [outputs, *outputs.get("aux_outputs", [])]
        terms = [self._terms({k: upcast(v) for k, v in maps.items() if k != "aux_outputs"}, targets) for maps in stacks]
        return {f"loss_{name}": sum(each[name] for each in terms) / len(terms) for name in terms[0]}

    def _targets(self, outputs: dict, samples: list[SegSample]) -> PolygonTargets:
        maps = upcast(outputs["heatmap_logits"])
        size = tuple(maps.shape[-2:])
        options = dict(max_objects=self.max_objects, elliptical=self.elliptical, dtype=maps.dtype)
        stride = strides(samples[0].metainfo, size)
        return polygon_targets(samples, size, stride, self.num_classes, self.num_vertices, **options)

    def _terms(self, maps: dict[str, Tensor], targets: PolygonTargets) -> dict[str, Tensor]:
        """Return the weighted losses of one stack."""
        code = encode_polygons(targets.vertices, self.coordinates)  # (N, V, 2 or none)
        kept = trained_objects(code, self.coordinates)
        images, cells = targets.images[kept], targets.cells[kept]
        offset, depth, polygon = (
            maps[name].flatten(2)[images, :, cells] for name in ("offset", "pseudo_depth", "polygon")
        )  # (N, 2), (N, 1), (N, 2V or V)
        polygon, code = polygon.unflatten(1, code.shape[1:]), code[kept]
        terms = dict(
            heatmap=lambda: heatmap_focal_loss(maps["heatmap_logits"], targets.heatmaps),
            offset=lambda: centre_l1_loss(offset, targets.offsets[kept]),
            depth=lambda: centre_l1_loss(depth, targets.depths[kept, None]),
        )
        if self.polygon_loss:
            terms["polygon"] = lambda: POLYGON_LOSSES[self.polygon_loss](self._ordered(polygon), code, self.coordinates)
        if self.region:
            terms["region"] = lambda: self._region(polygon, code, targets.vertices[kept])
        if self.weights["order"]:
            terms["order"] = lambda: order_loss(polygon[..., 1])
        return {name: self.weights[name] * term() for name, term in terms.items() if self.weights[name]}

    def _ordered(self, polygon: Tensor) -> Tensor:
        """With the order loss, whose angles the published L1 sees as that loss shifts them, the same; else the argument."""
        if not self.weights["order"]:
            return polygon
        return torch.stack([polygon[..., 0], shift_angles(polygon[..., 1])], -1)

    def _region(self, polygon: Tensor, code: Tensor, vertices: Tensor) -> Tensor:
        if self.region == "exact":
            return region_loss(decode_polygons(polygon, self.coordinates), vertices)
        return region_loss(polygon, code, self.coordinates, self.region)

    def predict(self, outputs: dict, metas: list[dict]) -> list[dict]:
        """Return ``dict(pred_instances=InstanceData)`` for every image, best scores first.

        It holds ``polygons`` (N, V, 2) xy in pixels of the file, not clipped to it, ``labels`` (N,), ``scores`` (N,),
        ``depths`` (N,), lower = nearer, ``bboxes`` (N, 4) xyxy around the vertices, and with ``compose`` ``masks``
        (N, H, W) bool at the file's size.

        Args:
            outputs: of `forward`.
            metas: per image ``pad_shape`` and ``ori_shape``, and ``affine`` or ``img_shape``, see `to_file`.
        """
        maps = [upcast(outputs[name]) for name in ("heatmap_logits", "offset", "polygon", "pseudo_depth")]
        found = decode(maps[0].sigmoid(), *maps[1:], self.top_k, self.coordinates)
        size = tuple(maps[0].shape[-2:])
        return [dict(pred_instances=self._instances(found, i, size, meta)) for i, meta in enumerate(metas)]

    def _instances(self, found: Detections, index: int, size: tuple[int, int], meta: dict) -> InstanceData:
        scores = found.scores[index]
        good = ((scores >= self.score_threshold) & (scores > 0)).nonzero()[:, 0]
        polygons = to_file(found.polygons[index, good], meta, strides(meta, size))  # (N, V, 2)
        fields = dict(
            polygons=polygons,
            labels=found.labels[index, good],
            scores=scores[good],
            depths=found.depths[index, good],
            bboxes=torch.cat([polygons.amin(1), polygons.amax(1)], 1),
        )
        if self.compose is None:
            return InstanceData(**fields)
        parts = [fields[name] for name in ("polygons", "scores", "depths", "labels")]
        masks, kept = compose_masks(*parts, tuple(meta["ori_shape"]), self.compose, self.score_threshold)
        return InstanceData(**fields, masks=masks)[kept]

    def apply_oracle(self, outputs: dict, samples: list[SegSample]) -> dict:
        """Return the outputs with the maps that ``oracle`` names replaced by the ground truth's.

        The heat map becomes the target's, every other map the value of the nearest object, see `flood`.

        Args:
            outputs: of `forward`.
            samples: as for `loss`, at prediction too: the test pipeline must load polygons.
        """
        targets = self._targets(outputs, samples)
        values = dict(
            offset=targets.offsets,
            polygon=encode_polygons(targets.vertices, self.coordinates).flatten(1),
            depth=targets.depths[:, None],
        )
        size = tuple(targets.heatmaps.shape[-2:])
        truth = {}
        for name in self.oracle:
            if name == "heatmap":
                truth[ORACLE[name]] = targets.heatmaps.logit()
            else:
                of_image = [targets.images == i for i in range(len(samples))]
                truth[ORACLE[name]] = torch.stack(
                    [flood(values[name][own], targets.cells[own], size) for own in of_image]
                )
        return outputs | truth


def _maps(made: dict[str, nn.Module] | nn.ModuleDict, x: Tensor) -> dict[str, Tensor]:
    """Return what the four branches make of a map (B, D, h, w), by output name."""
    return {output: made[output.removesuffix("_logits")](x) for output in ORACLE.values()}


def strides(meta: dict, size: tuple[int, int]) -> tuple[float, float]:
    """Return how many pixels of the padded input a cell of a map of ``size`` (h, w) covers, (y, x)."""
    return meta["pad_shape"][0] / size[0], meta["pad_shape"][1] / size[1]


def _require_known(option: str, names: Sequence[str] | dict, known: Sequence[str] | dict) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"head.{option} names {name!r}{nearest(name, known)}")
