"""kMaX-DeepLab's decoder and head: sizes, initialisation, the published rules, targets, precision, export, configs."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densepred
from densepred.decoders.kmax import ConvBN, Fusion, KMaXPixelDecoder
from densepred.heads.kmax import Predictor, resize_aux_output, strided_targets
from densepred.structures import PanopticMap, SegSample

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = {
    "num_classes": 5,
    "thing_classes": [0, 1, 2],
    "model.encoder.depth": 18,
    "model.decoder.num_blocks": (1, 1, 1, 1),
    "model.decoder.base_channels": (16, 16, 8, 8),
    "model.head.embed_dim": 32,
    "model.head.num_queries": 12,
}


def tiny_model(config: str = "kmax_r50_coco.py", **options) -> nn.Module:
    torch.manual_seed(0)
    return densepred.build_model(CONFIGS / config, cfg_options=TINY | options)


def sample(height: int, width: int, segments: int = 3) -> SegSample:
    """Vertical stripes; the last stripe is void."""
    ids = (torch.arange(width) * (segments + 1) // width + 1).expand(height, width).clone().int()
    ids[ids > segments] = 0
    records = [dict(id=i + 1, label=i % 5, isthing=i % 5 < 3, iscrowd=False) for i in range(segments)]
    return SegSample(gt_panoptic=PanopticMap(ids, records))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model().eval()


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(65, 97), (64, 96), (50, 71), (33, 32), (31, 200)])
def test_any_side_works(model, size):
    with torch.no_grad():
        out = model(torch.randn(1, 3, *size), mode="tensor")
    expected = (math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert out["pred_masks"].shape == (1, 12, *expected)
    assert out["pred_logits"].shape == (1, 12, 6)
    for aux in out["aux_outputs"]:
        assert aux["pred_masks"].shape == (1, 12, *expected)
        assert aux["pixel_feature"].shape == (1, 16, *expected)
    torch.testing.assert_close(out["pixel_feature"].norm(dim=1), torch.ones(1, *expected))


def test_position_tables_limit_the_side():
    decoder = KMaXPixelDecoder([8, 8, 8, 8], [4, 8, 16, 32], (1, 1, 1, 1), base_channels=(8, 8, 4, 4)).eval()
    with pytest.raises(ValueError, match=r"stride 16 got a 1x256 map.*255 pixels.*4080 at most"):
        decoder([torch.zeros(1, 8, 1, side) for side in (1024, 512, 256, 128)])
    with torch.no_grad():
        assert decoder([torch.zeros(1, 8, 1, side) for side in (1020, 510, 255, 128)]).pixels.shape == (1, 16, 1, 1020)


def test_attention_knows_directions(model):
    """Relative positions must tell left from right: mirrored maps give other than mirrored results."""
    attention = model.decoder.stages[0].blocks[0].attention
    x = torch.randn(1, 32, 3, 4)
    with torch.no_grad():
        mirrored = attention(x.flip(3)).flip(3)
        assert not torch.allclose(attention(x), mirrored, atol=1e-3)
        for axis in (attention.height_axis, attention.width_axis):
            for table in (axis.query_positions, axis.key_positions, axis.value_positions):
                table.zero_()
        torch.testing.assert_close(attention(x), attention(x.flip(3)).flip(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_blocks=(1, 1, 1)), "one entry per encoder map"),
        (dict(block_types=("axial", "axial", "bottleneck", "conv")), "'conv'"),
        (dict(base_channels=(12, 8, 4, 4)), "12 of an axial stage is no multiple of 8"),
        (dict(in_strides=[32, 16, 8, 4]), "finest"),
    ],
)
def test_decoder_names_wrong_arguments(arguments, message):
    defaults = dict(in_channels=[8] * 4, in_strides=[4, 8, 16, 32])
    with pytest.raises(ValueError, match=message):
        KMaXPixelDecoder(**defaults | arguments)


def test_head_names_wrong_arguments():
    with pytest.raises(ValueError, match="aux_semantic names 'deplab'; did you mean 'deeplab'"):
        tiny_model(**{"model.head.aux_semantic": "deplab"})
    with pytest.raises(ValueError, match="tasks names 'panoptik'; did you mean 'panoptic'"):
        tiny_model(**{"model.head.tasks": ["panoptik"]})


# The published rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [(4, 5), (5, 4)])
def test_fusion_aligns_corners_by_the_coarse_width(low):
    fusion = Fusion(6, 8, 8).eval()
    x, high = torch.randn(1, 6, *low), torch.randn(1, 8, 9, 9)
    expected = F.interpolate(fusion.low(F.gelu(x)), (9, 9), mode="bilinear", align_corners=low[1] == 5) + high
    assert fusion.high is None, "equal channels: the finer map is taken as it is"
    torch.testing.assert_close(fusion(x, high), expected)


@pytest.mark.parametrize("size", [(8, 9), (9, 8)])
def test_aux_outputs_align_corners_by_the_final_height(size):
    output = {name: torch.randn(1, 2, 3, 3) for name in ("pred_masks", "pixel_feature", "pred_logits")}
    resized = resize_aux_output(output, size)
    for name in ("pred_masks", "pixel_feature"):
        expected = F.interpolate(output[name], size, mode="bilinear", align_corners=size[0] == 9)
        torch.testing.assert_close(resized[name], expected)


def test_cityscapes_decoder_order():
    """Official order of the stages: res5, res4, res3, then stem before res2 in ResNet, res2 before stem in ConvNeXt."""
    for config, channels in (
        ("kmax_r50_cityscapes.py", [2048, 1024, 512, 64, 256]),
        ("kmax_convnext_l_cityscapes.py", [1536, 768, 384, 192, 192]),
    ):
        with torch.device("meta"):
            model = densepred.build_model(CONFIGS / config)
        assert [len(norm.weight) for norm in model.decoder.in_norms] == channels
        assert model.decoder.channels == 128
        assert model.head.num_classes == 19
    assert len(model.head.aux_semantic.layers[2].bias) == 19


def test_void_prior():
    """With all logits 0 the constant makes void 0.9 probable."""
    predictor = Predictor(4, 16, num_classes=7).eval()
    nn.init.zeros_(predictor.class_logits.weight)
    logits = predictor(torch.randn(1, 4, 3, 3), torch.randn(1, 16, 2), torch.randn(1, 16, 2))["pred_logits"]
    torch.testing.assert_close(logits.softmax(-1)[..., -1], torch.full((1, 2), 0.9))


def test_initial_values():
    torch.manual_seed(0)
    conv = ConvBN(400, 300, 3, norm_init=0.0).conv.weight
    std = math.sqrt(2 / 400)  # the kernel's area is ignored
    assert conv.abs().max() <= 2 * std
    assert abs(conv.std() / std - 0.8796) < 0.005, "cut at two standard deviations, not rescaled"
    depthwise = ConvBN(64, 64, 5, groups=64).conv.weight
    assert depthwise.abs().max() <= math.sqrt(6 / (25 + 25 * 64))
    model = tiny_model()
    for name, parameter in model.decoder.named_parameters():
        if name.endswith("conv_out.norm.weight"):
            assert not parameter.any(), name
    for layer in model.head.layers:
        assert not any(part.norm.weight.any() for part in (layer.kmeans_out, layer.attention_out, layer.ffn_out))
        assert layer.predictor.mask_norm.weight.item() == pytest.approx(0.1)
        assert layer.predictor.class_logits.weight.abs().max() <= 0.02
    norms = [
        m
        for part in (model.decoder, model.head)
        for m in part.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_mask_scale_reaches_every_predictor():
    model = tiny_model(**{"model.head.mask_scale": 2.0}).train()
    out = model(torch.randn(2, 3, 65, 97), mode="tensor")
    assert abs(out["pred_masks"].std() - 2.0) < 0.01
    assert {part.mask_norm.weight.item() for part in model.modules() if isinstance(part, Predictor)} == {2.0}


# Targets and losses ---------------------------------------------------------------------------------------------------


def test_targets_at_stride_four():
    ids = torch.zeros(9, 13, dtype=torch.int32)
    ids[:, 4:] = 1
    ids[1:4, 1:4] = 2  # between the samples: vanishes
    ids[4:8, 0:4] = 3
    ids[8:, 8:] = 4
    labels = {1: 7, 2: 3, 3: 0, 4: 7}
    records = [dict(id=i, label=c, isthing=c < 5, iscrowd=i == 4) for i, c in labels.items()]
    targets = strided_targets(PanopticMap(ids, records))
    assert targets["labels"].tolist() == [7, 0]
    assert targets["masks"].shape == (2, 3, 4)
    assert targets["semantic"].tolist() == [[-1, 7, 7, 7], [0, 7, 7, 7], [-1, 7, -1, -1]]


@pytest.mark.parametrize("segments", [3, 0])
def test_training_reaches_every_parameter(segments):
    model = tiny_model(**{"model.head.drop_path": 0.5}).train()
    images = torch.randn(2, 3, 65, 97)
    losses = model(images, [sample(65, 97, segments), sample(65, 97, 3)], mode="loss")
    assert len(losses) == 5 + 6 * 4
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_no_labels_at_all_is_finite():
    model = tiny_model().train()
    losses = model(torch.randn(2, 3, 65, 65), [sample(65, 65, 0), sample(65, 65, 0)], mode="loss")
    assert all(value.isfinite() for value in losses.values())


def test_one_image_a_process():
    image, truth = torch.randn(1, 3, 65, 65), [sample(65, 65)]
    with pytest.raises(ValueError, match=r"batch_size to 2 or more, or aux_semantic to 'stride32'"):
        tiny_model().train()(image, truth, mode="loss")
    model = tiny_model(**{"model.head.aux_semantic": "stride32"}).train()
    assert sum(model(image, truth, mode="loss").values()).isfinite()


def test_training_needs_a_criterion():
    model = tiny_model()
    model.head.criterion = None
    with pytest.raises(ValueError, match="criterion is None"):
        model.train()(torch.randn(2, 3, 65, 65), [sample(65, 65)] * 2, mode="loss")


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_tasks_and_their_sizes(size):
    model = tiny_model(**{"model.head.tasks": ["panoptic", "semantic", "instance"]}).eval()
    meta = dict(ori_shape=(120, 200), img_shape=(58, size[1]), pad_shape=size)
    samples = [SegSample(metainfo=meta)]
    with torch.no_grad():
        (result,) = model(torch.randn(1, 3, *size), samples, mode="predict")
    assert result.pred_panoptic.ids.shape == (120, 200)
    assert result.pred_semantic.shape == (120, 200)
    assert result.pred_semantic.max() < 5
    assert set(result.pred_instances.labels.tolist()) <= {0, 1, 2}


# Precision, compilers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Autocast and a model in half precision both run, stay finite and give the same masks up to rounding."""
    model, image = tiny_model().eval(), torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        exact = model(image, mode="tensor")
        with torch.autocast("cpu", dtype=dtype):
            cast = model(image, mode="tensor")
        half = model.to(dtype)(image.to(dtype), mode="tensor")
    assert half["pred_masks"].dtype == dtype
    for out in (cast, half):
        first = out["aux_outputs"][0]["pred_masks"].float()  # before any assignment could flip
        assert (first - exact["aux_outputs"][0]["pred_masks"]).abs().max() < 0.05
        assert all(out[name].isfinite().all() for name in ("pred_masks", "pred_logits", "pixel_feature"))


def test_training_under_autocast():
    model = tiny_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(torch.randn(2, 3, 65, 97), [sample(65, 97)] * 2, mode="loss")
    assert {value.dtype for value in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class MasksAndLogits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(image, mode="tensor")
        return out["pred_masks"], out["pred_logits"]


def test_exports_for_other_sizes():
    """One graph for all sides 64 k + 1: there every parity that steers align_corners is odd."""
    net = MasksAndLogits(tiny_model(**{"model.head.num_layers": (1, 1, 1)}).eval())
    sides = {2: 64 * torch.export.Dim("h", min=2, max=60) + 1, 3: 64 * torch.export.Dim("w", min=2, max=60) + 1}
    with torch.no_grad():
        program = torch.export.export(net, (torch.randn(1, 3, 129, 193),), dynamic_shapes=[sides])
        image = torch.randn(1, 3, 193, 129)
        torch.testing.assert_close(program.module()(image), net(image))


# Configs --------------------------------------------------------------------------------------------------------------

PUBLISHED = {  # million parameters without the auxiliary head, and in total; queries; iterations; learning rate; batch
    "kmax_r50_coco": (56.6, 72.4, 128, 150_000, 5e-4, 64),
    "kmax_convnext_t_coco": (60.9, 67.3, 128, 150_000, 5e-4, 64),
    "kmax_convnext_s_coco": (82.6, 88.9, 128, 150_000, 5e-4, 64),
    "kmax_convnext_b_coco": (121.5, 129.8, 128, 150_000, 5e-4, 64),
    "kmax_convnext_l_coco": (231.8, 243.9, 128, 150_000, 5e-4, 64),
    "kmax_r50_cityscapes": (56.4, 57.0, 256, 60_000, 3e-4, 32),
    "kmax_convnext_l_cityscapes": (231.7, 232.1, 256, 60_000, 3e-4, 32),
    "kmax_r50_ade20k": (56.6, 72.5, 128, 100_000, 5e-4, 64),
    "kmax_convnext_l_ade20k": (231.9, 243.9, 128, 100_000, 5e-4, 64),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_hold_the_published_recipe(name):
    inference, total, queries, iterations, rate, batch = PUBLISHED[name]
    cfg = densepred.load_config(CONFIGS / f"{name}.py")
    with torch.device("meta"):
        model = densepred.build_model(CONFIGS / f"{name}.py")
    count = sum(p.numel() for p in model.parameters()) / 1e6
    auxiliary = sum(p.numel() for p in model.head.aux_semantic.parameters()) / 1e6
    assert (count - auxiliary, count) == pytest.approx((inference, total), abs=0.06)
    assert model.head.cluster_centers.shape == (256, queries)
    assert (cfg.train_cfg.max_iters, cfg.param_scheduler[0].end) == (iterations, iterations)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.auto_scale_lr.base_batch_size) == (rate, batch)
    drop = {"coco": 0.2, "cityscapes": 0.2, "ade20k": 0.0}[name.rsplit("_", 1)[1]]
    assert {layer.drop_path for layer in model.head.layers} == {drop}
    dataset = densepred.registry.DATASETS.get(cfg.val_dataloader.dataset.type)
    assert [i for i, thing in enumerate(dataset.METAINFO["isthing"]) if thing] == list(cfg.thing_classes)
    assert len(dataset.METAINFO["classes"]) == cfg.num_classes == model.head.criterion.num_classes
