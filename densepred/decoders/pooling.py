"""Pooled branches, shared by the decoders that look at the whole image: pool, 1x1 convolution, spread again.

Adaptive pooling: of a map that does not divide evenly the bins overlap, from floor(i H / s) to ceil((i + 1) H / s).
"""

import torch.distributed as dist
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn


class PooledConv(nn.Sequential):
    """Mean of ``bins`` x ``bins`` bins, 1x1 convolution with BatchNorm and ReLU, bilinear resize to the input's size.

    The convolution's keys are ``1.conv.*`` and ``1.bn.*``; ``0`` is the pool.

    Args:
        in_channels: of the map.
        channels: of the result.
        bins: along each axis; 1 pools the whole map.
        align_corners: of the resize.
    """

    def __init__(self, in_channels: int, channels: int, bins: int, align_corners: bool = False) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(bins), ConvModule(in_channels, channels, 1, norm_cfg=dict(type="BN")))
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, H, W) of a map (B, in_channels, H, W).

        Raises:
            ValueError: see `require_batch`.
        """
        pool, conv = self
        pooled = pool(x)  # (B, in_channels, bins, bins)
        require_batch(pooled, conv.norm)
        return F.interpolate(conv(pooled), size=x.shape[-2:], mode="bilinear", align_corners=self.align_corners)


def require_batch(pooled: Tensor, norm: nn.Module) -> None:
    """Check that a norm in training has more than one value a channel to normalise a pooled map by.

    Args:
        pooled: (B, C, h, w), what the norm will see but for its channels.
        norm: it; only a BatchNorm that trains needs more than one value, and a synchronised one finds them elsewhere.

    Raises:
        ValueError: one image on this process, pooled to one pixel.
    """
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not norm.training or pooled[:, 0].numel() > 1:
        return
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized() and dist.get_world_size() > 1:
        return
    raise ValueError(
        "a batch of one image: behind a pooling to one pixel, BatchNorm has one value a channel and nothing to "
        "normalise it by; set train_dataloader.batch_size to 2 or more, or train on several GPUs with sync_bn='torch'"
    )
