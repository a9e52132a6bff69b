"""Leaving a stack of encoder layers early, image by image (ECO-M2F, arXiv:2404.15244).

Rebuilt from the published description. What is wrapped is any *stacked decoder*, and only these are asked of it:

* ``start(features) -> (memory (B, S, C), context)``; no tensor in ``context`` has a batch axis;
* ``step(i, memory, context) -> memory``, layer i from 0; ``finish(memory, context, features)``, what follows the last layer;
* ``summary(memory, context) -> (B, C)``, what the gate reads of the memory before the first layer;
* ``layer_flops(context) -> int``, multiply-adds of one layer for one image;
* the attributes ``num_layers``, ``embed_dim`` (C), ``channels`` and ``level_channels``.

What differs from the official code: the depth is chosen for each image of a batch (there, one arg max over the whole batch).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import Features


@dataclass(frozen=True)
class Exit:
    """Where the images of a batch left the stack.

    Attributes:
        features: what the wrapped decoder's ``finish`` made of it.
        depths: layers that each image went through.
        layer_flops: multiply-adds of one layer for one image.
    """

    features: Features
    depths: tuple[int, ...]
    layer_flops: int


@MODELS.register_module()
class AdaptiveExit(nn.Module):
    """A stacked decoder whose images leave it after 2, 3, ... or all layers; a linear gate says which.

    Args:
        in_channels: channels of the encoder's maps, finest first.
        in_strides: their strides.
        decoder: config of the stacked decoder, without these two.
        min_layers: layers of the first exit.

    Attributes:
        depths: number of layers at every exit, ascending.

    Raises:
        ValueError: ``min_layers`` is not among the decoder's layers, or the decoder is no stack.
    """

    def __init__(
        self, in_channels: Sequence[int], in_strides: Sequence[int], decoder: dict, min_layers: int = 2
    ) -> None:
        super().__init__()
        self.decoder = MODELS.build(dict(decoder, in_channels=in_channels, in_strides=in_strides))
        _check_stack(self.decoder, min_layers)
        self.depths = tuple(range(min_layers, self.decoder.num_layers + 1))
        self.channels, self.level_channels = self.decoder.channels, self.decoder.level_channels
        self.gate = nn.Linear(self.decoder.embed_dim, len(self.depths))
        nn.init.zeros_(self.gate.bias)

    def forward(self, features: list[Tensor], depths: Sequence[int] | None = None) -> Features:
        """Decode the encoder's maps; see `exit`."""
        return self.exit(features, depths).features

    def exit(self, features: list[Tensor], depths: Sequence[int] | None = None) -> Exit:
        """Run each image through its own number of layers; a layer that no image needs is not run.

        Args:
            features: the encoder's maps (B, C_i, H / s_i, W / s_i).
            depths: layers for each image; by default the gate's choice.

        Raises:
            ValueError: not one depth an image, or one that is no exit.
        """
        memory, context = self.decoder.start(features)
        if depths is None:
            depths = self.choose(self.gate_logits(self.decoder.summary(memory, context)))
        self._check_depths(depths, len(memory))
        left = self._run(memory, context, depths)
        return Exit(self.decoder.finish(left, context, features), tuple(depths), self.decoder.layer_flops(context))

    def exits(
        self, features: list[Tensor], started: tuple[Tensor, Any] | None = None
    ) -> Iterator[tuple[int, Features]]:
        """Yield every exit's depth and features, all of one pass through the stack.

        Args:
            features: the encoder's maps.
            started: the wrapped decoder's ``start(features)``, if the caller has it already.
        """
        memory, context = started or self.decoder.start(features)
        for i in range(self.depths[-1]):
            memory = self.decoder.step(i, memory, context)
            if i + 1 in self.depths:
                yield i + 1, self.decoder.finish(memory, context, features)

    def gate_logits(self, summary: Tensor) -> Tensor:
        """Return the logits (B, exits) of a summary (B, C), float32 for half precision."""
        with torch.autocast(summary.device.type, enabled=False):
            return F.linear(*(upcast(x) for x in (summary, self.gate.weight, self.gate.bias)))

    def choose(self, logits: Tensor) -> list[int]:
        """Return each image's depth: the exit of its largest logit (B, exits), of equals the shallowest."""
        return [self.depths[e] for e in logits.argmax(dim=1).tolist()]

    def _run(self, memory: Tensor, context: Any, depths: Sequence[int]) -> Tensor:
        """Return the memory (B, S, C) with which each image leaves the stack."""
        images = list(range(len(depths)))  # those still in the stack, in the order of ``memory``
        left: dict[int, Tensor] = {}
        for i in range(max(depths)):
            memory = self.decoder.step(i, memory, context)
            leaving = [depths[image] == i + 1 for image in images]
            if all(leaving) and not left:
                return memory
            left |= {image: memory[row] for row, image in enumerate(images) if leaving[row]}
            if any(leaving):
                images = [image for image in images if image not in left]
                memory = memory[[row for row, done in enumerate(leaving) if not done]]
        return torch.stack([left[image] for image in range(len(depths))])

    def _check_depths(self, depths: Sequence[int], batch: int) -> None:
        if len(depths) != batch or not set(depths) <= set(self.depths):
            raise ValueError(
                f"depths={list(depths)} for {batch} images: give each one of the exits {list(self.depths)}"
            )


def _check_stack(decoder: nn.Module, min_layers: int) -> None:
    asked = ("start", "step", "finish", "summary", "layer_flops", "num_layers", "embed_dim")
    missing = [name for name in asked if not hasattr(decoder, name)]
    if missing:
        raise ValueError(
            f"AdaptiveExit.decoder: {type(decoder).__name__} is no stack of layers, it lacks {', '.join(missing)}; use one "
            "like DeformablePixelDecoder"
        )
    if not 1 <= min_layers <= decoder.num_layers:
        raise ValueError(f"AdaptiveExit.min_layers={min_layers}: the decoder has the layers 1..{decoder.num_layers}")
