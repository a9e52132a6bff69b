"""VWFormer's decoder: its parts against plain formulations, sizes, initialisation, the shared norm, precision, export."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import convert_sync_batchnorm
from torch import nn

from densepred.decoders import VWFormerDecoder
from densepred.decoders.vwformer import VARIANTS, MultiheadAttention, embed_patches, fuse, pad_to_windows
from tests.test_varying_window_attention import contexts

CHANNELS, STRIDES = (8, 16, 24, 40), (4, 8, 16, 32)


def build(variant="ade20k", **options) -> VWFormerDecoder:
    torch.manual_seed(0)
    return VWFormerDecoder(CHANNELS, STRIDES, variant=variant, **{"channels": 64, "mask_dim": 32, **options})


def pyramid(height, width, batch=2, channels=CHANNELS, strides=STRIDES, dtype=torch.float32):
    return [
        torch.randn(batch, c, -(-height // s), -(-width // s), dtype=dtype)
        for c, s in zip(channels, strides, strict=True)
    ]


def randomised(decoder: nn.Module) -> nn.Module:
    """Give every norm numbers of its own, so that nothing is zero or one by chance."""
    for module in decoder.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return decoder


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
def test_fuse_is_the_convolution_of_the_concatenation(upsampling):
    layer = randomised(ConvModule(12, 8, 1, norm_cfg=dict(type="BN"))).double()
    maps = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in ((3, (3, 4)), (5, (1, 1)), (4, (9, 7)))]
    options = dict(align_corners=False) if upsampling == "bilinear" else {}
    resized = [F.interpolate(x, size=(9, 7), mode=upsampling, **options) for x in maps]
    torch.testing.assert_close(fuse(layer, maps, torch.Size((9, 7)), upsampling), layer(torch.cat(resized, dim=1)))


@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
def test_patches_are_embedded_at_every_position(ratio):
    layer = randomised(ConvModule(5, 3, ratio, norm_cfg=dict(type="BN"))).double()
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    before, after = (ratio - 1) // 2, ratio // 2
    torch.testing.assert_close(embed_patches(layer, x), layer(F.pad(x, (before, after, before, after))))


def test_padding_repeats_the_last_row_and_column():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    padded = pad_to_windows(x)
    assert padded.shape == (1, 1, 8, 8)
    assert torch.equal(padded[..., :2, :3], x)
    assert (padded[..., 2:, 1] == 4).all() and (padded[..., 0, 3:] == 2).all() and (padded[..., 2:, 3:] == 5).all()
    whole = torch.zeros(1, 1, 16, 8)
    assert pad_to_windows(whole) is whole


@pytest.mark.parametrize("size", [(16, 24), (13, 17)])
def test_multihead_attention_is_pytorchs_over_windows(size):
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(16, 4).double(), nn.MultiheadAttention(16, 4, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    padded = pad_to_windows(x)
    context = torch.randn(2, 4, *padded.shape[-2:], dtype=torch.float64)
    tokens = contexts(context, (2, 2), (8, 8))  # (B, 8, 8, p, p, C)
    windows = padded.unflatten(3, (8, -1)).unflatten(2, (8, -1)).permute(0, 2, 4, 3, 5, 1)
    queries, keys = (tensor.flatten(3, 4).flatten(0, 2) for tensor in (windows, tokens))
    expected = theirs(queries, keys, keys, need_weights=False)[0].view(tokens.shape)
    expected = expected.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)[..., : size[0], : size[1]]
    torch.testing.assert_close(ours(x, context, 2), expected)


# The decoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(75, 98), (3, 1)], ids=str)
def test_any_size(variant, size):
    decoder, maps = build(variant), pyramid(*size)
    features = decoder(maps)
    assert features.pixels.shape == (2, decoder.channels, *maps[0].shape[-2:])
    assert decoder.channels == (32 if VARIANTS[variant].mask_features else 64)
    assert decoder.level_channels == [32] * (3 if variant.startswith("mask2former") else 0)
    assert [x.shape[1:] for x in features.levels] == [(32, *x.shape[-2:]) for x in maps[:0:-1]][: len(features.levels)]
    assert all(ours is theirs for ours, theirs in zip(features.encoder, maps, strict=True))
    (features.pixels.square().sum() + sum(x.square().sum() for x in features.levels)).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("channels", "strides"), [((8, 8, 16, 24, 40), (2, 4, 8, 16, 32)), ((8, 16, 24, 40), (4, 8, 8, 8))], ids=str
)
@pytest.mark.parametrize("variant", ["ade20k", "mask2former"])
def test_any_encoder(channels, strides, variant):
    decoder = VWFormerDecoder(channels, strides, variant=variant, channels=64)
    maps = pyramid(50, 70, channels=channels, strides=strides)
    assert decoder(maps).pixels.shape[-2:] == maps[-4].shape[-2:]


@pytest.mark.parametrize(
    ("variant", "widths", "channels", "classes", "millions"),
    [
        ("ade20k", (96, 192, 384, 768), 512, 150, 7.62),
        ("ade20k", (32, 64, 160, 256), 128, 150, 0.52),
        ("mask2former", (96, 192, 384, 768), 512, 0, 7.74),
        ("mask2former_deform", (96, 192, 384, 768), 512, 0, 11.32),
    ],
)
def test_as_many_parameters_as_published(variant, widths, channels, classes, millions):
    """The published heads hold their classifier, the pixel decoders none."""
    with torch.device("meta"):
        decoder = VWFormerDecoder(widths, STRIDES, variant=variant, channels=channels)
    total = sum(p.numel() for p in decoder.parameters()) + (channels + 1) * classes
    assert round(total / 1e6, 2) == millions


def test_starts_with_branches_of_the_shortcut_alone():
    """The attention's last norm starts at zero: only the fused map passes at first, and the attention learns of it."""
    for shortcut in (True, False):
        decoder, maps = build(shortcut=shortcut), pyramid(64, 64)
        before = decoder(maps).pixels
        for attention in decoder.attn:
            assert 0.008 < attention.theta.conv.weight.std() < 0.012 and attention.phi.conv.weight.std() > 0.1
            nn.init.normal_(attention.g.conv.weight)
        assert torch.equal(decoder(maps).pixels, before)
        for attention in decoder.attn:
            nn.init.ones_(attention.conv_out.norm.weight)
        assert not torch.allclose(decoder(maps).pixels, before)
    with_it, without = (build(shortcut=shortcut)(maps).pixels for shortcut in (True, False))
    assert not torch.allclose(with_it, without)


@pytest.mark.parametrize(("variant", "layers"), [("mask2former", 7), ("mask2former_deform", 6), ("maskformer", 7)])
def test_one_group_norm_serves_all_layers(variant, layers):
    for decoder in (build(variant), copy.deepcopy(build(variant)), convert_sync_batchnorm(build(variant))):
        names = [name for name, _ in decoder.named_parameters(remove_duplicate=False) if name.endswith("gn.weight")]
        shared = [name for name in names if decoder.get_parameter(name) is decoder.linear_fuse.gn.weight]
        assert len(shared) == layers and "low_level_fuse.gn.weight" not in shared
        assert set(shared) <= set(decoder.state_dict())
    decoder.load_state_dict(randomised(build(variant)).state_dict())
    assert not torch.equal(decoder.cat.gn.weight, build(variant).cat.gn.weight)
    assert {type(m) for m in build("cityscapes").modules()}.isdisjoint({nn.GroupNorm})


def test_the_published_options_can_be_changed():
    decoder = build("cityscapes", num_heads=4, shortcut=True, ratios=(2, 4), low_level_channels=12)
    assert len(decoder.attn) == len(decoder.ds) == 2 and decoder.cat.conv.in_channels == 3 * 64
    assert decoder.low_level_fuse.conv.in_channels == 64 + 12
    maps = pyramid(64, 96)
    pixels = decoder.eval()(maps).pixels
    decoder.attn[0].num_heads = 8
    assert not torch.allclose(decoder(maps).pixels, pixels)


def test_the_attention_looks_at_all_of_a_small_map_and_not_beyond_its_windows():
    """With the ratio 8 every window sees the whole map; with 2, a window its neighbourhood."""
    for ratio, reaches in ((8, True), (2, False)):
        decoder = randomised(build("cityscapes", ratios=(ratio,), num_heads=1)).eval()
        c2 = torch.randn(1, 16, 16, 16, requires_grad=True)
        decoder([torch.randn(1, 8, 16, 16), c2, torch.randn(1, 24, 1, 1), torch.randn(1, 40, 1, 1)]).pixels[
            ..., 0, 0
        ].square().sum().backward()
        assert bool(c2.grad[..., 15, 15].any()) == reaches and bool(c2.grad[..., 0, 0].any())


# Precision, export, arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["ade20k", "mask2former_deform"])
def test_stays_in_float64_and_trains_in_bfloat16(variant):
    decoder = build(variant)
    with torch.autocast("cpu", torch.bfloat16):
        features = decoder(pyramid(64, 64))
    features.pixels.float().sum().backward()
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in decoder.parameters()
    )
    assert decoder.double()(pyramid(64, 64, dtype=torch.float64)).pixels.dtype == torch.float64


def test_exports_for_other_sizes():
    decoder = build().eval()
    net = nn.Module()
    net.decoder = decoder
    net.forward = lambda *maps: decoder(list(maps)).pixels
    sides = [torch.export.Dim(name, min=2, max=20) for name in "hw"]
    shapes = [{i: 64 // s * side for i, side in zip((2, 3), sides, strict=True)} for s in STRIDES]
    with torch.no_grad():
        program = torch.export.export(net, tuple(pyramid(128, 192, 1)), dynamic_shapes={"maps": tuple(shapes)})
        maps = pyramid(256, 128, 1)
        torch.testing.assert_close(program.module()(*maps), net(*maps), rtol=1e-4, atol=1e-5)


def test_a_batch_of_one_trains_only_without_the_pooled_norm():
    with pytest.raises(ValueError, match="a batch of one image"):
        build("ade20k")(pyramid(64, 64, batch=1))
    for decoder in (build("ade20k").eval(), build("cityscapes"), build("mask2former")):
        assert decoder(pyramid(64, 64, batch=1)).pixels.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(variant="ade20"), "variant='ade20'.*'ade20k'"),
        (dict(channels=96), "channels=96 must be a multiple of 64: of the ratios"),
        (dict(variant="cityscapes", num_heads=48), "channels=64 must be a multiple of 192"),
        (dict(variant="mask2former", mask_dim=40), "mask_dim=40 must be a multiple of 32"),
    ],
)
def test_refuses_what_does_not_divide(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_three_maps():
    with pytest.raises(ValueError, match="needs four encoder maps, not 3"):
        VWFormerDecoder((8, 16, 24), (4, 8, 16))
