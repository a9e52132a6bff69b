"""CCNet's attention block and decoder: published numbers, its options, any map."""

import pytest
import torch
from torch import nn

from densepred.decoders import CCNetDecoder, CrissCrossAttention
from densepred.registry import MODELS
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "criss_cross_attention")
TOLERANCE = META["tolerance"]["max_abs"]


@pytest.mark.parametrize("name", META["input"]["modules"])
def test_parity_of_the_block_applied_again_and_again(name):
    case = META["input"]["modules"][name]
    block = CrissCrossAttention(case["in_channels"]).double()
    names = [key for key, _ in case["state_dict"]]
    assert names == list(block.state_dict())
    state = {key: torch.from_numpy(parity.fill(key, shape)) for key, shape in case["state_dict"]}
    block.load_state_dict(state)
    assert block.query_conv.out_channels == case["qk_channels"]
    x, grad = (torch.from_numpy(parity.normal_input(case[k]["seed"], case[k]["shape"])) for k in ("x", "grad_out"))
    results, pixels = {}, x.requires_grad_()
    for step in range(case["recurrence"]):
        pixels = block(pixels)
        results[f"out_{step + 1}"] = pixels
    grads = torch.autograd.grad(pixels, [x, *block.parameters()], grad)
    results |= dict(zip(["grad_x", *(f"grad.{key}" for key in names)], grads, strict=True))
    assert {f"{name}.{key}" for key in results} == {key for key in EXPECTED if key.startswith(f"{name}.")}
    for key, result in results.items():
        expected = torch.from_numpy(EXPECTED[f"{name}.{key}"])
        torch.testing.assert_close(result.detach(), expected, rtol=0, atol=TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")


def build(**options) -> CCNetDecoder:
    torch.manual_seed(0)
    config = dict(type="CCNetDecoder", in_channels=(4, 6, 12), in_strides=(4, 8, 8), channels=16)
    return MODELS.build(config | options)


def attending(decoder: CCNetDecoder) -> CCNetDecoder:
    """Give the attention a say: it starts without one."""
    for block in (m for m in decoder.modules() if isinstance(m, CrissCrossAttention)):
        nn.init.ones_(block.gamma)
    return decoder


def maps(*sides: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, c, *s, generator=generator) for c, s in zip((4, 6, 12), sides, strict=True)]


@pytest.mark.parametrize("side", [(5, 7), (1, 6), (6, 1), (1, 1)])
def test_a_step_on_any_map(side):
    decoder = attending(build(embedding_channels=3))
    features = decoder(maps((11, 13), side, side))
    assert features.pixels.shape == (2, decoder.channels, *side) and features.embedding.shape == (2, 3, *side)
    assert [m.shape[1] for m in features.encoder] == [4, 6, 12]
    assert features.levels == decoder.level_channels == [] and features.deep == []
    (features.pixels.square().mean() + features.embedding.square().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())


def test_a_new_block_is_the_identity():
    x = maps((3, 3), (3, 3), (3, 4))[2]
    torch.testing.assert_close(CrissCrossAttention(12)(x), x, rtol=0, atol=0)
    assert MODELS.build(dict(type="CrissCrossAttention", in_channels=4)).query_conv.out_channels == 1


def test_the_embedding_is_made_in_training_only():
    decoder, inputs = build(embedding_channels=3), maps((5, 5), (3, 3), (3, 4))
    assert decoder(inputs).embedding is not None
    assert decoder.eval()(inputs).embedding is None
    assert build()(inputs).embedding is None


def test_shared_weights_and_own_weights():
    inputs = maps((5, 5), (3, 3), (3, 4))
    once, twice = (attending(build(recurrence=r)).eval() for r in (1, 2))
    own = attending(build(recurrence=2, shared=False)).eval()
    assert set(once.state_dict()) == set(twice.state_dict())
    own.load_state_dict(
        {k: twice.state_dict()[k.replace("cca.0.", "cca.").replace("cca.1.", "cca.")] for k in own.state_dict()}
    )
    torch.testing.assert_close(own(inputs).pixels, twice(inputs).pixels, rtol=0, atol=0)
    assert not torch.allclose(once(inputs).pixels, twice(inputs).pixels)
    nn.init.zeros_(own.cca[1].gamma)
    torch.testing.assert_close(own(inputs).pixels, once(inputs).pixels, rtol=0, atol=0)


def test_the_slope_is_that_of_the_activations():
    inputs = maps((5, 5), (3, 3), (3, 4))
    assert build(negative_slope=0.0).eval()(inputs).pixels.min() == 0
    leaky = build(negative_slope=0.5).eval()(inputs).pixels
    assert leaky.min() < 0


def test_no_attention_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"recurrence=0.*FCNDecoder"):
        build(recurrence=0)


def test_autocast_keeps_the_type_of_the_maps():
    decoder = attending(build(embedding_channels=3)).eval()
    inputs = maps((5, 5), (3, 3), (3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = decoder(inputs).pixels
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), decoder(inputs).pixels, rtol=0.05, atol=0.05)
