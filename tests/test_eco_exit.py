"""The adaptive exit around two different stacks: who leaves where, and that nothing more is computed."""

import time

import pytest
import torch
from torch import Tensor, nn

from densepred.decoders import AdaptiveExit, DeformablePixelDecoder
from densepred.registry import MODELS
from densepred.structures import Features

CHANNELS, STRIDES = (8, 16, 24, 40), (4, 8, 16, 32)


@MODELS.register_module(force=True)
class SingleLevelStack(nn.Module):
    """Another stacked encoder, as DETR has it: plain attention over one level."""

    def __init__(self, in_channels, in_strides, embed_dim: int = 16, num_layers: int = 5) -> None:
        super().__init__()
        self.embed_dim, self.num_layers = embed_dim, num_layers
        self.channels, self.level_channels = embed_dim, [embed_dim]
        self.project = nn.Conv2d(in_channels[-1], embed_dim, 1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(embed_dim, 2, 32, dropout=0.0, batch_first=True) for _ in range(num_layers)
        )

    def start(self, features: list[Tensor]) -> tuple[Tensor, tuple[int, int]]:
        x = self.project(features[-1])
        return x.flatten(2).transpose(1, 2), tuple(x.shape[-2:])

    def step(self, i: int, memory: Tensor, context: tuple[int, int]) -> Tensor:
        return self.layers[i](memory)

    def finish(self, memory: Tensor, context: tuple[int, int], features: list[Tensor]) -> Features:
        level = memory.transpose(1, 2).unflatten(2, context)
        return Features(pixels=level, levels=[level], encoder=features)

    def summary(self, memory: Tensor, context: tuple[int, int]) -> Tensor:
        return memory.mean(1)

    def layer_flops(self, context: tuple[int, int]) -> int:
        return 100 * context[0] * context[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Times are of this process, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


STACKS = {
    "deformable": dict(type="DeformablePixelDecoder", embed_dim=32, mask_dim=32, num_heads=4, ffn_dim=64),
    "single level": dict(type="SingleLevelStack"),
}


def maps(batch: int, seed: int = 0, side: int = 32) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(batch, c, side * 4 // s, side * 4 // s) for c, s in zip(CHANNELS, STRIDES, strict=True)]


@pytest.fixture(params=STACKS.values(), ids=STACKS.keys())
def adaptive(request) -> AdaptiveExit:
    torch.manual_seed(1)
    return AdaptiveExit(CHANNELS, STRIDES, request.param).eval()


@pytest.fixture
def calls(adaptive) -> list[tuple[int, int]]:
    """(layer, images in it) of every call of a layer."""
    seen: list[tuple[int, int]] = []
    for i, layer in enumerate(adaptive.decoder.layers):
        layer.register_forward_pre_hook(lambda _, inputs, i=i: seen.append((i, len(inputs[0]))))
    return seen


@torch.no_grad()
def test_images_of_a_batch_leave_one_after_the_other(adaptive, calls):
    features = maps(5)
    left = adaptive.exit(features, [3, 2, 4, 2, 3])
    assert calls == [(0, 5), (1, 5), (2, 3), (3, 1)]
    assert left.depths == (3, 2, 4, 2, 3)
    for i, depth in enumerate(left.depths):
        alone = adaptive([x[i : i + 1] for x in features], [depth])
        torch.testing.assert_close(left.features.pixels[i : i + 1], alone.pixels, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(left.features.levels, alone.levels, strict=True):
            torch.testing.assert_close(ours[i : i + 1], theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_pass_yields_what_every_exit_yields(adaptive, calls):
    features = maps(2)
    yielded = dict(adaptive.exits(features))
    last = adaptive.decoder.num_layers
    assert tuple(yielded) == adaptive.depths == tuple(range(2, last + 1))
    assert [i for i, _ in calls] == list(range(last))
    for depth, found in yielded.items():
        assert torch.equal(found.pixels, adaptive(features, [depth] * 2).pixels)
    if isinstance(adaptive.decoder, DeformablePixelDecoder):  # to the last exit it is the decoder itself
        assert torch.equal(yielded[last].pixels, adaptive.decoder(features).pixels)


@torch.no_grad()
def test_gate_chooses_for_each_image(adaptive, calls):
    features = maps(4, seed=3)
    adaptive.gate.weight.normal_(std=30)
    memory, context = adaptive.decoder.start(features)
    logits = adaptive.gate_logits(adaptive.decoder.summary(memory, context))
    left = adaptive.exit(features)
    assert list(left.depths) == [adaptive.depths[e] for e in logits.argmax(1).tolist()] == adaptive.choose(logits)
    assert len(set(left.depths)) > 1, "the images were meant to disagree"
    assert calls == [(i, n) for i in range(6) if (n := sum(d > i for d in left.depths))]
    assert left.layer_flops == adaptive.decoder.layer_flops(context)


def test_equal_logits_choose_the_shallowest(adaptive):
    assert adaptive.choose(torch.zeros(3, len(adaptive.depths))) == [2, 2, 2]


def test_gate_starts_without_a_bias_and_computes_in_float32(adaptive):
    assert not adaptive.gate.bias.any()
    vector = torch.randn(2, adaptive.decoder.embed_dim)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adaptive.gate_logits(vector), adaptive.gate(vector).float()) is False
        assert adaptive.gate_logits(vector).dtype == torch.float32
    assert adaptive.double().gate_logits(vector.double()).dtype == torch.float64


def test_gradient_reaches_the_layers_that_ran_and_no_other(adaptive):
    adaptive(maps(2), [3, 2]).pixels.sum().backward()
    reached = [any(p.grad is not None for p in layer.parameters()) for layer in adaptive.decoder.layers]
    assert reached == [i < 3 for i in range(adaptive.decoder.num_layers)]


@torch.no_grad()
def test_fewer_layers_take_less_time():
    adaptive = AdaptiveExit(CHANNELS, STRIDES, dict(STACKS["deformable"], embed_dim=64, ffn_dim=512)).eval()
    features = maps(1, side=48)

    def seconds(depth: int) -> float:
        start = time.process_time()
        adaptive(features, [depth])
        return time.process_time() - start

    times = {depth: min(seconds(depth) for _ in range(3)) for depth in (2, 6, 4)}
    assert times[2] < times[4] < times[6]


@pytest.mark.parametrize("depths", [[2], [2, 1], [2, 7], [2, 3, 4]])
def test_wrong_depths_are_named(adaptive, depths):
    with pytest.raises(ValueError, match=r"depths=\[.*\] for 2 images: give each one of the exits \[2, 3, 4, 5"):
        adaptive(maps(2), depths)


def test_a_decoder_without_layers_to_leave_is_refused():
    stages = dict(num_blocks=(1, 1, 1, 1), block_types=("bottleneck",) * 4, base_channels=(16, 16, 8, 8))
    with pytest.raises(ValueError, match="KMaXPixelDecoder is no stack of layers, it lacks start, step"):
        AdaptiveExit(CHANNELS, STRIDES, dict(type="KMaXPixelDecoder", **stages))
    with pytest.raises(ValueError, match=r"min_layers=6: the decoder has the layers 1\.\.5"):
        AdaptiveExit(CHANNELS, STRIDES, dict(type="SingleLevelStack"), min_layers=6)
