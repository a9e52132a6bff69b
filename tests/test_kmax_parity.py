"""kMaX-DeepLab R50 (COCO) against the published code's numbers, in float64: forward, inference, one training step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import densepred
from densepred.engine.mapping_kmax import rename_to_official, rename_to_ours
from densepred.heads.kmax import KMaXTransformerLayer
from densepred.heads.kmax_inference import resize_mask_logits, semantic_inference
from densepred.structures import PanopticMap, SegSample
from tests import parity

CONFIG = Path(__file__).parents[1] / "configs" / "kmax_r50_coco.py"
META, EXPECTED = parity.case(parity.CASES / "kmax_r50_coco_panoptic")
ENCODER, DECODER, HEAD = "backbone.", "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."


def ours(official: str) -> str:
    for prefix, part in ((ENCODER, "encoder."), (DECODER, "decoder."), (HEAD, "head.")):
        if official.startswith(prefix):
            return rename_to_ours(part + official.removeprefix(prefix))
    raise KeyError(official)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in parity.filled_state(META).items()}


@pytest.fixture(scope="module")
def model(weights) -> nn.Module:
    options = {"model.head.drop_path": 0.0, "model.head.tasks": ["panoptic", "semantic", "instance"]}
    with torch.device("meta"):  # no time for initial values that are overwritten
        model = densepred.build_model(CONFIG, cfg_options=options)
    model.to_empty(device="cpu").double().eval()
    model.load_state_dict(densepred.convert_state_dict(weights, source="kmax-deeplab", model=model))
    return model


@pytest.fixture(scope="module")
def outputs(model) -> dict[str, Tensor]:
    """Every forward output that the case names, found at its place in our model."""
    found: dict[str, Tensor] = {}

    def keep_layer(index: int):
        def hook(_module: nn.Module, _inputs: tuple, result: tuple) -> None:
            centres, prediction = result
            found[f"layer{index}.cluster_centers"] = centres
            found[f"layer{index}.class_logits"] = prediction["pred_logits"]
            found[f"layer{index}.mask_logits"] = prediction["pred_masks"]
            found[f"layer{index}.pixel_feature"] = prediction["pixel_feature"]
            found[f"layer{index}.assignment"] = prediction["pred_masks"].argmax(1)

        return hook

    def keep_features(_module: nn.Module, _inputs: tuple, features: densepred.structures.Features) -> None:
        found.update({f"res{i + 2}": x for i, x in enumerate(features.encoder)})
        found.update({f"pixel_decoder.{i}": x for i, x in enumerate([*features.levels, features.pixels])})
        found["aux_semantic_pred"] = model.head.aux_semantic(features.encoder)

    handles = [layer.register_forward_hook(keep_layer(i)) for i, layer in enumerate(model.head.layers)]
    handles.append(model.decoder.register_forward_hook(keep_features))
    for name in ("class_embedding", "mask_embedding"):
        module = getattr(model.head, name)
        handles.append(module.register_forward_hook(lambda _m, _i, x, name=name: found.update({name: x})))
    with torch.no_grad():
        result = model(torch.from_numpy(parity.image_batch(META)), mode="tensor")
    for handle in handles:
        handle.remove()
    assert "aux_semantic_pred" not in result, "the auxiliary head must rest in eval mode"
    for i, aux in enumerate(result.pop("aux_outputs")):
        found.update({f"aux{i}.pred_masks": aux["pred_masks"], f"aux{i}.pixel_feature": aux["pixel_feature"]})
    return found | result


FORWARD = [name for name in META["outputs"] if not name.startswith(("infer", "synth", "train"))]


def check(name: str, value: Tensor | np.ndarray | float, tolerance: float) -> None:
    array = parity.thin(np.asarray(value.detach() if isinstance(value, Tensor) else value), META["outputs"][name])
    expected = EXPECTED[name]
    np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("name", FORWARD)
def test_forward(outputs, name):
    if META["outputs"][name].get("dtype") == "int32":
        np.testing.assert_array_equal(outputs[name].numpy(), EXPECTED[name])
    else:
        check(name, outputs[name], META["tolerance"]["relative_to_absmax"])


# Inference ------------------------------------------------------------------------------------------------------------

IMAGES = META["input"]["inference_images"]
METAS = [dict(ori_shape=(i["height"], i["width"]), img_shape=tuple(i["shape"][1:]), pad_shape=(97, 97)) for i in IMAGES]


def synthetic_outputs() -> dict[str, Tensor]:
    logits = 2 * parity.normal_input(21, (2, 128, 134))
    logits[..., [0, 1, 60, 90, 100, 132]] += 6
    masks = 10 * parity.normal_input(22, (2, 128, 13, 13))
    return {"pred_logits": torch.from_numpy(logits), "pred_masks": torch.from_numpy(masks)}


@pytest.fixture(scope="module")
def head_outputs(model) -> dict[str, dict[str, Tensor]]:
    batch = torch.zeros(2, 3, 97, 97, dtype=torch.float64)
    for slot, image in zip(batch, IMAGES, strict=True):
        height, width = image["shape"][1:]
        slot[:, :height, :width] = torch.from_numpy(parity.normal_input(image["seed"], image["shape"]))
    with torch.no_grad():
        return {"infer": model(batch, mode="tensor"), "synth": synthetic_outputs()}


@pytest.mark.parametrize("kind", ["infer", "synth"])
def test_inference(model, head_outputs, kind):
    out = head_outputs[kind]
    for i, result in enumerate(model.head.predict(out, METAS)):
        np.testing.assert_array_equal(result["pred_panoptic"].ids.numpy(), EXPECTED[f"{kind}{i}.panoptic"])
        segments = [(s["id"], s["isthing"], s["label"]) for s in result["pred_panoptic"].segments]
        assert segments == [(s["id"], s["isthing"], s["category_id"]) for s in META["segments_info"][kind][i]]

        masks = resize_mask_logits(out["pred_masks"][i], **METAS[i])
        scores = semantic_inference(out["pred_logits"][i], masks)
        check(f"{kind}{i}.sem_seg", scores, META["tolerance"]["relative_to_absmax"])
        assert torch.equal(result["pred_semantic"], scores.argmax(0))

        found = result["pred_instances"]
        order = found.scores.argsort(descending=True)[: int((found.scores > 1e-6).sum())]
        check(f"{kind}{i}.instance_scores", found.scores[order], 1e-8)
        np.testing.assert_array_equal(found.labels[order].numpy(), EXPECTED[f"{kind}{i}.instance_classes"])
        areas = found.masks[order].sum((1, 2)).numpy()
        np.testing.assert_array_equal(areas, EXPECTED[f"{kind}{i}.instance_areas"])


# One training step ----------------------------------------------------------------------------------------------------


def training_samples(size: tuple[int, int]) -> list[SegSample]:
    """The case's rectangles, painted at full size: the head must find them again at stride 4."""
    samples = []
    for rectangles in META["input"]["train"]["targets"]["rectangles"]:
        ids, segments = torch.zeros(17, 25, dtype=torch.int32), []
        for number, (label, top, bottom, left, right) in enumerate(rectangles, 1):
            ids[top:bottom, left:right] = number
            segments.append(dict(id=number, label=label, isthing=label < 80, iscrowd=False))
        full = ids.repeat_interleave(4, 0).repeat_interleave(4, 1)[: size[0], : size[1]]
        samples.append(SegSample(gt_panoptic=PanopticMap(full, segments)))
    return samples


@pytest.fixture(scope="module")
def step(model, weights, outputs, head_outputs) -> dict:
    """Losses, gradients and buffers after one step with batch statistics; runs last, as it changes the model."""
    model.load_state_dict(densepred.convert_state_dict(weights, source="kmax-deeplab", model=model))
    model.train()
    model.head.aux_semantic.aspp.dropout.p = 0.0
    case = META["input"]["train"]["image"]
    images = torch.from_numpy(parity.normal_input(case["seed"], case["shape"]))
    images[1, :, -8:] = 0
    losses = model(images, training_samples(images.shape[-2:]), mode="loss")
    sum(losses.values()).backward()
    return {
        "losses": losses,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def test_losses(step):
    names = {name.removeprefix("train.") for name in META["outputs"] if name.startswith("train.loss")}
    assert step["losses"].keys() == names
    for name, value in step["losses"].items():
        check(f"train.{name}", value, 1e-6)
    check("train.total", sum(step["losses"].values()), 1e-6)


def test_gradients_and_buffers(step):
    assert all(gradient is not None for gradient in step["gradients"].values())
    for name in META["outputs"]:
        kind, _, key = name.removeprefix("train.").partition(".")
        if kind == "grad":
            gradient = step["gradients"][ours(key)]
            check(name, gradient.reshape(META["outputs"][name]["shape"]), 1e-6)
        elif kind == "buffer":
            check(name, step["buffers"][ours(key)], 1e-6)


def test_gradient_norm_of_every_part(step):
    groups = META["outputs"]["train.grad_norms"]["meaning"].partition(": ")[2].split(", ")
    prefixes = [rename_to_ours(_with_our_part(group) + ".").rstrip(".") for group in groups]
    prefixes = [p.removesuffix(".weight") for p in prefixes]
    norms = []
    for prefix in prefixes:
        squares = [g.square().sum() for name, g in step["gradients"].items() if f"{name}.".startswith(f"{prefix}.")]
        norms.append(torch.stack(squares).sum().sqrt())
    check("train.grad_norms", torch.stack(norms), 1e-6)


def _with_our_part(group: str) -> str:
    for prefix, part in ((ENCODER, "encoder."), (DECODER, "decoder."), (HEAD, "head.")):
        group = group.replace(prefix, part)
    return group + ".weight" if group.endswith("_cluster_centers") else group


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_map_both_ways(model):
    official = [key for key, _ in META["state_dict"]]
    assert len(official) == 1417
    named = {ours(key): key for key in official}
    assert named.keys() == model.state_dict().keys(), "one of ours for each, none twice, none missing"
    for name, key in named.items():
        back = rename_to_official(name)
        part, _, rest = back.partition(".")
        assert {"encoder": ENCODER, "decoder": DECODER, "head": HEAD}[part] + rest == key


def test_cityscapes_names_map_both_ways():
    """The small auxiliary head and the fifth stage, whose official names the COCO case does not hold."""
    pairs = {
        "head._auxiliary_semantic_predictor.0.conv.weight": "head.aux_semantic.layers.0.conv.weight",
        "head._auxiliary_semantic_predictor.1.norm.bias": "head.aux_semantic.layers.1.norm.bias",
        "head._auxiliary_semantic_predictor.2.conv.bias": "head.aux_semantic.layers.2.bias",
        "decoder._stages.4._blocks.0._conv2_bn_act.conv.weight": "decoder.stages.4.blocks.0.conv_mid.conv.weight",
        "decoder._resized_fuses.3._conv_bn_low.norm.weight": "decoder.fusions.3.low.norm.weight",
        "decoder._in_norms.4.weight": "decoder.in_norms.4.weight",
    }
    with torch.device("meta"):
        model = densepred.build_model(CONFIG.with_name("kmax_r50_cityscapes.py"))
    for official, name in pairs.items():
        assert rename_to_ours(official) == name
        assert rename_to_official(name) == official
        assert name in model.state_dict()


# One transformer layer ------------------------------------------------------------------------------------------------

LAYER_META, LAYER_EXPECTED = parity.case(parity.CASES / "kmeans_attention")
LAYER_PREFIX = HEAD + "_kmax_transformer_layers.4."


def layer_name(official: str) -> str:
    return rename_to_ours("head._kmax_transformer_layers.4." + official).removeprefix("head.layers.4.")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_transformer_layer_with_gradients(mode):
    layer = KMaXTransformerLayer(512, 256, num_classes=133, drop_path=0.0).double()
    state = {key.removeprefix(LAYER_PREFIX): value for key, value in parity.filled_state(LAYER_META).items()}
    layer.load_state_dict({layer_name(key): torch.from_numpy(value) for key, value in state.items()})
    layer.train(mode == "train")
    pixels = torch.from_numpy(parity.normal_input(41, (2, 512, 12, 15))).requires_grad_()
    queries = torch.from_numpy(parity.normal_input(42, (2, 256, 128))).requires_grad_()
    w = torch.from_numpy(parity.normal_input(43, (2, 256, 128)))
    v = torch.from_numpy(parity.normal_input(44, (2, 128, 12, 15)))

    inputs = {"pixel_feature": pixels, "query": queries} | dict(layer.named_parameters())
    kept = {}
    layer.kmeans_out.register_forward_hook(lambda _m, _i, x: kept.update(delta=x))
    layer.self_attention.register_forward_hook(lambda _m, _i, x: kept.update(attended=x))
    layer.kmeans_norm.register_forward_hook(lambda _m, args, x: kept.update(sums=args[0], normed=x))
    output, prediction = layer(pixels, queries)
    values = {
        "mask_logits": prediction["pred_masks"],
        "class_logits": prediction["pred_logits"],
        "normalised_pixel_feature": prediction["pixel_feature"],
        "kmeans_sum": kept["sums"],
        "kmeans_normed": kept["normed"],
        "kmeans_delta": kept["delta"],
        "self_attention": kept["attended"],
        "output": output,
    }
    losses = {
        "kmeans_grad": ((queries + kept["delta"]) * w).sum(),
        "layer_grad": (output * w).sum() + (prediction["pred_masks"] * v).sum(),
    }
    for kind, loss in losses.items():
        names = [n.partition(f"{mode}.{kind}.")[2] for n in LAYER_EXPECTED if n.startswith(f"{mode}.{kind}.")]
        wanted = [inputs.get(name, inputs.get(layer_name(name))) for name in names]
        for name, gradient in zip(names, torch.autograd.grad(loss, wanted, retain_graph=True), strict=True):
            values[f"{kind}.{name}"] = gradient
    for name, value in values.items():
        meta, expected = LAYER_META["outputs"][f"{mode}.{name}"], LAYER_EXPECTED[f"{mode}.{name}"]
        array = parity.thin(value.detach().numpy(), meta)
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-8 * np.abs(expected).max(), err_msg=name)
    np.testing.assert_array_equal(prediction["pred_masks"].argmax(1).numpy(), LAYER_EXPECTED[f"{mode}.assignment"])
    for name in LAYER_EXPECTED:
        if name.startswith(f"{mode}.buffer."):
            buffer = dict(layer.named_buffers())[layer_name(name.removeprefix(f"{mode}.buffer."))]
            np.testing.assert_allclose(buffer.numpy(), LAYER_EXPECTED[name], rtol=1e-8, atol=1e-10)
