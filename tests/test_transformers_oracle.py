"""Hugging Face's Mask2Former as a live oracle: the same weights give the same maps, predictions, losses and gradients.

Everything is float64, position encodings included on both sides, so nothing is left that differs by more than rounding.
"""

import pytest
import torch

from densepred.engine import benchmark_model
from densepred.engine.benchmark_model import (
    equal_points,
    huggingface_twin,
    mask2former_config,
    points_for_the_twin,
)
from densepred.engine.checkpoint import read_checkpoint
from densepred.engine.conversion import convert_state_dict, detect_source, load_weights, to_official
from densepred.registry import MODELS
from tests import parity
from tests.small import CONFIGS

pytest.importorskip("transformers", reason="the oracle comes with the test extra")

ENCODERS = {
    "swin": dict(
        type="SwinTransformer",
        embed_dim=12,
        depths=(2, 1, 2, 1),
        num_heads=(1, 2, 2, 4),
        window_size=4,
        drop_path_rate=0.0,
    ),
    "resnet": dict(type="ResNet", depth=18, frozen_norm=True),
}
SIZES = {"even": (2, 3, 64, 96), "odd": (1, 3, 75, 101)}
MAX_ERROR = 1e-9
NUM_CLASSES = 5


def small_config(encoder, num_classes=NUM_CLASSES):
    return mask2former_config(
        encoder,
        num_classes,
        dict(embed_dim=32, mask_dim=24, num_layers=2, num_heads=4, ffn_dim=40),
        embed_dim=40,  # not the pixel decoder's: the levels are projected
        num_heads=4,
        ffn_dim=36,
        num_layers=4,
        num_queries=7,
    )


def distinct_weights(model):
    """Fill a model so that queries differ and attention masks are partly filled, see the parity cases' `scale`."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            scale = 6.0 if key.endswith(("query_feat", "query_embed", "level_embed", "class_embed.weight")) else 1.0
            value.copy_(torch.from_numpy(parity.fill(key, value.shape)) * scale)


@pytest.fixture(scope="module", params=ENCODERS)
def pair(request):
    """Our model, filled, and a twin that got its weights through a file's names."""
    config = small_config(ENCODERS[request.param])
    model = MODELS.build(config).double()
    distinct_weights(model)
    model.head.criterion.num_points, model.head.criterion.num_candidates, model.head.criterion.num_uncertain = (
        60,
        180,
        45,
    )
    return model.eval(), huggingface_twin(config, model)


@pytest.fixture(params=SIZES)
def images(request):
    return torch.from_numpy(parity.normal_input(3, SIZES[request.param]))


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    assert float((ours - theirs).detach().abs().max()) < MAX_ERROR


def test_the_twin_s_weights_come_back_the_same(pair, tmp_path):
    """Ours -> theirs -> their file -> ours, and their `state_dict()` -> ours -> theirs."""
    model, twin = pair
    twin.save_pretrained(tmp_path)
    saved = read_checkpoint(tmp_path / "model.safetensors")
    assert detect_source(saved) == detect_source(twin.state_dict()) == "transformers"
    assert "transformers" in load_weights(model, tmp_path / "model.safetensors")
    ours = convert_state_dict(twin.state_dict(), "transformers", model)
    assert list(ours) == list(model.state_dict())
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())
    back = to_official(ours, "transformers")
    assert set(back) <= set(saved) and all(torch.equal(saved[key], value) for key, value in back.items())
    left = {key for key in set(saved) - set(back) if not key.endswith("num_batches_tracked")}
    assert all(key.endswith(("empty_weight", "swin.layernorm.weight", "swin.layernorm.bias")) for key in left)


def test_maps_are_the_same(pair, images):
    model, twin = pair
    with torch.no_grad():
        ours, theirs = model.features(images, None), twin.model.pixel_level_module(images, output_hidden_states=True)
    for mine, other in zip(ours.encoder, theirs.encoder_hidden_states, strict=True):
        assert_close(mine, other)
    for mine, other in zip(ours.levels, theirs.decoder_hidden_states, strict=True):
        assert_close(mine, other)
    assert_close(ours.pixels, theirs.decoder_last_hidden_state)


def test_predictions_of_every_layer_are_the_same(pair, images):
    model, twin = pair
    with torch.no_grad():
        ours, theirs = model(images), twin(images, output_auxiliary_logits=True)
        fast = model.head(model.features(images, None), deep_supervision=False)
    assert len(ours["aux_outputs"]) == len(theirs.auxiliary_logits) == 4
    for mine, other in zip([ours, *ours["aux_outputs"]], [theirs, *theirs.auxiliary_logits], strict=True):
        assert_close(mine["pred_logits"], other["class_queries_logits"])
        assert_close(mine["pred_masks"], other["masks_queries_logits"])
    assert_close(fast["pred_logits"], theirs.class_queries_logits)
    assert_close(fast["pred_masks"], theirs.masks_queries_logits)
    inner = resized_inner_masks(ours, 0)
    assert 0.1 < (inner < 0).double().mean() < 0.9  # the attention masks do something
    assert ours["pred_logits"].std(1).min() > 0.1  # and the queries differ


def resized_inner_masks(outputs, index):
    return torch.nn.functional.interpolate(outputs["aux_outputs"][index]["pred_masks"], scale_factor=0.125)


def targets_of(images):
    """Return targets of an image with several objects and, in a batch, of one with a single object."""
    batch, _, height, width = images.shape
    random = torch.Generator().manual_seed(1)
    return [
        dict(
            labels=torch.randint(NUM_CLASSES, (count,), generator=random),
            masks=torch.rand(count, height // 8 + 1, width // 8 + 1, generator=random)
            .gt(0.6)
            .repeat_interleave(8, 1)
            .repeat_interleave(8, 2)[:, :height, :width],
        )
        for count in (4, 1)[:batch]
    ]


def test_losses_and_gradients_are_the_same_at_equal_points(pair, images):
    model, twin = pair
    points, targets = equal_points(images), targets_of(images)
    ours = model.head.criterion(model(images), targets, points)
    # Theirs holds the weight of "no object" as a float32, 1.5e-9 away from 0.1.
    twin.criterion.empty_weight = torch.tensor([1.0] * NUM_CLASSES + [0.1], dtype=torch.float64)
    found = twin(images, output_auxiliary_logits=True)
    with points_for_the_twin(points, len(images)):
        theirs = twin.get_loss_dict(
            found.masks_queries_logits,
            found.class_queries_logits,
            [target["masks"].double() for target in targets],
            [target["labels"] for target in targets],
            found.auxiliary_logits,
        )
    assert len(ours) == len(theirs) == 15
    for key, value in theirs.items():
        assert_close(ours[key.replace("cross_entropy", "ce")], value)
    grads = []
    for part, losses in ((model, ours), (twin, theirs)):
        part.zero_grad()
        sum(losses.values()).backward()
        grads.append({key: p.grad for key, p in part.named_parameters() if p.grad is not None})
    mine, other = grads[0], convert_state_dict(twin.state_dict() | grads[1], "transformers", model)
    assert list(mine) == [key for key, _ in model.named_parameters()]
    for key, grad in mine.items():
        scale = max(1.0, float(other[key].abs().max()))
        assert_close(grad / scale, other[key] / scale)


@pytest.fixture
def small_benchmark(monkeypatch):
    monkeypatch.setitem(benchmark_model.ENCODERS, "tiny", ENCODERS["swin"])
    monkeypatch.setattr(benchmark_model, "mask2former_config", small_config)
    monkeypatch.setattr(benchmark_model, "_peak_of_process", lambda *_: 7.0)


def test_the_benchmark_prints_a_row_a_job_once_both_agree(small_benchmark):
    lines = benchmark_model.benchmark_model(["tiny"], size=64, repeats=1).splitlines()
    for job, line in zip(benchmark_model.JOBS, lines[3:6], strict=True):
        assert line.startswith(job)
        ours, theirs, ratio = map(float, line.removeprefix(job).replace("x", "").split()[:3])
        half = 0.0005  # of the last digit printed, much of a job of ten milliseconds
        least, most = (theirs - half) / (ours + half), (theirs + half) / (ours - half)
        assert least - 0.005 <= ratio <= most + 0.005
        assert line.split()[-2:] == ["7", "7"]
    assert lines[-1].startswith("largest relative differences: class logits ")
    with pytest.raises(ValueError, match="encoder='swin': the benchmark knows swin_t, r50, tiny"):
        benchmark_model.measure_model("swin")


def test_a_config_names_the_encoder_to_compare():
    swin = benchmark_model.encoder_config(str(CONFIGS / "mask2former_swin_s_coco.py"))
    assert swin["type"] == "SwinTransformer" and swin["drop_path_rate"] == 0 and "init_cfg" not in swin
    assert benchmark_model.encoder_config(str(CONFIGS / "mask2former_r101_coco.py"))["depth"] == 101
    with pytest.raises(ValueError, match=r"kmax_r50_coco\.py: transformers is a baseline of Mask2Former.*KMaXHead"):
        benchmark_model.encoder_config(str(CONFIGS / "kmax_r50_coco.py"))


def test_the_benchmark_refuses_to_time_what_differs(small_benchmark):
    pair = benchmark_model.Pair("tiny", 64)
    with torch.no_grad():
        pair.twin.class_predictor.bias += 0.1
    with pytest.raises(ValueError, match="ours and theirs do not agree, so their times say nothing"):
        pair.differences()
