"""CCNet of its authors and of mmsegmentation: published keys through the converter, published numbers in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.engine.conversion import convert_state_dict, detect_source, to_official
from densepred.engine.mapping_ccnet import SCALE_EPS, ccnet_to_ours
from densepred.heads.semantic import resize
from densepred.registry import MODELS
from densepred.structures import SegSample
from tests import parity

RESNET = dict(type="ResNet", strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
AUXILIARY = dict(index=2, channels=512, bias=True, negative_slope=0.01)
AUTHORS = dict(
    type="Segmentor",
    encoder=dict(RESNET, depth=101, stem="deep", ceil_mode=True),
    decoder=dict(type="CCNetDecoder"),
    head=dict(type="SemanticHead", num_classes=19, auxiliary=AUXILIARY, align_corners=True),
)
MMSEG = dict(
    type="Segmentor",
    encoder=dict(RESNET, depth=50, stem="v1c", contract_dilation=True),
    decoder=dict(type="CCNetDecoder", negative_slope=0.0),
    head=dict(type="SemanticHead", num_classes=19, auxiliary=dict(index=2)),
)
LOSSES = {
    "loss_dsn": dict(type="CrossEntropyLoss"),
    "loss_ohem_default": dict(type="OHEMCrossEntropyLoss", thresh=0.7, min_kept=100_000),
    "loss_ohem_small": dict(type="OHEMCrossEntropyLoss", thresh=0.3, min_kept=4000),
    "loss_ohem_kth": dict(type="OHEMCrossEntropyLoss", thresh=1e-12, min_kept=12_000),
}


class Case:
    """A published network with the case's weights, and what its parts gave in one pass, by the case's names."""

    def __init__(self, folder: str, source: str, config: dict) -> None:
        self.meta, self.expected = parity.case(parity.CASES / folder)
        self.source = source
        with torch.device("meta"):
            self.model = MODELS.build(config)
        self.model.to_empty(device="cpu").double().eval()
        self.official = {key: torch.from_numpy(value) for key, value in parity.filled_state(self.meta).items()}
        self.model.load_state_dict(convert_state_dict(self.official, source, self.model))
        self.image = torch.from_numpy(parity.image_batch(self.meta))
        self.found: dict[str, Tensor] = {}
        self.model.decoder.convs[0].register_forward_hook(lambda _, __, x: self.found.update(conva=x))
        self.model.decoder.cca.register_forward_hook(self._note_attention)
        self.maps = self._run()

    def _note_attention(self, _, __, x: Tensor) -> None:
        self.found["cca_2" if "cca_1" in self.found else "cca_1"] = x

    @torch.no_grad()
    def _run(self, maps: list[Tensor] | None = None) -> list[Tensor]:
        self.found = {}
        maps = self.model.encoder(self.image) if maps is None else maps
        features = self.model.decoder(maps)
        outputs = self.model.head(features)
        self.found |= dict(head_feat=features.pixels, logits=outputs["sem_logits"], aux_logits=outputs["aux_logits"])
        return maps

    def with_weights(self, weights: dict[str, Tensor], maps: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Return the outputs with some of our weights replaced, on given maps of the encoder if any; for one pass."""
        before = {key: self.model.state_dict()[key].clone() for key in weights}
        kept = self.found
        self.model.load_state_dict(weights, strict=False)
        self._run(maps)
        self.model.load_state_dict(before, strict=False)
        found, self.found = self.found, kept
        return found

    def check(self, value: Tensor, name: str, tolerance: float = 1e-11) -> None:
        expected = self.expected[name]
        array = parity.thin(value.detach().numpy(), self.meta["outputs"][name])
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


@pytest.fixture(scope="module")
def authors() -> Case:
    return Case("ccnet_r101_cityscapes", "ccnet", AUTHORS)


@pytest.fixture(scope="module")
def mmseg() -> Case:
    return Case("mmseg_ccnet_r50_d8_cityscapes", "mmsegmentation", MMSEG)


def test_features_attention_and_logits(authors):
    for i, x in enumerate(authors.maps, start=1):
        authors.check(x.mean((2, 3)), f"layer{i}_mean")
        authors.check(x.std((2, 3), correction=0), f"layer{i}_std")
    authors.check(authors.maps[-1], "layer4")
    for name in ("conva", "cca_1", "cca_2", "logits", "aux_logits"):
        authors.check(authors.found[name], name)


def test_soft_attention(authors):
    soft = authors.meta["variants"]["soft"]["scale"]
    found = authors.with_weights(
        {ccnet_to_ours(key): authors.official[key] * factor for key, factor in soft.items()}, authors.maps
    )
    for name in ("logits", "cca_1", "cca_2"):
        authors.check(found[name], f"{name}_soft")


def test_scales_taken_as_they_are_stored(authors):
    norms = [key for key in authors.official if key.replace("weight", "running_var") in authors.official]
    stored = {ccnet_to_ours(key): authors.official[key] for key in norms if key.endswith(".weight")}
    found = authors.with_weights(stored)
    for name in ("logits", "aux_logits"):
        authors.check(found[name], f"{name}_plain_bn")
    assert (found["logits"] - authors.found["logits"]).abs().max() > 0.01  # ten thousand times the tolerance and more


@pytest.mark.parametrize("name", LOSSES)
def test_losses(authors, name):
    recipe = authors.meta["input"]["labels"]
    labels = np.random.RandomState(recipe["seed"]).randint(0, 19, recipe["shape"])
    labels[np.random.RandomState(recipe["seed"] + 1).random_sample(recipe["shape"]) < 0.1] = 255
    model = dict(in_channels=1, level_channels=[], encoder_channels=[1, 1, 1])
    head = MODELS.build(AUTHORS["head"] | model | dict(losses=[LOSSES[name]]))
    outputs = dict(sem_logits=authors.found["logits"], aux_logits=authors.found["aux_logits"])
    losses = head.loss(outputs, [SegSample(gt_semantic=torch.from_numpy(labels[0]))])
    assert len(losses) == 3
    authors.check(sum(value for key, value in losses.items() if "loss" in key), name)


def test_published_keys_of_the_authors_go_back(authors):
    official = authors.official
    assert detect_source(official) == "ccnet" and len(official) == 562
    back = to_official(authors.model.state_dict(), "ccnet")
    assert sorted(back) == sorted(official)
    assert max(float(back[key].sub(value).abs().max()) for key, value in official.items()) < 1e-15


def small(**options):
    encoder = dict(RESNET, depth=18, stem="deep", ceil_mode=True)
    head = dict(AUTHORS["head"], auxiliary=dict(AUXILIARY, channels=8))
    return MODELS.build(
        dict(AUTHORS, encoder=encoder, decoder=dict(type="CCNetDecoder", channels=8) | options, head=head)
    )


def test_signs_fold_and_unknown_parts_stay():
    model = small()
    official = to_official(model.state_dict(), "ccnet")
    official["head.convb.1.weight"][:3] = torch.tensor([-2.0, 0.0, 3.0])
    ours = convert_state_dict(official, "ccnet", model)
    scales = ours["decoder.convs.1.bn.weight"][:3]
    torch.testing.assert_close(scales, torch.tensor([2 + SCALE_EPS, SCALE_EPS, 3 + SCALE_EPS]), rtol=0, atol=1e-7)
    # The convolution for the category consistent loss is in no file, and goes into none.
    more = small(embedding_channels=4)
    kept = convert_state_dict(official, "ccnet", more)
    assert torch.equal(kept["decoder.embedding.weight"], more.decoder.embedding.weight)
    assert set(to_official(kept, "ccnet")) == set(official)
    with pytest.raises(ValueError, match=r"decoder.cca.0.gamma"):
        convert_state_dict(official, "ccnet", small(shared=False))
    ours["encoder.res3.0.conv1.norm.weight"][1] = -0.5
    with pytest.raises(ValueError, match=r"layer2.0.bn1.weight has scales down to -0.5"):
        to_official(ours, "ccnet")


def test_mmsegmentation(mmseg):
    assert detect_source(mmseg.official) == "mmsegmentation"
    found = mmseg.found | {f"feat_{i}": x for i, x in enumerate(mmseg.maps)}
    found["full_logits"] = resize(found["logits"], mmseg.image.shape[-2:], False)
    for name in mmseg.meta["outputs"]:
        mmseg.check(found[name], name)
    back = to_official(mmseg.model.state_dict(), "mmsegmentation")
    assert sorted(back) == sorted(mmseg.official)
    assert all(torch.equal(back[key].double(), value) for key, value in mmseg.official.items())
