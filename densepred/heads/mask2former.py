"""Mask2Former's transformer decoder: masked attention of queries (CVPR 2022, arXiv:2112.01527, section 3.2).

Official code: facebookresearch/Mask2Former. Queries read the pixel decoder's levels in turn, coarse to fine, each only
where its own last mask prediction is foreground. One class head and one mask head serve the learned queries and every
layer's. One model for panoptic, instance and semantic segmentation: only data and inference differ.

What differs: without deep supervision no inner layer predicts a full mask. Resizing is linear, so its mask at the next
level's size is the product with the mask features of that size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.decoders.deformable import NUM_LEVELS, PointwiseConv, sine_positions
from densepred.errors import nearest
from densepred.heads.mask2former_inference import instance_inference, panoptic_inference, semantic_inference
from densepred.heads.resizing import resize
from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX, Features, SegSample, segment_masks

TASKS = ("panoptic", "semantic", "instance")


class Attention(nn.Module):
    """Multi-head attention with the parameters of ``nn.MultiheadAttention``, batch first."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend with queries (B, Q, C) to keys and values (B, S, C), where ``allowed`` (B, Q, S) is true."""
        parts = zip((queries, keys, values), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x, weight, bias in parts
        )  # (B, heads, Q or S, D)
        mask = None if allowed is None else allowed[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, Q, C)


class AttentionBlock(nn.Module):
    """Attention, then the LayerNorm of its sum with the input."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(embed_dim, num_heads)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        return self.norm(x + self.attn(queries, keys, values, allowed))


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between, then the LayerNorm of their sum with the input."""

    def __init__(self, embed_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.linear1(x).relu_()))


class Mask2FormerLayer(nn.Module):
    """Masked cross-attention to one level, self-attention of the queries, feed-forward."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attention = AttentionBlock(embed_dim, num_heads)
        self.self_attention = AttentionBlock(embed_dim, num_heads)
        self.ffn = FeedForward(embed_dim, ffn_dim)

    def forward(self, x: Tensor, positions: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        """Update the queries (B, Q, C); ``positions`` (Q, C) are added where they are compared, never to values."""
        x = self.cross_attention(x, x + positions, keys, values, allowed)
        placed = x + positions
        x = self.self_attention(x, placed, placed, x)
        return self.ffn(x)


class MLP(nn.Module):
    """Three linear maps with ReLU between."""

    def __init__(self, embed_dim: int, out_channels: int) -> None:
        super().__init__()
        widths = (embed_dim, embed_dim, embed_dim, out_channels)
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def mask_product(embeddings: Tensor, pixels: Tensor) -> Tensor:
    """Return the products (B, Q, h, w) of embeddings (B, Q, C) with pixels (B, C, h, w)."""
    return (embeddings @ pixels.flatten(2)).unflatten(2, pixels.shape[-2:])


def attention_mask(mask_logits: Tensor) -> Tensor:
    """Return where queries may look, (B, Q, h * w) bool, by their mask logits (B, Q, h, w).

    A pixel is blocked below probability 0.5. A query whose pixels are all blocked may look at all of them (not in the
    paper): a softmax over nothing is NaN.
    """
    allowed = mask_logits.detach().flatten(2) >= 0
    return allowed | ~allowed.any(-1, keepdim=True)


def mask_targets(sample: SegSample) -> dict[str, Tensor]:
    """Return one image's targets at the size of its ground truth.

    Returns:
        ``labels`` (N,) int64 and ``masks`` (N, H, W) bool: the instances of ``gt_instances`` if the sample has it; else
        the segments of ``gt_panoptic`` that are no crowd, those without a pixel included as published; else one mask
        for every class in ``gt_semantic``.

    Raises:
        ValueError: the sample has none of the three.
    """
    if "gt_instances" in sample:
        return dict(labels=sample.gt_instances.labels, masks=sample.gt_instances.masks)
    if "gt_panoptic" in sample:
        masks, labels = segment_masks(sample.gt_panoptic.ids, sample.gt_panoptic.segments)
        return dict(labels=labels, masks=masks)
    if "gt_semantic" in sample:
        labels = sample.gt_semantic.unique()
        labels = labels[labels != IGNORE_INDEX]
        return dict(labels=labels, masks=sample.gt_semantic == labels[:, None, None])
    raise ValueError(
        f"{sample.get('img_path', 'a sample')} has no ground truth for Mask2FormerHead: it needs gt_instances, "
        "gt_panoptic or gt_semantic; let the pipeline load one (LoadInstances, LoadPanoptic or LoadSemantic)"
    )


@MODELS.register_module()
class Mask2FormerHead(nn.Module):
    """The masked-attention transformer with its criterion and its inference rules.

    Args:
        in_channels: channels of ``Features.pixels``, the mask features.
        level_channels: channels of ``Features.levels``, coarse to fine.
        encoder_channels: channels of ``Features.encoder``, which this head does not read.
        num_classes: K.
        thing_classes: classes that are things; None (all are) for a model without the panoptic task.
        num_queries: Q.
        embed_dim: C, channels of the queries; a multiple of ``num_heads`` and of 4.
        num_heads: heads of every attention.
        ffn_dim: hidden channels of the feed-forward part.
        num_layers: layers; layer i reads level i modulo 3.
        criterion: config of the criterion; None for a model that is never trained.
        tasks: what `predict` delivers, of ``panoptic``, ``semantic`` and ``instance``.
        object_mask_threshold: least class probability of a panoptic segment.
        overlap_threshold: least share of a mask that other segments leave to it.
        max_instances: instances that `predict` delivers of an image.

    Raises:
        ValueError: not three levels, an ``embed_dim`` that does not divide, an unknown task, or the panoptic task
            without ``thing_classes``.
    """

    def __init__(
        self,
        in_channels: int,
        level_channels: Sequence[int],
        encoder_channels: Sequence[int],
        num_classes: int,
        thing_classes: Sequence[int] | None = None,
        num_queries: int = 100,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        num_layers: int = 9,
        criterion: dict | None = None,
        tasks: Sequence[str] = ("panoptic",),
        object_mask_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        max_instances: int = 100,
    ) -> None:
        super().__init__()
        _check_widths(level_channels, embed_dim, num_heads)
        _check_tasks(tasks, thing_classes)
        self.num_classes = num_classes
        self.thing_classes = None if thing_classes is None else tuple(thing_classes)
        self.tasks = tuple(tasks)
        self.panoptic_rules = dict(object_mask_threshold=object_mask_threshold, overlap_threshold=overlap_threshold)
        self.max_instances = max_instances
        self.query_feat = nn.Parameter(torch.randn(num_queries, embed_dim))
        self.query_embed = nn.Parameter(torch.randn(num_queries, embed_dim))
        self.level_embed = nn.Parameter(torch.randn(NUM_LEVELS, embed_dim))
        self.input_proj = nn.ModuleList(
            nn.Identity() if channels == embed_dim else PointwiseConv(channels, embed_dim)
            for channels in level_channels
        )
        for projection in self.input_proj:
            if isinstance(projection, PointwiseConv):
                nn.init.kaiming_uniform_(projection.weight, a=1)
        self.layers = nn.ModuleList(Mask2FormerLayer(embed_dim, num_heads, ffn_dim) for _ in range(num_layers))
        self.decoder_norm = nn.LayerNorm(embed_dim)
        self.class_embed = nn.Linear(embed_dim, num_classes + 1)
        self.mask_embed = MLP(embed_dim, in_channels)
        self.criterion = MODELS.build(criterion) if criterion else None

    def forward(self, features: Features, deep_supervision: bool = True) -> dict:
        """Predict queries' classes and masks.

        Args:
            features: what the pixel decoder hands on.
            deep_supervision: also return what the learned queries and the inner layers predict; without it they predict
                only the attention masks, at the size of the level that is read.

        Returns:
            ``pred_logits`` (B, Q, K + 1) no object last, ``pred_masks`` (B, Q, h, w) logits at the size of the
            decoder's pixels; ``aux_outputs``, the same two of the learned queries and of all layers but the last.
        """
        pixels, levels = features.pixels, [self._read_level(i, x) for i, x in enumerate(features.levels)]
        sizes = [x.shape[-2:] for x in features.levels]
        resized = None if deep_supervision else [resize(pixels, size) for size in sizes]
        queries, aux_outputs = self.query_feat.expand(len(pixels), -1, -1), []  # (B, Q, C)
        for i, layer in enumerate(self.layers):
            level = i % NUM_LEVELS
            if deep_supervision:
                aux_outputs.append(self._predict_set(queries, pixels))
                masks = resize(aux_outputs[-1]["pred_masks"].detach(), sizes[level])
            else:
                masks = mask_product(self.mask_embed(self.decoder_norm(queries)), resized[level])
            queries = layer(queries, self.query_embed, *levels[level], attention_mask(masks))
        outputs = self._predict_set(queries, pixels)
        return outputs | {"aux_outputs": aux_outputs} if deep_supervision else outputs

    def _read_level(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a level's keys and values (B, S, C)."""
        x = self.input_proj[index](x)
        values = x.flatten(2).transpose(1, 2) + self.level_embed[index]
        return values + sine_positions(*x.shape[-2:], x.shape[1], x), values

    def _predict_set(self, queries: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        queries = self.decoder_norm(queries)
        return {
            "pred_logits": self.class_embed(queries),  # (B, Q, K + 1)
            "pred_masks": mask_product(self.mask_embed(queries), pixels),  # (B, Q, h, w)
        }

    def loss(self, outputs: dict, samples: list[SegSample]) -> dict[str, Tensor]:
        """Return the criterion's weighted terms.

        Args:
            outputs: of `forward` with deep supervision.
            samples: with the ground truth that `mask_targets` reads, at the padded input size.

        Raises:
            ValueError: the model was built without a criterion, or a sample has no ground truth.
        """
        if self.criterion is None:
            raise ValueError("model.head.criterion is None: give one, e.g. dict(type='Mask2FormerCriterion'), to train")
        return self.criterion(outputs, [mask_targets(sample) for sample in samples])

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
            self._predict_image(logits, masks, [meta[name] for name in ("pad_shape", "img_shape", "ori_shape")])
            for logits, masks, meta in zip(outputs["pred_logits"], outputs["pred_masks"], metas, strict=True)
        ]

    def _predict_image(self, logits: Tensor, masks: Tensor, shapes: list[tuple[int, int]]) -> dict:
        results = {}
        if "panoptic" in self.tasks:
            results["pred_panoptic"] = panoptic_inference(
                logits, masks, *shapes, self.thing_classes, **self.panoptic_rules
            )
        if "semantic" in self.tasks:
            results["pred_semantic"] = semantic_inference(logits, masks, *shapes, alone=self.tasks == ("semantic",))
        if "instance" in self.tasks:
            results["pred_instances"] = instance_inference(
                logits, masks, *shapes, self.thing_classes, self.max_instances
            )
        return results


def _check_widths(level_channels: Sequence[int], embed_dim: int, num_heads: int) -> None:
    if len(level_channels) != NUM_LEVELS:
        raise ValueError(
            f"Mask2FormerHead reads {NUM_LEVELS} levels, coarse to fine; the decoder hands on {len(level_channels)}: "
            f"level_channels={list(level_channels)}"
        )
    for name, divisor in ((f"num_heads, {num_heads}", num_heads), ("4, which the position encoding needs", 4)):
        if embed_dim % divisor:
            raise ValueError(f"Mask2FormerHead: embed_dim={embed_dim} is no multiple of {name}")


def _check_tasks(tasks: Sequence[str], thing_classes: Sequence[int] | None) -> None:
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"Mask2FormerHead: tasks names {task!r}{nearest(task, TASKS)}")
    if "panoptic" in tasks and thing_classes is None:
        raise ValueError("Mask2FormerHead: the panoptic task needs thing_classes, the classes that are things")
