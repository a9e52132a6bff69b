"""Any encoder under any decoder: the whole matrix is built, trained a step, predicts, exports, and says its shapes."""

import pytest
import torch
from torch import Tensor, nn

from densepred.registry import MODELS
from densepred.structures import SegSample

CLASSES = 5
DILATED = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
ENCODERS = {
    "resnet": dict(type="ResNet", depth=18),
    "resnet_from_stride_2": dict(
        type="ResNet", depth=18, out_features=("conv1", "res2", "res3", "res4", "res5"), ceil_mode=True
    ),
    "resnet_dilated": dict(type="ResNet", depth=18, stem="v1c", contract_dilation=True, **DILATED),
    "mobilenet_v2": dict(type="MobileNetV2"),
    "efficientnet_lite": dict(type="EfficientNetLite", out_features=("res1", "res2", "res3", "res4", "res5")),
    "efficientnet_lite_dilated": dict(type="EfficientNetLite", output_stride=8),
    "convnext": dict(type="ConvNeXt", arch="tiny", output_norm=True),
    "swin": dict(type="SwinTransformer", embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4),
    "biformer": dict(type="BiFormer", embed_dim=32, depths=(1, 1, 1, 1)),
    "mit": dict(type="MixVisionTransformer", arch="b0"),
    "dla": dict(type="DLA34"),
    "unet": dict(type="UNetEncoder", style="keras", widths=(8, 16, 24, 32, 40)),
    "unet_strided": dict(type="UNetEncoder", style="nnunet", widths=(8, 16, 24, 32, 40)),
}
DECODERS = {
    "fcn": dict(type="FCNDecoder", channels=16),
    "fpn": dict(type="FPNDecoder", pyramid_channels=24, channels=16),
    "dla_up": dict(type="DLAUp"),
    "psp": dict(type="PSPDecoder", channels=16),
    "aspp": dict(type="ASPPDecoder", channels=16, dilations=(1, 2, 3)),
    "uper": dict(type="UPerDecoder", channels=16),
    "segformer": dict(type="SegFormerDecoder", channels=16),
    "segformer_nvidia": dict(type="SegFormerDecoder", channels=16, form="nvidia"),
    "nonlocal": dict(type="NonLocalDecoder", channels=16),
    "ccnet": dict(type="CCNetDecoder", channels=16, embedding_channels=8),
    "vwformer_ade20k": dict(type="VWFormerDecoder", variant="ade20k", channels=64),
    "vwformer_cityscapes": dict(type="VWFormerDecoder", variant="cityscapes", channels=64),
    "unetpp": dict(
        type="UNetPlusPlusDecoder", style="smp", decoder_channels=(32, 24, 16, 12, 8), deep_supervision=True
    ),
    "unetpp_keras": dict(type="UNetPlusPlusDecoder", style="keras", deep_supervision=True),
    "unetpp_nnunet": dict(type="UNetPlusPlusDecoder", style="nnunet"),
}
SIZE = (75, 98)  # no multiple of anything


def build(encoder: str, decoder: str) -> nn.Module:
    torch.manual_seed(0)
    head = dict(
        type="SemanticHead",
        num_classes=CLASSES,
        auxiliary=dict(index=-2, channels=8),
        embedding_loss=dict(type="CategoryConsistentLoss") if decoder == "ccnet" else None,
    )
    return MODELS.build(dict(type="Segmentor", encoder=ENCODERS[encoder], decoder=DECODERS[decoder], head=head))


class Logits(nn.Module):
    """What is exported: images (B, 3, H, W) -> the main logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.model.features(images, None), deep_supervision=False)["sem_logits"]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_trains_a_step_predicts_and_exports(encoder: str, decoder: str):
    model = build(encoder, decoder).train()
    images = torch.randn(2, 3, *SIZE)
    samples = [SegSample(metainfo=dict(img_shape=SIZE, pad_shape=SIZE, ori_shape=(150, 100))) for _ in images]
    for sample in samples:
        sample.gt_semantic = torch.randint(CLASSES, SIZE)
    losses = model(images, samples, mode="loss")
    sum(value for name, value in losses.items() if "loss" in name).backward()
    unread = ("encoder.norm", "encoder.extra_norms")  # of a map that the decoder leaves aside
    lacking = [name for name, p in model.named_parameters() if p.grad is None and not name.startswith(unread)]
    assert not lacking
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.no_grad():
        maps = model.encoder(images)
        for x, channels, stride in zip(maps, model.encoder.channels, model.encoder.strides, strict=True):
            assert x.shape[:2] == (2, channels)
            assert abs(x.shape[-1] - SIZE[1] / stride) <= 1, stride
        features = model.decoder(maps)
        assert features.pixels.shape[1] == model.decoder.channels
        assert [level.shape[1] for level in features.levels] == list(model.decoder.level_channels)
        logits = model.head(features)["sem_logits"]
        assert logits.shape == (2, CLASSES, *features.pixels.shape[-2:])
        predicted = model(images, samples, mode="predict")
        exported = torch.export.export(Logits(model), (images,)).module()(images)
    assert torch.allclose(exported, logits, atol=1e-5)
    assert all(sample.pred_semantic.shape == (150, 100) for sample in predicted)
