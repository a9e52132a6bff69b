"""kMaX-DeepLab's k-means mask transformer (ECCV 2022, arXiv:2207.04044, section 3).

Official code: bytedance/kmax-deeplab. Cluster centres (queries) are updated by two layers on each of three pixel decoder
maps, coarse to fine: every layer predicts masks with a complete predictor of its own, and the arg-max over the queries of
those masks is the k-means assignment. No positional encoding, no mask in the self-attention, no gradient through the
assignment.
"""

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.decoders.kmax import NUM_HEADS, ConvBN, batch_norm, truncated_normal_
from densepred.encoders.convnext import drop_path
from densepred.errors import nearest
from densepred.heads.aux_semantic import AUX_SEMANTIC_HEADS, classifier, depthwise_5x5
from densepred.heads.kmax_inference import (
    instance_inference,
    panoptic_inference,
    resize_mask_logits,
    semantic_inference,
)
from densepred.ops.kmeans_attention import kmeans_attention
from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import Features, PanopticMap, SegSample, segment_masks

VOID_PRIOR = 0.9
"""Probability of the void class that the constant on its logit stands for, all other logits being equal."""
TASKS = ("panoptic", "semantic", "instance")


class Predictor(nn.Module):
    """Classes of the queries, and masks as products of pixel features with the queries' kernels.

    Args:
        pixel_channels: channels of the pixel map.
        embed_dim: channels of the queries; pixel features and mask kernels have half as many.
        num_classes: C; the logits have C + 1 channels, void last.
        mask_scale: standard deviation that the mask logits start with.
    """

    def __init__(self, pixel_channels: int, embed_dim: int, num_classes: int, mask_scale: float = 0.1) -> None:
        super().__init__()
        self.pixel_depthwise = depthwise_5x5(pixel_channels)
        self.pixel_pointwise = ConvBN(pixel_channels, embed_dim, activate=True)
        self.pixel_project = ConvBN(embed_dim, embed_dim // 2, bias=True, std=0.01)
        self.mask_kernel = ConvBN(embed_dim, embed_dim // 2, dims=1)
        self.class_logits = classifier(embed_dim, num_classes + 1, dims=1)
        self.mask_norm = batch_norm(1, 2)
        nn.init.constant_(self.mask_norm.weight, mask_scale)
        self.void_bias = math.log(num_classes * VOID_PRIOR / (1 - VOID_PRIOR))

    def forward(self, pixels: Tensor, class_embedding: Tensor, mask_embedding: Tensor) -> dict[str, Tensor]:
        """Predict from pixels (B, C, h, w) and the embeddings (B, embed_dim, Q).

        Returns:
            ``pred_logits`` (B, Q, C + 1), ``pred_masks`` (B, Q, h, w), ``pixel_feature`` (B, D, h, w) of unit length.
        """
        feature = self.pixel_project(self.pixel_pointwise(self.pixel_depthwise(pixels)))
        feature = F.normalize(feature, dim=1)  # (B, D, h, w)
        logits = self.class_logits(class_embedding).transpose(1, 2)  # (B, Q, C + 1)
        logits = torch.cat([logits[..., :-1], logits[..., -1:] + self.void_bias], dim=-1)
        masks = torch.einsum("bdhw,bdq->bqhw", feature, self.mask_kernel(mask_embedding))
        # One statistic for all queries and pixels.
        masks = self.mask_norm(masks.flatten(1, 2)[:, None])[:, 0].unflatten(1, (-1, masks.shape[2]))
        return {"pred_logits": logits, "pred_masks": masks, "pixel_feature": feature}


class QuerySelfAttention(nn.Module):
    """Self-attention of the queries with BatchNorm on the logits in place of a scale."""

    def __init__(self, key_depth: int, value_depth: int) -> None:
        super().__init__()
        self.depths = (key_depth, key_depth, value_depth)
        self.similarity_norm = batch_norm(NUM_HEADS, 2)
        self.output_norm = batch_norm(value_depth, 1)

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend among the queries of (B, 2 key_depth + value_depth, Q); returns (B, value_depth, Q), activated."""
        q, k, v = (part.unflatten(1, (NUM_HEADS, -1)) for part in qkv.split(self.depths, dim=1))  # (B, heads, D, Q)
        similarity = self.similarity_norm(torch.einsum("bhdl,bhdm->bhlm", q, k))  # (B, heads, Q, Q)
        weights = upcast(similarity).softmax(-1).to(v.dtype)
        return F.gelu(self.output_norm(torch.einsum("bhlm,bhdm->bhdl", weights, v).flatten(1, 2)))


class KMaXTransformerLayer(nn.Module):
    """k-means update of the cluster centres, self-attention, feed-forward.

    Args:
        pixel_channels: channels of the pixel decoder's map.
        embed_dim: channels of the centres.
        num_classes: C.
        drop_path: probability with which each of the three residual branches is left out for a sample.
        mask_scale: see `Predictor`.
    """

    def __init__(
        self, pixel_channels: int, embed_dim: int, num_classes: int, drop_path: float, mask_scale: float = 0.1
    ) -> None:
        super().__init__()
        std = embed_dim**-0.5
        self.drop_path = drop_path
        self.pixel_conv = ConvBN(pixel_channels, embed_dim, activate=True)
        self.query_conv = ConvBN(embed_dim, embed_dim, dims=1, activate=True)
        self.predictor = Predictor(embed_dim, embed_dim, num_classes, mask_scale)
        self.pixel_value = ConvBN(embed_dim, embed_dim, std=std)
        self.kmeans_norm = batch_norm(embed_dim, 1)
        self.kmeans_out = ConvBN(embed_dim, embed_dim, dims=1, norm_init=0.0)
        self.query_qkv = ConvBN(embed_dim, 2 * embed_dim, dims=1, std=std)
        self.self_attention = QuerySelfAttention(key_depth=embed_dim // 2, value_depth=embed_dim)
        self.attention_out = ConvBN(embed_dim, embed_dim, dims=1, norm_init=0.0)
        self.ffn_in = ConvBN(embed_dim, 8 * embed_dim, dims=1, activate=True)
        self.ffn_out = ConvBN(8 * embed_dim, embed_dim, dims=1, norm_init=0.0)

    def forward(self, pixels: Tensor, centres: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Update the centres (B, embed_dim, Q) by the pixels (B, C, h, w); also return the layer's predictions."""
        pixels = self.pixel_conv(F.gelu(pixels))  # (B, embed_dim, h, w)
        queries = self.query_conv(centres)
        prediction = self.predictor(pixels, queries, queries)

        centres = centres + self._drop(self.kmeans_update(pixels, prediction["pred_masks"]))
        # The self-attention reads the queries as they were before the update.
        attended = self.attention_out(self.self_attention(self.query_qkv(queries)))
        centres = F.gelu(centres + self._drop(attended))
        centres = F.gelu(centres + self._drop(self.ffn_out(self.ffn_in(centres))))
        return centres, prediction

    def kmeans_update(self, pixels: Tensor, mask_logits: Tensor) -> Tensor:
        """Return what the k-means step adds to the centres: the normalised sums over each centre's pixels."""
        sums, _ = kmeans_attention(self.pixel_value(pixels), mask_logits)  # (B, embed_dim, Q), float32 at least
        return self.kmeans_out(self.kmeans_norm(sums.to(self.kmeans_norm.weight.dtype)))

    def _drop(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_path if self.training else 0.0)


def resize_aux_output(output: dict[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
    """Enlarge a layer's masks and pixel features to the final map; the features lose their unit length, as published."""
    # Published rule: corners are aligned when the *final* map's *height* is odd.
    aligned = bool(size[0] % 2)
    resized = {
        name: F.interpolate(output[name], size=size, mode="bilinear", align_corners=aligned)
        for name in ("pred_masks", "pixel_feature")
    }
    return {"pred_logits": output["pred_logits"], **resized}


def strided_targets(panoptic: PanopticMap, stride: int = 4) -> dict[str, Tensor]:
    """Return one image's targets at a stride, sampled from the top left pixel of every cell.

    Args:
        panoptic: ground truth at the padded input size.
        stride: of the mask logits.

    Returns:
        ``masks`` (N, h, w) bool and ``labels`` (N,) int64 of the segments that still have a pixel and are no crowd;
        ``semantic`` (h, w) int64, the class of every pixel, -1 where there is none.
    """
    masks, labels = segment_masks(panoptic.ids[::stride, ::stride], panoptic.segments)
    seen = masks.flatten(1).any(1)
    masks, labels = masks[seen], labels[seen]
    semantic = torch.full(masks.shape[1:], -1, dtype=torch.int64, device=masks.device)
    for mask, label in zip(masks, labels, strict=True):
        semantic[mask] = label
    return {"masks": masks, "labels": labels, "semantic": semantic}


@MODELS.register_module()
class KMaXHead(nn.Module):
    """The k-means mask transformer with its criterion and its inference rules.

    Args:
        in_channels: channels of ``Features.pixels``.
        level_channels: channels of ``Features.levels``, coarse to fine.
        encoder_channels: channels of ``Features.encoder``, finest first.
        num_classes: C.
        thing_classes: classes that are things; the others are stuff.
        num_queries: Q, the number of cluster centres.
        criterion: config of the criterion; None for a model that is never trained.
        embed_dim: channels of the centres, a multiple of 16.
        num_layers: transformer layers per level.
        drop_path: see `KMaXTransformerLayer`.
        mask_scale: standard deviation that the mask logits start with; 0.1 as published. A mask needs logits some units
            apart, which this one number takes thousands of iterations to learn: short schedules start higher.
        aux_semantic: auxiliary semantic head: ``deeplab``, ``stride32`` or None.
        class_threshold_thing: least class probability of a thing segment.
        class_threshold_stuff: least class probability of a stuff segment.
        overlap_threshold: least share of a mask that earlier segments leave free.
        reorder_class_weight: power of the class probability in the order of pasting.
        reorder_mask_weight: power of the mean mask probability in the order of pasting.
        pixel_confidence_threshold: least mask probability of a pixel.
        tasks: what `predict` delivers, of ``panoptic``, ``semantic`` and ``instance``.

    Raises:
        ValueError: an unknown ``aux_semantic`` or task.
    """

    def __init__(
        self,
        in_channels: int,
        level_channels: Sequence[int],
        encoder_channels: Sequence[int],
        num_classes: int,
        thing_classes: Sequence[int],
        num_queries: int = 128,
        criterion: dict | None = None,
        embed_dim: int = 256,
        num_layers: Sequence[int] = (2, 2, 2),
        drop_path: float = 0.2,
        mask_scale: float = 0.1,
        aux_semantic: str | None = "deeplab",
        class_threshold_thing: float = 0.7,
        class_threshold_stuff: float = 0.5,
        overlap_threshold: float = 0.8,
        reorder_class_weight: float = 1.0,
        reorder_mask_weight: float = 1.0,
        pixel_confidence_threshold: float = 0.4,
        tasks: Sequence[str] = ("panoptic",),
    ) -> None:
        super().__init__()
        _check_choices("tasks", tasks, TASKS)
        self.num_classes = num_classes
        self.num_layers = tuple(num_layers)
        self.cluster_centers = nn.Parameter(torch.empty(embed_dim, num_queries))
        truncated_normal_(self.cluster_centers, 1.0)
        self.layers = nn.ModuleList(
            KMaXTransformerLayer(channels, embed_dim, num_classes, drop_path, mask_scale)
            for channels, layers in zip(level_channels, num_layers, strict=True)
            for _ in range(layers)
        )
        self.class_embedding = ConvBN(embed_dim, embed_dim, dims=1, activate=True)
        self.mask_embedding = ConvBN(embed_dim, embed_dim, dims=1, activate=True)
        self.predictor = Predictor(in_channels, embed_dim, num_classes, mask_scale)
        self.aux_semantic = None
        if aux_semantic is not None:
            _check_choices("aux_semantic", [aux_semantic], AUX_SEMANTIC_HEADS)
            self.aux_semantic = AUX_SEMANTIC_HEADS[aux_semantic](encoder_channels, num_classes)
        self.criterion = MODELS.build(criterion) if criterion else None
        self.tasks = tuple(tasks)
        self.thing_classes = tuple(thing_classes)
        self.panoptic_rules = dict(
            thing_threshold=class_threshold_thing,
            stuff_threshold=class_threshold_stuff,
            overlap_threshold=overlap_threshold,
            pixel_threshold=pixel_confidence_threshold,
            class_power=reorder_class_weight,
            mask_power=reorder_mask_weight,
        )

    def forward(self, features: Features, deep_supervision: bool = True) -> dict:
        """Predict queries' classes and masks.

        Args:
            features: what the pixel decoder hands on.
            deep_supervision: also return what the transformer layers predict.

        Returns:
            ``pred_logits`` (B, Q, C + 1) void last, ``pred_masks`` (B, Q, h, w) logits at the size of the decoder's
            pixels, ``pixel_feature`` (B, D, h, w) of unit length; with deep supervision ``aux_outputs``, the same three
            of every transformer layer, resized to (h, w); in training mode ``aux_semantic_pred``, see
            `AUX_SEMANTIC_HEADS`.
        """
        centres = self.cluster_centers.expand(len(features.pixels), -1, -1)  # (B, embed_dim, Q)
        levels = [level for level, count in zip(features.levels, self.num_layers, strict=True) for _ in range(count)]
        aux_outputs = []
        for layer, pixels in zip(self.layers, levels, strict=True):
            centres, prediction = layer(pixels, centres)
            aux_outputs.append(prediction)
        outputs = self.predictor(features.pixels, self.class_embedding(centres), self.mask_embedding(centres))
        if deep_supervision:
            size = outputs["pred_masks"].shape[-2:]
            outputs["aux_outputs"] = [resize_aux_output(aux, size) for aux in aux_outputs]
        if self.training and self.aux_semantic is not None:
            outputs["aux_semantic_pred"] = self.aux_semantic(features.encoder)
        return outputs

    def loss(self, outputs: dict, samples: list[SegSample]) -> dict[str, Tensor]:
        """Return the criterion's weighted terms.

        Args:
            outputs: of `forward` in training mode.
            samples: with ``gt_panoptic`` at the padded input size.

        Raises:
            ValueError: the model was built without a criterion.
        """
        if self.criterion is None:
            raise ValueError("model.head.criterion is None: give one, e.g. dict(type='KMaXCriterion'), to train")
        return self.criterion(outputs, [strided_targets(sample.gt_panoptic) for sample in samples])

    def predict(self, outputs: dict, metas: list[dict]) -> list[dict]:
        """Return each image's results at the file's size.

        Args:
            outputs: of `forward`.
            metas: per image ``ori_shape``, ``img_shape`` and ``pad_shape``, see `SegSample`.

        Returns:
            Per image, by ``tasks``: ``pred_panoptic`` (`PanopticMap`, with scores), ``pred_semantic`` (H, W) int64 and
            ``pred_instances`` (things only; ``scores``, ``labels``, ``masks``, ``bboxes``).
        """
        return [
            self._predict_image(logits, masks, meta)
            for logits, masks, meta in zip(outputs["pred_logits"], outputs["pred_masks"], metas, strict=True)
        ]

    def _predict_image(self, logits: Tensor, masks: Tensor, meta: dict) -> dict:
        masks = resize_mask_logits(masks, meta["pad_shape"], meta["ori_shape"], meta["img_shape"])  # (Q, H, W)
        results = {}
        if "panoptic" in self.tasks:
            results["pred_panoptic"] = panoptic_inference(logits, masks, self.thing_classes, **self.panoptic_rules)
        if "semantic" in self.tasks:
            results["pred_semantic"] = semantic_inference(logits, masks).argmax(0)  # (H, W)
        if "instance" in self.tasks:
            threshold = self.panoptic_rules["pixel_threshold"]
            results["pred_instances"] = instance_inference(logits, masks, self.thing_classes, threshold)
        return results


def _check_choices(name: str, chosen: Iterable[str], known: Collection[str]) -> None:
    for choice in chosen:
        if choice not in known:
            raise ValueError(f"KMaXHead: {name} names {choice!r}{nearest(choice, known)}")
