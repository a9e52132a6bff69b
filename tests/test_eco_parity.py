"""ECO-M2F Swin-T (COCO, beta 0.0005) against the published code's numbers, in float64: exits, gate, targets, gate loss."""

import numpy as np
import pytest
import torch
from torch import Tensor

import densepred
from densepred.adaptive import AdaptiveSegmentor, gate_loss
from densepred.data.derived import ideal_depths
from densepred.structures import SegSample
from tests import parity
from tests.small import CONFIGS

META, EXPECTED = parity.case(parity.CASES / "eco_m2f_swin_t_coco")
DEPTHS = META["config"]["gating"]["exits"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread gains nothing at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> AdaptiveSegmentor:
    model = densepred.build_model(CONFIGS / "eco_m2f_swin_t_coco.py", {"model.train": "gate"}).double().eval()
    weights = {key: torch.from_numpy(value) for key, value in parity.filled_state(META).items()}
    model.load_state_dict(densepred.convert_state_dict(weights, source="eco-m2f", model=model))
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.from_numpy(parity.image_batch(META))


def check(value: Tensor, name: str) -> None:
    expected = EXPECTED[name]
    array = parity.thin(value.detach().numpy(), META["outputs"][name])
    np.testing.assert_allclose(array, expected, rtol=0, atol=1e-11 * np.abs(expected).max(), err_msg=name)


@pytest.fixture(scope="module")
def vectors(model, images) -> Tensor:
    """What the gate reads of the three images."""
    with torch.no_grad():
        started = model.decoder.decoder.start(model.encoder(images))
        return model.decoder.decoder.summary(*started)  # (3, C)


def test_gate_input_and_logits(model, vectors):
    tokens = torch.from_numpy(EXPECTED["gate_input"])
    torch.testing.assert_close(vectors[:1], tokens.mean(1), rtol=0, atol=1e-12)
    check(model.decoder.gate_logits(vectors), "gates")


@torch.no_grad()
def test_every_exit_of_one_pass(model, images):
    maps = model.encoder(images[:1])
    for i, x in enumerate(maps):
        check(x, f"image0_res{i + 2}")
    seen = []
    for depth, features in model.decoder.exits(maps):
        outputs = model.head(features)
        for level, x in enumerate(features.levels):
            check(x, f"exit{depth}_memory_{level}")
        check(features.pixels, f"exit{depth}_mask_features")
        check(outputs["pred_logits"], f"exit{depth}_pred_logits")
        check(outputs["pred_masks"], f"exit{depth}_pred_masks")
        check(outputs["aux_outputs"][0]["pred_masks"], f"exit{depth}_aux0_pred_masks")
        seen.append(depth)
    assert seen == DEPTHS


@torch.no_grad()
def test_each_image_of_a_batch_leaves_at_its_own_exit(model, images):
    """The official code runs them one by one; its arg max over a batch would be wrong."""
    samples = [SegSample() for _ in images]
    outputs = model.head(model.features(images, samples), deep_supervision=False)
    assert [sample.encoder_layers for sample in samples] == EXPECTED["layers"].tolist()
    for i in range(len(images)):
        for name in ("pred_logits", "pred_masks"):
            check(outputs[name][i : i + 1], f"image{i}_{name}")


def test_derived_targets():
    quality = 0.45 + 0.2 * np.random.RandomState(77).random_sample((40, 5)) + 0.02 * np.arange(5)
    for beta, expected in zip(META["input"]["pq"]["betas"], EXPECTED["derived_targets"], strict=True):
        assert (ideal_depths(quality, DEPTHS, beta) - DEPTHS[0] == expected).all()


def test_gate_loss_and_its_gradients(model, vectors):
    samples = [SegSample(metainfo=dict(ideal_depth=DEPTHS[e])) for e in META["input"]["gate_targets"]]
    model.zero_grad()
    losses = model.loss(vectors, samples)
    losses["loss_gate"].backward()
    check(losses["loss_gate"][None], "gate_loss_hard")
    check(model.decoder.gate.weight.grad, "gate_loss_hard_grad_weight")
    check(model.decoder.gate.bias.grad, "gate_loss_hard_grad_bias")
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "decoder.gate.weight",
        "decoder.gate.bias",
    ]


def test_released_soft_loss_is_another(model, vectors):
    """The released code's last edit (squared error, both softmaxes over the batch); the models were trained before it."""
    quality = 0.45 + 0.2 * np.random.RandomState(77).random_sample((40, 5)) + 0.02 * np.arange(5)
    utility = torch.from_numpy(quality - 0.0005 * np.arange(1, 6))
    np.testing.assert_allclose(utility.numpy(), EXPECTED["derived_utility"], atol=1e-15)
    logits = model.decoder.gate_logits(vectors)
    soft = torch.nn.functional.mse_loss(logits.softmax(0), utility[:3].softmax(0))
    check(soft[None], "gate_loss_soft_official")
    hard = gate_loss(logits, torch.tensor(META["input"]["gate_targets"]))["loss_gate"]
    assert abs(float(hard.detach()) - float(soft.detach())) > 1
