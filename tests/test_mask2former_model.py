"""Mask2Former's decoder and head: sizes, initial values, the attention mask, targets, precision, arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor, nn

from densepred.decoders import DeformablePixelDecoder, KMaXPixelDecoder
from densepred.decoders.deformable import cell_centres, pointwise, sine_positions
from densepred.heads import KMaXHead, Mask2FormerHead
from densepred.heads.mask2former import attention_mask, mask_targets
from densepred.structures import Features, PanopticMap, SegSample

CHANNELS, STRIDES = [8, 12, 16, 20], [4, 8, 16, 32]


def small_decoder(**options) -> DeformablePixelDecoder:
    torch.manual_seed(0)
    defaults = dict(embed_dim=64, mask_dim=24, num_layers=2, num_heads=4, num_points=2, ffn_dim=48)
    return DeformablePixelDecoder(CHANNELS, STRIDES, **defaults | options)


def small_head(level_channels=(64, 64, 64), **options) -> Mask2FormerHead:
    torch.manual_seed(1)
    defaults = dict(thing_classes=[0, 1], num_queries=6, embed_dim=64, num_heads=4, ffn_dim=48, num_layers=4)
    return Mask2FormerHead(24, level_channels, CHANNELS, 5, **defaults | options)


class Net(nn.Module):
    """Decoder and head on an encoder's maps."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.head = small_decoder(), small_head()

    def forward(self, *maps: Tensor, deep_supervision: bool = True) -> dict:
        return self.head(self.decoder(list(maps)), deep_supervision=deep_supervision)


def encoder_maps(height: int, width: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(2)
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
    return [torch.randn(batch, c, *size, dtype=dtype) for c, size in zip(CHANNELS, sizes, strict=True)]


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (20, 31), (1, 1), (33, 130)])
def test_any_size_and_both_forms_agree(size):
    """Odd sides and levels of one pixel too; what inner layers do not predict at full size changes nothing."""
    net = Net().double().eval()
    maps = encoder_maps(*size, batch=2, dtype=torch.float64)
    with torch.no_grad():
        features = net.decoder(maps)
        full, plain = net(*maps), net(*maps, deep_supervision=False)
    assert features.pixels.shape == (2, 24, *maps[0].shape[2:])
    assert [x.shape[2:] for x in features.levels] == [x.shape[2:] for x in maps[:0:-1]]
    assert full["pred_logits"].shape == (2, 6, 6)
    assert full["pred_masks"].shape == (2, 6, *maps[0].shape[2:])
    assert len(full.pop("aux_outputs")) == 4
    assert plain.keys() == full.keys()
    for name, value in plain.items():
        torch.testing.assert_close(value, full[name], rtol=0, atol=1e-12)


def test_images_of_a_batch_do_not_meet():
    net, maps = Net().double().eval(), encoder_maps(64, 96, batch=2, dtype=torch.float64)
    with torch.no_grad():
        both, second = net(*maps), net(*(x[1:] for x in maps))
    torch.testing.assert_close(both["pred_masks"][1:], second["pred_masks"], rtol=0, atol=1e-12)


def test_first_prediction_is_of_the_learned_queries():
    net, maps = Net().eval(), encoder_maps(64, 96, batch=2)
    logits = net(*maps)["aux_outputs"][0]["pred_logits"]
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[0], net.head.class_embed(net.head.decoder_norm(net.head.query_feat)))


def test_levels_of_another_width_are_projected():
    head = small_head(level_channels=(32, 64, 16))
    assert [name for name, _ in head.input_proj.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    levels = [torch.randn(1, c, side, side) for c, side in ((32, 2), (64, 4), (16, 8))]
    out = head(Features(pixels=torch.randn(1, 24, 16, 16), levels=levels, encoder=[]))
    assert out["pred_masks"].shape == (1, 6, 16, 16)


# The pixel decoder ----------------------------------------------------------------------------------------------------


def test_decoder_runs_in_steps():
    decoder, maps = small_decoder().eval(), encoder_maps(64, 96)
    with torch.no_grad():
        memory, context = decoder.start(maps)
        coarsest = decoder.input_proj[0](maps[3])
        torch.testing.assert_close(decoder.summary(memory, context), coarsest.mean((2, 3)))
        for i in range(decoder.num_layers):
            memory = decoder.step(i, memory, context)
        stepped, whole = decoder.finish(memory, context, maps), decoder(maps)
    assert torch.equal(stepped.pixels, whole.pixels)
    assert all(map(torch.equal, stepped.levels, whole.levels))
    assert all(a is b for a, b in zip(whole.encoder, maps, strict=True))
    assert decoder.channels == whole.pixels.shape[1]
    assert decoder.level_channels == [x.shape[1] for x in whole.levels]


def test_layer_flops_are_the_published_ones():
    with torch.device("meta"):
        decoder = DeformablePixelDecoder([96, 192, 384, 768], STRIDES)
        _, context = decoder.start([torch.empty(1, 96 * 2**i, 256 >> i, 512 >> i) for i in range(4)])
    assert decoder.layer_flops(context) == 43_008 * 731_648


def test_sampling_starts_along_rays():
    attention = DeformablePixelDecoder(CHANNELS, STRIDES).layers[0].self_attn
    bias = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    torch.testing.assert_close(bias[1, 2, 3], torch.tensor([4.0, 4.0]))  # an eighth turn, fourth point
    torch.testing.assert_close(bias[4, 0, 1], torch.tensor([-2.0, 0.0]))
    assert not any(p.any() for p in (attention.sampling_offsets.weight, *attention.attention_weights.parameters()))
    assert not any(p.any() for p in (attention.value_proj.bias, attention.output_proj.bias))


def test_deformable_attention_samples_its_neighbours():
    """With identity projections and equal weights a token is the mean of the pixels its offsets name."""
    decoder = small_decoder(num_points=1)
    attention = decoder.layers[0].self_attn
    maps = encoder_maps(64, 96)
    with torch.no_grad():
        for linear in (attention.value_proj, attention.output_proj):
            linear.weight.copy_(torch.eye(64))
        attention.sampling_offsets.bias.view(4, 3, 2).copy_(torch.tensor([1.0, 0.0]))  # one pixel to the right
        memory, context = decoder.start(maps)
        token = attention(memory, context)[0, 6 + 24 + 2 * 12 + 5]  # stride 8, row 2, column 5
        levels = context.split(memory)
        places = torch.tensor([5.5 / 12, 2.5 / 8])
        expected = []
        for level in levels:
            place = 2 * (places + torch.tensor([1 / level.shape[3], 0.0])) - 1
            expected.append(F.grid_sample(level, place[None, None, None], align_corners=False)[0, :, 0, 0])
    torch.testing.assert_close(token, torch.stack(expected).mean(0))


def test_sine_positions():
    """Rows first; the last cell is a full turn; the slowest frequency is nearly 10000 times slower."""
    encoding = sine_positions(3, 5, 64, torch.zeros(1, dtype=torch.float64)).view(3, 5, 64)
    assert encoding.dtype == torch.float64
    angle = 2 * math.pi * 2 / (3 + 1e-6)
    assert encoding[1, 4, 0].item() == pytest.approx(math.sin(angle), abs=1e-12)
    assert encoding[1, 4, 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
    assert encoding[1, 4, 30].item() == pytest.approx(math.sin(angle / 10000 ** (30 / 32)), abs=1e-12)
    assert encoding[1, 0, 33].item() == pytest.approx(math.cos(2 * math.pi / (5 + 1e-6)), abs=1e-12)
    torch.testing.assert_close(encoding[1, :, :32], encoding[1, :1, :32].expand(5, -1))
    half = sine_positions(3, 5, 64, torch.zeros(1, dtype=torch.bfloat16))
    torch.testing.assert_close(half, encoding.flatten(0, 1).bfloat16())


def test_cell_centres():
    centres = cell_centres(2, 4, torch.zeros(1))
    torch.testing.assert_close(centres[[0, 3, 4]], torch.tensor([[0.125, 0.25], [0.875, 0.25], [0.125, 0.75]]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_is_a_convolution(layout):
    x, weight, bias = torch.randn(2, 6, 3, 5).contiguous(memory_format=layout), torch.randn(4, 6, 1, 1), torch.randn(4)
    torch.testing.assert_close(pointwise(x, weight, bias), F.conv2d(x, weight, bias))
    torch.testing.assert_close(pointwise(x, weight), F.conv2d(x, weight))


# The attention mask ---------------------------------------------------------------------------------------------------


def test_attention_mask_frees_blocked_queries():
    logits = torch.tensor([[[[-1.0, 2.0]], [[-3.0, -0.5]], [[0.0, -1.0]]]])
    assert attention_mask(logits).tolist() == [[[False, True], [True, True], [True, False]]]


def test_masked_pixels_are_not_read():
    """What lies where a query's mask is background does not change the query."""
    head = small_head(num_layers=1).eval()
    with torch.no_grad():
        head.query_feat.copy_(head.query_feat[:1].expand_as(head.query_feat))  # self-attention passes nothing on
        head.query_embed.zero_()
        levels = [torch.randn(1, 64, n, n) for n in (2, 4, 8)]
        pixels = torch.randn(1, 24, 16, 16)
        first = head(Features(pixels, levels, []))
        seen = F.interpolate(first["aux_outputs"][0]["pred_masks"][:, :1], size=(2, 2), mode="bilinear") >= 0
        assert 0 < seen.sum() < 4, "the case needs a mask that is neither empty nor full"
        hidden = torch.where(seen, levels[0], levels[0] + 5 * torch.randn(1, 64, 2, 2))
        shown = torch.where(seen, levels[0] + 5, levels[0])
        other = head(Features(pixels, [hidden, *levels[1:]], []))
        changed = head(Features(pixels, [shown, *levels[1:]], []))
    torch.testing.assert_close(other["pred_logits"], first["pred_logits"])
    assert not torch.allclose(changed["pred_logits"], first["pred_logits"], atol=1e-3)


def test_layers_read_the_levels_in_turn():
    head = small_head(num_layers=3)
    levels = [torch.randn(1, 64, n, n, requires_grad=True) for n in (2, 4, 8)]
    out = head(Features(torch.randn(1, 24, 16, 16), levels, []))
    reached = [torch.autograd.grad(o["pred_logits"].sum(), levels, retain_graph=True, allow_unused=True)
               for o in out["aux_outputs"][1:]]  # fmt: skip
    assert [[g is not None for g in grads] for grads in reached] == [[True, False, False], [True, True, False]]


# Targets, losses, predictions -----------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 1, 2], [3, 0, 2]])
RECORDS = [dict(id=i, label=c, isthing=c < 2, iscrowd=i == 2) for i, c in ((1, 4), (2, 0), (3, 1), (7, 1))]


def test_targets_of_instances_come_first():
    instances = InstanceData(labels=torch.tensor([3]), masks=torch.ones(1, 2, 3, dtype=torch.bool))
    sample = SegSample(gt_instances=instances, gt_panoptic=PanopticMap(IDS, RECORDS), gt_semantic=IDS)
    targets = mask_targets(sample)
    assert targets["labels"].tolist() == [3]
    assert targets["masks"].all()


def test_targets_of_panoptic_segments():
    """Crowds are left out; a segment without a pixel is a target, as published."""
    targets = mask_targets(SegSample(gt_panoptic=PanopticMap(IDS, RECORDS), gt_semantic=IDS))
    assert targets["labels"].tolist() == [4, 1, 1]
    assert targets["masks"].int().tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]]


def test_targets_of_a_semantic_map():
    targets = mask_targets(SegSample(gt_semantic=torch.tensor([[2, 255, 0], [2, 2, 255]])))
    assert targets["labels"].tolist() == [0, 2]
    assert targets["masks"].dtype == torch.bool
    assert targets["masks"].int().tolist() == [[[0, 0, 1], [0, 0, 0]], [[1, 0, 0], [1, 1, 0]]]


@pytest.mark.parametrize(
    "fields",
    [
        dict(gt_panoptic=PanopticMap(torch.zeros(2, 3, dtype=torch.int32), [])),
        dict(gt_semantic=torch.full((2, 3), 255)),
        dict(gt_instances=InstanceData(labels=torch.zeros(0).long(), masks=torch.zeros(0, 2, 3, dtype=torch.bool))),
    ],
)
def test_targets_of_an_empty_image(fields):
    targets = mask_targets(SegSample(**fields))
    assert (targets["masks"].shape, targets["masks"].dtype) == ((0, 2, 3), torch.bool)
    assert (targets["labels"].shape, targets["labels"].dtype) == ((0,), torch.int64)


def test_targets_need_ground_truth():
    with pytest.raises(ValueError, match=r"street\.png has no ground truth.*gt_instances, gt_panoptic or gt_semantic"):
        mask_targets(SegSample(metainfo=dict(img_path="street.png")))


def test_training_reaches_every_parameter():
    net = Net().train()
    net.head = small_head(criterion=dict(type="Mask2FormerCriterion", num_classes=5, num_points=32))
    samples = [SegSample(gt_semantic=torch.arange(6).repeat_interleave(16).expand(64, 96).clamp(max=4))] * 2
    losses = net.head.loss(net(*encoder_maps(64, 96, batch=2)), samples)
    assert len(losses) == 5 * 3
    sum(losses.values()).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_loss_needs_a_criterion():
    with pytest.raises(ValueError, match="criterion is None"):
        small_head().loss({}, [])


def test_predictions_of_every_task():
    net = Net().eval()
    net.head = small_head(tasks=("panoptic", "semantic", "instance"), max_instances=20, object_mask_threshold=0.1)
    meta = dict(pad_shape=(64, 96), img_shape=(60, 90), ori_shape=(30, 45))
    with torch.no_grad():
        (result,) = net.head.predict(net(*encoder_maps(64, 96), deep_supervision=False), [meta])
    assert result["pred_panoptic"].ids.shape == result["pred_semantic"].shape == (30, 45)
    assert result["pred_instances"].masks.shape[1:] == (30, 45)
    assert 0 < len(result["pred_instances"].labels) <= 20
    assert set(result["pred_instances"].labels.tolist()) <= {0, 1}
    net.head.tasks = ("semantic",)
    with torch.no_grad():
        (alone,) = net.head.predict(net(*encoder_maps(64, 96), deep_supervision=False), [meta])
    assert list(alone) == ["pred_semantic"]


# Precision, export, arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Autocast and a model in half precision stay finite and near the exact values before any mask could flip."""
    net, maps = Net().eval(), encoder_maps(64, 96)
    with torch.no_grad():
        exact = net(*maps)["aux_outputs"][0]["pred_masks"]
        with torch.autocast("cpu", dtype=dtype):
            cast = net(*maps)
        half = net.to(dtype)(*(x.to(dtype) for x in maps))
    assert half["pred_masks"].dtype == dtype
    for out in (cast, half):
        assert (out["aux_outputs"][0]["pred_masks"].float() - exact).abs().max() < 0.05 * exact.abs().max()
        assert all(out[name].isfinite().all() for name in ("pred_masks", "pred_logits"))


def test_exports_for_other_sizes():
    """One graph for all sides that are multiples of 32."""
    net = Net().eval()
    net.decoder, net.head = small_decoder(num_layers=1), small_head(num_layers=1)
    sides = {2: torch.export.Dim("h", min=2, max=60), 3: torch.export.Dim("w", min=2, max=60)}
    shapes = tuple({axis: 32 // stride * side for axis, side in sides.items()} for stride in STRIDES)
    with torch.no_grad():
        program = torch.export.export(net, tuple(encoder_maps(96, 160)), dynamic_shapes=(shapes,))
        maps = encoder_maps(128, 64)
        torch.testing.assert_close(program.module()(*maps)["pred_masks"], net(*maps)["pred_masks"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(in_channels=CHANNELS[1:], in_strides=STRIDES[1:]), r"four encoder maps.*'res2'"),
        (dict(in_strides=STRIDES[::-1]), r"in_strides=\[32, 16, 8, 4\].*finest"),
        (dict(embed_dim=72), "embed_dim=72 is no multiple of its GroupNorms' groups, 32"),
        (dict(embed_dim=96, num_heads=5), "embed_dim=96 is no multiple of num_heads, 5"),
    ],
)
def test_decoder_names_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformablePixelDecoder(**dict(in_channels=CHANNELS, in_strides=STRIDES) | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(level_channels=(64, 64)), r"reads 3 levels.*hands on 2: level_channels=\[64, 64\]"),
        (dict(embed_dim=66), "embed_dim=66 is no multiple of num_heads, 4"),
        (dict(embed_dim=6, num_heads=3), "embed_dim=6 is no multiple of 4"),
        (dict(tasks=("panoptik",)), "tasks names 'panoptik'; did you mean 'panoptic'"),
        (dict(thing_classes=None), "panoptic task needs thing_classes"),
    ],
)
def test_head_names_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_head(**arguments)


# The flag in the other head -------------------------------------------------------------------------------------------


def test_kmax_without_deep_supervision():
    torch.manual_seed(0)
    decoder = KMaXPixelDecoder(CHANNELS, STRIDES, (1, 1, 1, 1), base_channels=(8, 8, 4, 4)).eval()
    options = dict(num_classes=5, thing_classes=[0], num_queries=4, embed_dim=32, aux_semantic=None)
    head = KMaXHead(decoder.channels, decoder.level_channels, CHANNELS, **options).eval()
    with torch.no_grad():
        features = decoder(encoder_maps(65, 97))
        full, plain = head(features), head(features, deep_supervision=False)
    assert len(full.pop("aux_outputs")) == 6
    assert plain.keys() == full.keys()
    assert all(torch.equal(plain[name], full[name]) for name in full)
