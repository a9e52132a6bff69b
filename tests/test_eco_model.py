"""The adaptive segmentor, its data and its metric by themselves."""

import numpy as np
import pytest
import torch

from densepred.adaptive import AdaptiveSegmentor, fingerprint, gate_loss
from densepred.data.derived import ideal_depths
from densepred.engine.build import build_model
from densepred.engine.config import load_config
from densepred.evaluation.depth import EncoderDepth
from densepred.structures import PanopticMap, SegSample
from tests.small import CONFIGS

TINY = {
    "model.decoder.decoder.embed_dim": 32,
    "model.decoder.decoder.mask_dim": 32,
    "model.decoder.decoder.ffn_dim": 64,
    "model.head.embed_dim": 32,
    "model.head.ffn_dim": 64,
    "model.head.num_layers": 1,
    "model.head.num_queries": 5,
    "model.head.criterion.num_points": 32,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A second thread gains nothing at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**options) -> AdaptiveSegmentor:
    torch.manual_seed(0)
    return build_model(CONFIGS / "eco_m2f_r18_shapes.py", TINY | {f"model.{k}": v for k, v in options.items()})


def samples(count: int, side: int = 64) -> list[SegSample]:
    made = []
    for _ in range(count):
        sample = SegSample(metainfo=dict(ori_shape=(side, side), img_shape=(side, side), pad_shape=(side, side)))
        ids = torch.ones(side, side, dtype=torch.int32)
        ids[:, side // 2 :] = 2
        records = [dict(id=i, label=label, isthing=i == 1, iscrowd=False) for i, label in ((1, 0), (2, 7))]
        sample.gt_panoptic = PanopticMap(ids, records)
        made.append(sample)
    return made


def test_parent_steps_at_one_random_depth_and_weighs_the_loss_by_it():
    model = build().eval()  # batch norm of a batch of two would add noise
    images = torch.randn(2, 3, 32, 32)
    seen = {}
    for seed in range(12):
        torch.manual_seed(seed)
        losses = model.loss(images, samples(2, 32))
        depth = int(losses.pop("encoder_layers"))
        torch.manual_seed(seed)
        torch.randint(5, (1,))  # the draw
        features = model.decoder(model.encoder(images), [depth] * 2)
        plain = model.head.loss(model.head(features), samples(2, 32))
        for name, value in plain.items():
            torch.testing.assert_close(losses[name], depth * value)
        seen[depth] = seen.get(depth, 0) + 1
    assert seen.keys() == {2, 3, 4, 5, 6}


def test_depths_are_drawn_uniformly_and_repeat():
    model = build()
    torch.manual_seed(3)
    drawn = [model._draw_depth() for _ in range(2000)]
    counts = np.bincount(drawn, minlength=7)[2:]
    assert counts.sum() == 2000 and (abs(counts - 400) < 80).all()  # 4.5 standard deviations
    torch.manual_seed(3)
    assert [model._draw_depth() for _ in range(10)] == drawn[:10]


def test_only_the_part_that_trains_gets_gradients():
    for part in ("parent", "gate"):
        model = build(train=part)
        free = {name for name, p in model.named_parameters() if p.requires_grad}
        gate = {"decoder.gate.weight", "decoder.gate.bias"}
        assert free == (gate if part == "gate" else {name for name, _ in model.named_parameters()} - gate)
    model.train()
    assert not any(module.training for module in model.modules()), "what is frozen stays in evaluation mode"
    assert build().train().encoder.training


def test_gate_step_reads_vectors_and_touches_no_image_part():
    model = build(train="gate").train()
    for part in (model.encoder, model.decoder.decoder, model.head):
        part.forward = lambda *_, **__: pytest.fail("a frozen part ran")
    items = [torch.randn(32) for _ in range(3)]
    targets = [SegSample(metainfo=dict(ideal_depth=depth)) for depth in (2, 6, 4)]
    data = model.data_preprocessor(dict(inputs=items, data_samples=targets), True)
    assert data["inputs"].shape == (3, 32)
    losses = model(**data, mode="loss")
    logits = torch.stack(items) @ model.decoder.gate.weight.T
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 4, 2]))
    torch.testing.assert_close(losses["loss_gate"], expected)


def test_images_reach_the_gate_model_as_images_in_evaluation():
    model = build(train="gate")
    data = model.data_preprocessor(dict(inputs=[torch.zeros(3, 40, 50, dtype=torch.uint8)], data_samples=samples(1)))
    assert data["inputs"].shape == (1, 3, 64, 64)


def test_accuracy_of_the_gate():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    assert gate_loss(logits, torch.tensor([0, 1, 1]))["gate_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("exit", "expected"), [("gate", [2, 2]), (5, [5, 5]), ("oracle", [6, 3])], ids=["gate", "fixed", "oracle"]
)
@torch.no_grad()
def test_predictions_tell_what_was_run(exit, expected):
    model = build(exit=exit).eval()
    model.decoder.gate.weight.zero_()
    given = samples(2)
    for sample, depth in zip(given, (6, 3), strict=True):
        sample.set_metainfo(dict(ideal_depth=depth))
    predicted = model(torch.randn(2, 3, 64, 64), given, mode="predict")
    assert [sample.encoder_layers for sample in predicted] == expected
    layer = (4 + 16 + 64) * model.decoder.decoder.layers[0].multiply_adds()
    assert [sample.encoder_flops for sample in predicted] == [depth * layer for depth in expected]
    assert all(sample.pred_panoptic.ids.shape == (64, 64) for sample in predicted)
    assert model(torch.randn(2, 3, 64, 64), given)["pred_logits"].shape == (2, 5, 11)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"exit=7: choose 'gate', 'oracle' or one of \[2, 3, 4, 5, 6\] layers"):
        build(exit=7)
    with pytest.raises(ValueError, match=r"exit='best': choose"):
        AdaptiveSegmentor(**parts(), exit="best")
    with pytest.raises(ValueError, match=r"train='both': choose 'parent' or 'gate'"):
        AdaptiveSegmentor(**parts(), train="both")
    plain = parts()
    plain["decoder"] = plain["decoder"]["decoder"]
    with pytest.raises(ValueError, match="decoder is a DeformablePixelDecoder: put it into an AdaptiveExit"):
        AdaptiveSegmentor(**plain)


def parts() -> dict:
    model = load_config(CONFIGS / "eco_m2f_r18_shapes.py", TINY).model
    return {name: model[name] for name in ("encoder", "decoder", "head")}


def test_fingerprint_sees_every_weight_but_the_gate():
    weights = build().state_dict()
    first = fingerprint(weights)
    assert fingerprint(weights | {"decoder.gate.bias": torch.ones(5)}) == first
    assert fingerprint(weights | {"head.query_embed": weights["head.query_embed"] + 1e-6}) != first
    assert fingerprint({name: weights[name] for name in reversed(list(weights))}) == first


def test_ideal_depth_takes_the_shallowest_of_equals_and_falls_with_beta():
    quality = np.array([[0.5, 0.5, 0.4], [0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    assert ideal_depths(quality, [2, 3, 4], 0.0).tolist() == [2, 4, 2]
    assert ideal_depths(quality, [2, 3, 4], 0.2).tolist() == [2, 2, 2]


def test_depth_metric_averages_and_begins_anew():
    metric = EncoderDepth()
    batch = [dict(encoder_layers=d, encoder_flops=d * 10**9) for d in (2, 6)]
    metric.process(None, batch)
    metric.process(None, [dict(encoder_layers=4, encoder_flops=7 * 10**9)])
    assert metric.evaluate(3) == {"EncoderDepth": 4.0, "EncoderGFLOPs": 5.0}
    metric.process(None, batch[:1])
    assert metric.evaluate(1)["EncoderDepth"] == 2.0
    with pytest.raises(ValueError, match=r"a.png has no encoder_layers: .* out of val_evaluator"):
        metric.process(None, [dict(img_path="a.png")])


def test_published_widths_cost_what_was_published():
    """Cityscapes, 1024 x 2048: 31.467 G a layer; six layers less two are what the published totals differ by."""
    with torch.device("meta"):
        model = build_model(CONFIGS / "eco_m2f_swin_t_cityscapes.py")
    sizes = [(c, 1024 // s, 2048 // s) for c, s in zip(model.encoder.channels, model.encoder.strides, strict=True)]
    maps = [torch.zeros(1, *size, device="meta") for size in sizes]
    _, context = model.decoder.decoder.start(maps)
    layer = model.decoder.decoder.layer_flops(context)
    assert layer == 43_008 * 731_648
    assert 4 * layer / 1e9 == pytest.approx(537.848 - 411.981, abs=2e-3)
    assert sum(p.numel() for p in model.decoder.gate.parameters()) == 1285


@pytest.mark.parametrize(
    ("name", "beta", "length", "every"), [("coco", 0.0005, 300_000, 5000), ("cityscapes", 0.003, 50_000, 2000)]
)
def test_gate_recipes_hold_the_published_numbers(name, beta, length, every):
    cfg = load_config(CONFIGS / f"eco_m2f_swin_t_{name}_gate.py")
    parent = load_config(CONFIGS / f"eco_m2f_swin_t_{name}.py")
    assert {**cfg.model, "train": "parent"} == {**parent.model, "train": "parent"}
    assert cfg.train_dataloader.dataset == dict(
        type="GateDataset", derived=f"work_dirs/eco_m2f_swin_t_{name}/derived.json", beta=beta
    )
    assert (cfg.train_dataloader.batch_size, cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (8, length, every)
    wrapper = cfg.optim_wrapper
    assert (wrapper.optimizer.lr, wrapper.optimizer.weight_decay, wrapper.clip_grad.max_norm) == (1e-4, 0.05, 0.01)
    assert bool(cfg.param_scheduler) == (name == "cityscapes")  # constant for COCO, polynomial for Cityscapes
    assert cfg.val_dataloader == parent.val_dataloader
