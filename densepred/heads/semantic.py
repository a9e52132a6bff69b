"""The head of semantic segmentation: one convolution that classifies every pixel, and what training adds to it.

The frame is mmsegmentation's (1.2.2): channel dropout, a classifier with weights N(0, 0.01), an FCN head on an inner map
of the encoder while training, logits resized to the labels before every loss. Prediction resizes the logits to the padded
input, cuts the padding and resizes to the file, both times bilinearly. Deep supervision is that of UNet++
(arXiv:1912.05074): one classifier a map, every one trained against the full labels.

What differs: both resizes of prediction are one weighted sum of a few rows, then columns, taken for a band of the file's
rows at a time, so that no full-size map of logits ever exists; a model with one channel (sigmoid) states two classes.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.heads.resizing import Size, resize, resize_to_file
from densepred.ops.linear_resize import logit_bands
from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX, Features, SegSample

CROSS_ENTROPY = [dict(type="CrossEntropyLoss")]
"""What trains a head whose config names no losses; auxiliary heads too, as CCNet and mmsegmentation publish them."""
ASKS_AT_ONCE = ("cpu",)
"""Devices from which a number can be read without stalling them."""
AUXILIARY = dict(index=-2, channels=256, weight=0.4, losses=CROSS_ENTROPY, bias=False, negative_slope=0.0)
"""Defaults of the auxiliary head."""


def classifier(in_channels: int, out_channels: int, kernel_size: int = 1, bias: bool = True) -> nn.Conv2d:
    """Return a convolution that keeps the map's size, with weights N(0, 0.01) and bias 0."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    nn.init.normal_(conv.weight, std=0.01)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv


class AuxiliaryHead(nn.Module):
    """FCN head on a map of the encoder: 3x3 convolution, BatchNorm, (leaky) ReLU, channel dropout, 1x1 classifier.

    Args:
        in_channels: of the map.
        out_channels: of the logits.
        channels: of the hidden map.
        dropout: of whole channels of the hidden map.
        bias: the 3x3 convolution has one though a norm follows (CCNet's has).
        negative_slope: of the leaky ReLU; 0 = ReLU.
    """

    def __init__(
        self, in_channels: int, out_channels: int, channels: int, dropout: float, bias: bool, negative_slope: float
    ) -> None:
        super().__init__()
        act_cfg = dict(type="LeakyReLU", negative_slope=negative_slope) if negative_slope else dict(type="ReLU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MMCV finds the bias unnecessary; published weights have it
            self.conv = ConvModule(
                in_channels, channels, 3, padding=1, bias=bias, norm_cfg=dict(type="BN"), act_cfg=act_cfg
            )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(x)))


@MODELS.register_module()
class SemanticHead(nn.Module):
    """Classify the pixels of the decoder's finest map.

    Args:
        in_channels: of ``Features.pixels``.
        level_channels: not read.
        encoder_channels: of the encoder's maps, finest first; the auxiliary head reads one of them.
        num_classes: C.
        deep_channels: of ``Features.deep``, shallowest first; each gets a classifier of its own.
        losses: configs of registered losses, called with logits (B, C, H, W) and labels (B, H, W); values of equal names
            are added. Default: cross entropy.
        auxiliary: None for no auxiliary head, or a dict of ``index`` (-2) in the encoder's maps, ``channels`` (256),
            ``weight`` (0.4) of its losses, ``losses`` (cross entropy, also where the main head's are others), ``bias`` (False)
            and ``negative_slope`` (0.0), see `AuxiliaryHead`.
        dropout: probability of zeroing a channel before a classifier.
        kernel_size: of the classifiers, odd.
        bias: whether the classifiers have one.
        align_corners: of every resize of logits, in training and prediction.
        binary: the classifiers have one channel z, and the logits of the two classes are (0, z): softmax, cross entropy,
            Dice and arg max of these are the sigmoid forms of z.
        deep_weights: of the losses of each deep map; the last map's is 1. Default: all 1, as UNet++ has it.
        average_deep: prediction averages the probabilities of all classifiers instead of taking the last one's.
        embedding_loss: config of a loss on ``Features.embedding``, called with it and the labels (B, H, W); it returns its
            terms by name.

    Raises:
        ValueError: ``binary`` with other than 2 classes, an auxiliary index that the encoder lacks, ``deep_weights`` of another
            length than ``deep_channels``, an unknown loss or one on embeddings among ``losses``, an unknown key of
            ``auxiliary``.
    """

    thing_classes = None  # whether a class is a thing makes no difference here

    def __init__(
        self,
        in_channels: int,
        level_channels: Sequence[int],
        encoder_channels: Sequence[int],
        num_classes: int,
        deep_channels: Sequence[int] = (),
        losses: Sequence[dict] = CROSS_ENTROPY,
        auxiliary: dict | None = None,
        dropout: float = 0.1,
        kernel_size: int = 1,
        bias: bool = True,
        align_corners: bool = False,
        binary: bool = False,
        deep_weights: Sequence[float] | None = None,
        average_deep: bool = False,
        embedding_loss: dict | None = None,
    ) -> None:
        super().__init__()
        if binary and num_classes != 2:
            raise ValueError(f"head.binary means two classes, but num_classes is {num_classes}: set it to 2")
        if deep_weights is not None and len(deep_weights) != len(deep_channels):
            raise ValueError(
                f"head.deep_weights has {len(deep_weights)} values, but the decoder has {len(deep_channels)} deep maps: give "
                "one a deep map, shallowest first; with none, set deep_supervision=True in the decoder"
            )
        self.num_classes = num_classes
        self.align_corners = align_corners
        self.average_deep = average_deep
        self.deep_weights = [1.0] * len(deep_channels) if deep_weights is None else list(deep_weights)
        outputs = 1 if binary else num_classes
        self.dropout = nn.Dropout2d(dropout)
        self.deep_classifiers = nn.ModuleList(classifier(c, outputs, kernel_size, bias) for c in deep_channels)
        self.classifier = classifier(in_channels, outputs, kernel_size, bias)
        self.losses = build_losses(losses, num_classes)
        require_names(self.losses)
        self.embedding_loss = build_losses([embedding_loss], num_classes)[0] if embedding_loss else None
        self.auxiliary = None
        if auxiliary is not None:
            self._add_auxiliary(encoder_channels, outputs, dropout, auxiliary_settings(auxiliary))
        self._unread_check: tuple[Tensor, list[str]] | None = None

    def _add_auxiliary(self, encoder_channels: Sequence[int], outputs: int, dropout: float, settings: dict) -> None:
        index, count = settings["index"], len(encoder_channels)
        if not -count <= index < count:
            raise ValueError(
                f"head.auxiliary.index is {index}, but the encoder has {count} maps: choose {-count}..{count - 1}"
            )
        self.auxiliary_index = index
        self.auxiliary_weight = settings["weight"]
        self.auxiliary_losses = build_losses(settings["losses"], self.num_classes)
        require_names(self.auxiliary_losses)
        layers = {key: settings[key] for key in ("channels", "bias", "negative_slope")}
        self.auxiliary = AuxiliaryHead(encoder_channels[index], outputs, dropout=dropout, **layers)

    def forward(self, features: Features, deep_supervision: bool = True) -> dict:
        """Return the logits, at the size of the maps they are made from.

        Returns:
            ``sem_logits`` (B, C, h, w). With ``deep_supervision`` also what applies of ``aux_logits`` (B, C, h', w'),
            ``deep_logits``, a list as ``features.deep``, and ``embedding``. With ``average_deep`` ``deep_logits`` always.
            With fewer deep maps than classifiers (a pruned UNet++) the one after theirs classifies ``pixels``.
        """
        classifiers = [*self.deep_classifiers, self.classifier]
        depth = len(features.deep) if self.deep_classifiers else 0
        outputs = dict(sem_logits=self._two_classes(classifiers[depth](self.dropout(features.pixels))))
        if depth and (deep_supervision or self.average_deep):
            outputs["deep_logits"] = [
                self._two_classes(classify(self.dropout(x)))
                for classify, x in zip(classifiers[:depth], features.deep, strict=True)
            ]
        if deep_supervision and self.auxiliary is not None:
            outputs["aux_logits"] = self._two_classes(self.auxiliary(features.encoder[self.auxiliary_index]))
        if deep_supervision and features.embedding is not None:
            outputs["embedding"] = features.embedding
        return outputs

    def _two_classes(self, logits: Tensor) -> Tensor:
        """Return logits (B, C, h, w) of a classifier's output, which has one channel in a binary model."""
        if logits.shape[1] == self.num_classes:
            return logits
        return torch.cat([torch.zeros_like(logits), logits], dim=1)  # (B, 2, h, w)

    def loss(self, outputs: dict, samples: list[SegSample]) -> dict[str, Tensor]:
        """Return the weighted losses, and ``acc_seg``, the percentage of valid pixels that are right.

        Names are ``loss_NAME``, ``aux_loss_NAME``, ``deep{i}_loss_NAME`` and ``loss_embedding_TERM``. Without a valid
        pixel all are 0.

        Raises:
            ValueError: a sample has no ``gt_semantic``, or labels that are neither classes nor 255. On an accelerator the
                latter comes one step late, since asking at once would stall it; that step takes such pixels as ignored.
        """
        labels = self._checked(stack_labels(samples), samples)  # (B, H, W)
        logits = self._resized(outputs["sem_logits"], labels)
        losses = named_losses(self.losses, logits, labels)
        losses["acc_seg"] = pixel_accuracy(logits.detach(), labels)
        for i, deep in enumerate(outputs.get("deep_logits", [])):
            values = named_losses(self.losses, self._resized(deep, labels), labels)
            losses |= {f"deep{i}_{name}": self.deep_weights[i] * value for name, value in values.items()}
        if "aux_logits" in outputs:
            values = named_losses(self.auxiliary_losses, self._resized(outputs["aux_logits"], labels), labels)
            losses |= {f"aux_{name}": self.auxiliary_weight * value for name, value in values.items()}
        if self.embedding_loss is not None:
            if "embedding" not in outputs:
                raise ValueError("head.embedding_loss needs a decoder that returns an embedding: remove the loss")
            terms = self.embedding_loss(outputs["embedding"], labels)
            losses |= {f"loss_embedding_{name}": value for name, value in terms.items()}
        return losses

    def _resized(self, logits: Tensor, labels: Tensor) -> Tensor:
        return resize(upcast(logits), labels.shape[-2:], self.align_corners)

    def _checked(self, labels: Tensor, samples: list[SegSample]) -> Tensor:
        """Return the labels with those out of range ignored; complain now on a CPU, at the next call elsewhere."""
        if self._unread_check is not None:
            found, names = self._unread_check
            self._unread_check = None
            require_known_labels(found.tolist(), names, self.num_classes)
        bad = ((labels < 0) | (labels >= self.num_classes)) & (labels != IGNORE_INDEX)
        found = torch.stack([torch.where(bad, labels, -math.inf).amax((1, 2)), bad.sum((1, 2))], 1)  # (B, 2)
        names = [sample.get("img_path", "a sample") for sample in samples]
        if labels.device.type in ASKS_AT_ONCE:
            require_known_labels(found.tolist(), names, self.num_classes)
            return labels
        self._unread_check = found, names
        return labels.masked_fill(bad, IGNORE_INDEX)

    def final_logits(self, outputs: dict) -> Tensor:
        """Return the logits (B, C, h, w) that decide; with ``average_deep`` the log of the mean of all heads' probabilities.

        Deep logits of another size are resized to that of ``sem_logits`` first; without any these are final already.
        """
        logits = upcast(outputs["sem_logits"])
        deep = outputs.get("deep_logits") if self.average_deep else None
        if not deep:
            return logits
        heads = [resize(upcast(x), logits.shape[-2:], self.align_corners) for x in deep]
        log_probs = torch.stack([x.log_softmax(1) for x in [*heads, logits]])  # (L + 1, B, C, h, w)
        return log_probs.logsumexp(0) - math.log(len(log_probs))

    def class_logits(self, outputs: dict, size: Size) -> Tensor:
        """Return the final logits (B, C, H, W) at a size (H, W), for sums over windows and test-time augmentation."""
        return resize(self.final_logits(outputs), size, self.align_corners)

    def predict(self, outputs: dict, metas: list[dict]) -> list[dict]:
        """Return ``dict(pred_semantic=(H, W) int64)`` for every image, at the file's size.

        Args:
            outputs: of `forward`, or ``dict(sem_logits=...)`` of any size that covers the padded input.
            metas: each with ``pad_shape``, ``img_shape`` and ``ori_shape``.
        """
        return [
            dict(
                pred_semantic=semantic_labels(
                    logits, meta["pad_shape"], meta["img_shape"], meta["ori_shape"], self.align_corners
                )
            )
            for logits, meta in zip(self.final_logits(outputs), metas, strict=True)
        ]


# Parts of the loss ----------------------------------------------------------------------------------------------------


def build_losses(configs: Sequence[dict], num_classes: int) -> nn.ModuleList:
    """Build registered losses.

    Raises:
        ValueError: one is not registered, or its class weights are not one a class.
    """
    for config in configs:
        if isinstance(config["type"], str) and MODELS.get(config["type"]) is None:
            known = [name for name in MODELS.module_dict if name.endswith("Loss")]
            raise ValueError(f"head: no loss is named {config['type']!r}{nearest(config['type'], known)}")
        weights = config.get("class_weight")
        if weights is not None and len(weights) != num_classes:
            raise ValueError(
                f"{config['type']}.class_weight has {len(weights)} values, but the head has {num_classes} classes"
            )
    return nn.ModuleList(MODELS.build(config) for config in configs)


def require_names(losses: nn.ModuleList) -> None:
    """Raise ``ValueError`` unless all are losses on logits, which have a name to be logged under."""
    for loss in losses:
        if not hasattr(loss, "name"):
            raise ValueError(
                f"head.losses: {type(loss).__name__} is no loss on logits; a loss on embeddings goes to head.embedding_loss"
            )


def auxiliary_settings(auxiliary: dict) -> dict:
    """Return a config of an auxiliary head with the defaults filled in.

    Raises:
        ValueError: it has a key that the head does not know.
    """
    for key in auxiliary:
        if key not in AUXILIARY:
            raise ValueError(f"head.auxiliary has no key {key!r}{nearest(key, AUXILIARY)}")
    return AUXILIARY | auxiliary


def stack_labels(samples: list[SegSample]) -> Tensor:
    """Return the ground truth (B, H, W) int64 of a padded batch.

    Raises:
        ValueError: a sample has none.
    """
    for sample in samples:
        if "gt_semantic" not in sample:
            raise ValueError(
                f"{sample.get('img_path', 'a sample')} has no gt_semantic, from which SemanticHead learns: let the pipeline "
                "load it (LoadSemantic)"
            )
    return torch.stack([sample.gt_semantic for sample in samples])


def require_known_labels(found: list[list[float]], names: list[str], num_classes: int) -> None:
    """Raise ``ValueError`` for the first image with labels that are neither 0..num_classes-1 nor 255.

    Args:
        found: of each image the largest such label and the number of pixels with such labels.
        names: the images' files.
        num_classes: C.
    """
    for (label, count), name in zip(found, names, strict=True):
        if count:
            raise ValueError(
                f"{name}: {int(count)} pixels have labels that are no class, up to {int(label)}; num_classes is "
                f"{num_classes}, so labels are 0..{num_classes - 1} or {IGNORE_INDEX} (ignored): raise head.num_classes, or "
                "map the labels when loading"
            )


def named_losses(losses: nn.ModuleList, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the values of losses by name; those of equal names are added."""
    values = {}
    for loss in losses:
        name, value = f"loss_{loss.name}", loss(logits, labels)
        values[name] = values[name] + value if name in values else value
    return values


@torch.no_grad()
def pixel_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the percentage of valid pixels (B, H, W) whose largest logit (B, C, H, W) is the label's; 0 without any."""
    valid = labels != IGNORE_INDEX
    right = (logits.argmax(1) == labels) & valid
    return 100 * right.sum() / valid.sum().clamp(min=1)


# Prediction -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def semantic_labels(logits: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size, align_corners: bool) -> Tensor:
    """Return each pixel's best class (H, W) int64: logits resized to the padded input, cut, resized to the file.

    Args:
        logits: (C, h, w) of one image.
        pad_shape: (height, width) of the network's input.
        img_shape: (height, width) after the resize, before padding.
        ori_shape: (H, W) of the file.
        align_corners: of both resizes.
    """
    rows, columns = resize_to_file(logits, pad_shape, img_shape, ori_shape, align_corners)
    labels = torch.empty(tuple(ori_shape), dtype=torch.int64, device=logits.device)
    # Held of a pixel at once: the logits, their copy after the rows, and the label.
    for band, values in logit_bands(logits, rows, columns, len(logits) + 4):
        labels[band] = values.argmax(-1).T  # (n, W)
    return labels
