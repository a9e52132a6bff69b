"""The non-local block and its head against the published code's numbers, outputs and gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import densepred
from densepred.decoders import NonLocalDecoder
from densepred.decoders.nonlocal_block import NonLocalBlock
from densepred.heads import SemanticHead
from tests import parity
from tests.plain_decoders import filled, maps

META, EXPECTED = parity.case(parity.CASES / "non_local_block")
MODULES = META["input"]["modules"]
BLOCKS = [name for name in MODULES if name != "head"]


def recorded(recipe: dict) -> Tensor:
    return torch.from_numpy(parity.normal_input(recipe["seed"], recipe["shape"]))


def filled_state(name: str) -> dict[str, Tensor]:
    return {key: torch.from_numpy(parity.fill(key, shape)) for key, shape in MODULES[name]["state_dict"]}


def check(value: Tensor, name: str) -> None:
    np.testing.assert_allclose(value.detach().numpy(), EXPECTED[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    arguments = {key: v for key, v in MODULES[name].items() if key not in ("x", "grad_out", "state_dict")}
    block = NonLocalBlock(**arguments).double().eval()
    block.load_state_dict(filled_state(name))
    x = recorded(MODULES[name]["x"]).requires_grad_()
    out = block(x)
    out.backward(recorded(MODULES[name]["grad_out"]))
    check(out, f"{name}.out")
    check(x.grad, f"{name}.grad_x")
    for key, parameter in block.named_parameters():
        check(parameter.grad, f"{name}.grad.{key}")


class Net(nn.Module):
    """The head of the case on its input, as a model whose encoder does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        self.decoder = NonLocalDecoder([24], [8], channels=16)
        self.head = SemanticHead(16, [], [24], 19)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder([self.encoder(x)]))["sem_logits"]


def test_head():
    model = Net().double().eval()
    official = {f"decode_head.{key}": value for key, value in filled_state("head").items()}
    weights = densepred.convert_state_dict(official, source="mmsegmentation", model=model)
    model.load_state_dict(weights)
    x = recorded(MODULES["head"]["x"]).requires_grad_()
    out = model(x)
    out.backward(recorded(MODULES["head"]["grad_out"]))
    check(x.grad, "head.grad_x")
    check(out, "head.logits")


def weights_of_pairs(mode: str, x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the weights (N, N) of every pixel's sum over all pixels x (C, N), one pair at a time."""

    def embedded(name: str) -> Tensor:
        return state[f"{name}.conv.weight"][..., 0, 0] @ x + state[f"{name}.conv.bias"][:, None]

    theta, phi = (x, x) if mode == "gaussian" else (embedded("theta"), embedded("phi"))
    pairs = x.new_zeros(x.shape[1], x.shape[1])
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            if mode == "concatenation":
                both = torch.cat([theta[:, i], phi[:, j]])
                pairs[i, j] = max(float(state["concat_project.conv.weight"].flatten() @ both), 0.0)
            else:
                pairs[i, j] = theta[:, i] @ phi[:, j]
    if mode == "embedded_gaussian":
        pairs = pairs / math.sqrt(len(theta))
    return pairs.softmax(1) if "gaussian" in mode else pairs / x.shape[1]


@pytest.mark.parametrize("size", [(3, 5), (1, 6), (1, 1)])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product", "gaussian", "concatenation"])
def test_block_is_the_sum_over_all_pairs(mode, size):
    block = filled(NonLocalBlock(6, mode=mode))
    state = block.state_dict()
    (x,) = maps([6], [size], batch=1)
    flat = x[0].flatten(1)  # (C, N)
    values = state["g.conv.weight"][..., 0, 0] @ flat + state["g.conv.bias"][:, None]
    y = values @ weights_of_pairs(mode, flat, state).T
    y = state["conv_out.conv.weight"][..., 0, 0] @ y + state["conv_out.conv.bias"][:, None]
    torch.testing.assert_close(block(x)[0].flatten(1), flat + y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product", "gaussian", "concatenation"])
def test_decoder_trains_in_every_mode_and_the_block_begins_as_the_identity(mode):
    decoder = NonLocalDecoder([4, 8, 8, 12], [4, 8, 8, 8], channels=6, mode=mode)
    pyramid = [x.float() for x in maps([4, 8, 8, 12], [(9, 7)] + [(5, 4)] * 3)]
    x = torch.rand(2, 6, 5, 4)
    torch.testing.assert_close(decoder.nl_block.eval()(x), x)
    features = decoder.train()(pyramid)
    assert features.pixels.shape == (2, 6, 5, 4) and features.levels == decoder.level_channels == []
    nn.init.ones_(decoder.nl_block.conv_out.bn.weight)
    decoder(pyramid).pixels.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    assert decoder.nl_block.g.conv.weight.grad.abs().max() > 0


def test_no_map_of_all_pairs_is_stored():
    block, largest = NonLocalBlock(8), 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.rand(1, 8, 32, 40, requires_grad=True)).sum().backward()
    assert 0 < largest <= 8 * 32 * 40  # a map; all pairs would be 1280 * 1280


def test_unscaled_differs():
    (x,) = maps([6], [(3, 5)])
    scaled, unscaled = (filled(NonLocalBlock(6, use_scale=flag))(x) for flag in (True, False))
    assert (scaled - unscaled).abs().max() > 1e-3


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"embedded_gaussian.*got\s+softmax"):
        NonLocalDecoder([8], [8], channels=4, mode="softmax")
