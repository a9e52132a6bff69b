"""The Swin encoder: official maps, a window-by-window second derivation, any size, and its gradients."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densepred.encoders import swin
from densepred.encoders.swin import Block, SwinTransformer
from tests import parity

SMALL = dict(embed_dim=8, depths=(2, 1, 3, 2), num_heads=(1, 2, 2, 4))
PUBLISHED = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


def small(**kwargs):
    """A small Swin in float64 whose norms, biases and bias tables are all in play."""
    torch.manual_seed(0)
    model = SwinTransformer(**{**SMALL, "window_size": 3, **kwargs}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("gradients", [False, True])
def test_swin_tiny_reproduces_the_official_features(gradients):
    meta, expected = parity.case(parity.CASES / "eco_m2f_swin_t_coco")
    state = {k.removeprefix("backbone."): v for k, v in parity.filled_state(meta).items() if k.startswith("backbone.")}
    config = meta["config"]["backbone"]
    model = SwinTransformer(config["embed_dim"], config["depths"], config["heads"], config["window"]).double().eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    with torch.set_grad_enabled(gradients):
        maps = model(torch.from_numpy(parity.image_batch(meta)))  # of three images, the case shows the first's
    for name, found in zip(model.out_features, maps, strict=True):
        wanted = expected[f"image0_{name}"]
        error = np.abs(parity.thin(found[:1].detach().numpy(), meta["outputs"][f"image0_{name}"]) - wanted).max()
        assert error <= 1e-12 * np.abs(wanted).max(), name


def _attention_of_a_block(weights, x, window, shift):
    """Attention of one image (H, W, C), pair of tokens by pair of tokens: the definition, with no index trick."""
    height, width, channels = x.shape
    padded_height, padded_width = (-(-n // window) * window for n in (height, width))
    table = weights["relative_position_bias_table"]
    heads = table.shape[1]
    out = torch.zeros_like(x)
    for top in range(0, padded_height, window):
        for left in range(0, padded_width, window):
            # A window's places, in the map before the roll; those that came round belong to another region.
            ys, xs = ([(start + i + shift) for i in range(window)] for start in (top, left))
            places = [(y % padded_height, x_ % padded_width) for y in ys for x_ in xs]
            region = torch.tensor([2 * (y >= padded_height) + (x_ >= padded_width) for y in ys for x_ in xs])
            inside = [y < height and x_ < width for y, x_ in places]
            tokens = torch.stack(
                [x[p] if there else x.new_zeros(channels) for p, there in zip(places, inside, strict=True)]
            )
            q, k, v = F.linear(tokens, weights["qkv.weight"], weights["qkv.bias"]).chunk(3, dim=1)
            size = channels // heads
            grid = torch.tensor([(i, j) for i in range(window) for j in range(window)])
            offset = grid[:, None] - grid[None] + window - 1  # (N, N, 2)
            bias = table[offset[..., 0] * (2 * window - 1) + offset[..., 1]]  # (N, N, heads)
            mixed = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                logits = q[:, part] @ k[:, part].T / size**0.5 + bias[..., head]
                logits = torch.where(region[:, None] == region[None], logits, logits - 100)
                mixed.append(logits.softmax(dim=1) @ v[:, part])
            mixed = F.linear(torch.cat(mixed, dim=1), weights["proj.weight"], weights["proj.bias"])
            for place, there, value in zip(places, inside, mixed, strict=True):
                if there:
                    out[place] = value
    return out


def _reference_swin(state, images, depths, window):
    def under(prefix):
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def norm(x, w, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    outputs = []
    for image in images:
        w = under("patch_embed.")
        image = F.pad(image, (0, -image.shape[2] % 4, 0, -image.shape[1] % 4))
        x = norm(F.conv2d(image, w["proj.weight"], w["proj.bias"], stride=4).permute(1, 2, 0), w, "norm")
        maps = []
        for stage, depth in enumerate(depths):
            for i in range(depth):
                w = under(f"layers.{stage}.blocks.{i}.")
                attention = {k.removeprefix("attn."): v for k, v in w.items() if k.startswith("attn.")}
                x = x + _attention_of_a_block(attention, norm(x, w, "norm1"), window, window // 2 if i % 2 else 0)
                y = F.gelu(F.linear(norm(x, w, "norm2"), w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
                x = x + F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
            maps.append(norm(x, state, f"norm{stage}").permute(2, 0, 1))
            if stage < 3:
                w = under(f"layers.{stage}.downsample.")
                x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
                x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], dim=-1)
                x = F.linear(norm(x, w, "norm"), w["reduction.weight"])
        outputs.append(maps)
    return [torch.stack(maps) for maps in zip(*outputs, strict=True)]


@pytest.mark.parametrize(("size", "window"), [((37, 50), 3), ((48, 48), 4), ((9, 53), 5), ((1, 3), 3)])
@pytest.mark.parametrize("rows", [1, 40, 10_000])
def test_equals_a_derivation_window_by_window(size, window, rows, monkeypatch):
    monkeypatch.setattr(swin, "ROWS", rows)  # from a window at a time to all at once
    model = small(window_size=window)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = _reference_swin(model.state_dict(), images, SMALL["depths"], window)
        for a, b in zip(model(images), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradients_are_those_of_the_derivation():
    model = small()
    images = torch.randn(2, 3, 21, 30, dtype=torch.float64, requires_grad=True)
    parameters = dict(model.named_parameters())
    wanted = _reference_swin(parameters, images, SMALL["depths"], 3)
    weights = [torch.randn_like(m) for m in wanted]
    leaves = [images, *parameters.values()]
    gradients = [
        torch.autograd.grad(sum((w * m).sum() for w, m in zip(weights, maps, strict=True)), leaves)
        for maps in (model(images), wanted)
    ]
    for name, a, b in zip(["images", *parameters], *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1, float(b.abs().max())), msg=name)
        assert b.abs().max() > 0, name


def test_paths_with_and_without_gradients_agree_after_a_run_in_inference_mode():
    swin._remembered_windows.cache_clear()
    model, images = small(), torch.randn(1, 3, 45, 31, dtype=torch.float64)
    with torch.inference_mode():
        wanted = [m.clone() for m in model(images)]
    found = model(images)
    sum(m.square().sum() for m in found).backward()  # indices remembered in inference mode serve training
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=0, atol=1e-11)
    assert 0 < swin._remembered_windows.cache_info().currsize <= 8  # four stages, with and without shift


# Published totals less the classifier (1000 classes) and its norm, plus the four norms of the maps; window 7.
@pytest.mark.parametrize(
    ("name", "published", "width"),
    [("tiny", 28_288_354, 96), ("small", 49_606_258, 96), ("base", 87_768_224, 128), ("large", 196_532_476, 192)],
)
def test_parameter_counts_are_the_published_ones(name, published, width):
    with torch.device("meta"):
        model = SwinTransformer(**PUBLISHED[name])
    head, norm, norms = 8 * width * 1000 + 1000, 2 * 8 * width, 2 * 15 * width
    assert sum(p.numel() for p in model.parameters()) == published - head - norm + norms
    assert (model.channels, model.strides) == ([width, 2 * width, 4 * width, 8 * width], [4, 8, 16, 32])


@pytest.mark.parametrize("name", ["base", "large"])
def test_window_12_widens_the_bias_tables_and_nothing_else(name):
    with torch.device("meta"):
        narrow, wide = (SwinTransformer(**PUBLISHED[name], window_size=w).state_dict() for w in (7, 12))
    assert narrow.keys() == wide.keys()
    changed = {k: wide[k].shape for k in wide if wide[k].shape != narrow[k].shape}
    assert len(changed) == 24 and all(k.endswith("relative_position_bias_table") for k in changed)
    assert {shape[0] for shape in changed.values()} == {23**2}


def test_state_dict_holds_no_index_and_no_mask():
    keys = small().state_dict().keys()
    assert not [k for k in keys if "index" in k or "mask" in k]
    assert {"layers.2.blocks.1.attn.qkv.bias", "layers.0.downsample.reduction.weight", "norm3.weight"} <= keys


@pytest.mark.parametrize("size", [(33, 65), (47, 61), (64, 96), (2, 5)])
def test_maps_have_the_stated_channels_and_ceil_of_size_by_stride(size):
    model = small(out_features=("res4", "res2", "res5"))
    whole = small()(torch.ones(1, 3, *size, dtype=torch.float64))
    maps = model(torch.ones(1, 3, *size, dtype=torch.float64))
    assert model.strides == [16, 4, 32] and not hasattr(model, "norm1")
    for found, channels, stride in zip(maps, model.channels, model.strides, strict=True):
        assert found.shape == (1, channels, *(-(-n // stride) for n in size))
    assert [m.shape for m in whole] == [(1, 8 * 2**i, *(-(-n // (4 * 2**i)) for n in size)) for i in range(4)]


def test_drop_path_rises_linearly_and_is_off_in_evaluation():
    rates = [m.drop_path_rate for m in small(drop_path_rate=0.7).modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    dropping, plain = small(drop_path_rate=0.9), small(drop_path_rate=0)
    assert torch.equal(dropping(image)[-1], plain(image)[-1])
    assert not torch.equal(dropping.train()(image)[-1], plain(image)[-1])


def test_initial_weights_are_the_official_ones():
    torch.manual_seed(0)
    model = SwinTransformer(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    for name, parameter in model.named_parameters():
        if name.startswith("patch_embed.proj"):
            continue  # torch's own
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("cast", ["autocast", "bfloat16"])
def test_half_precision_stays_near(cast, gradients):
    model, image = small().float(), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        wanted = model(image)
    if cast == "bfloat16":
        model, image = model.bfloat16(), image.bfloat16()
    with torch.set_grad_enabled(gradients), torch.autocast("cpu") if cast == "autocast" else nullcontext():
        found = model(image)
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).abs().max() < 0.1 * b.abs().max()
    if gradients:
        sum(m.float().square().mean() for m in found).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_exports_with_another_size():
    model = small(depths=(2, 1, 1, 1)).float()
    # Sides of more than one window at stride 32: an exporter takes one and many for different programs.
    sides = {i: 32 * torch.export.Dim(name, min=4, max=32) for i, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (torch.randn(1, 3, 128, 160),), dynamic_shapes=(sides,), strict=False)
    other = torch.randn(1, 3, 224, 128)
    with torch.no_grad():
        for found, wanted in zip(program.module()(other), model(other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(2, 2, 6)), "depths=(2, 2, 6), num_heads=(3, 6, 12, 24): Swin has four stages"),
        (dict(num_heads=(3, 6, 12, 25)), "768 channels cannot be shared by 25 heads"),
        (dict(out_features=("res2", "res6")), "no map 'res6'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        SwinTransformer(**options)
    assert message in str(error.value)
