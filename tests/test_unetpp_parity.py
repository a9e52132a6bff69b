"""UNet++ in its three published forms against the published code's numbers, in float64, and what pruned networks compute."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densepred
from densepred.engine.conversion import detect_source, to_official
from densepred.engine.mapping_unetpp import ours_to_keras, ours_to_nnunet
from densepred.registry import MODELS
from tests import parity

DEEP = dict(type="UNetPlusPlusDecoder", deep_supervision=True)
SMP_FEATURES = ("conv1", "res2", "res3", "res4", "res5")
NETWORKS = {
    "smp": (
        "unetpp_resnet34",
        dict(type="ResNet", depth=34, out_features=SMP_FEATURES),
        dict(type="UNetPlusPlusDecoder"),
        dict(type="SemanticHead", num_classes=19, kernel_size=3),
    ),
    "unetpp-nnunet": (
        "unetpp_deep_supervision",
        dict(type="UNetEncoder", style="nnunet", image_channels=1),
        dict(DEEP, style="nnunet"),
        dict(type="SemanticHead", num_classes=3, bias=False),
    ),
    "unetpp-keras": (
        "unetpp_keras_original",
        dict(type="UNetEncoder", style="keras", image_channels=1),
        dict(DEEP, style="keras"),
        dict(type="SemanticHead", num_classes=2, binary=True),
    ),
}


class Case:
    """A published network with the case's weights, and the outputs of its nodes in one pass."""

    def __init__(self, source: str) -> None:
        folder, encoder, decoder, head = NETWORKS[source]
        self.source = source
        self.meta, self.expected = parity.case(parity.CASES / folder)
        with torch.device("meta"):
            self.model = MODELS.build(dict(type="Segmentor", encoder=encoder, decoder=decoder, head=head))
        self.model.to_empty(device="cpu").double().eval()
        self.official = {key: torch.from_numpy(value) for key, value in parity.filled_state(self.meta).items()}
        self.model.load_state_dict(densepred.convert_state_dict(self.official, source=source, model=self.model))
        self.image = torch.from_numpy(parity.image_batch(self.meta))
        self.found: dict[str, Tensor] = {}
        for name, node in self.model.decoder.nodes.items():
            node.register_forward_hook(lambda _, __, x, name=name: self.found.update({f"node_{name}": x}))
        with torch.no_grad():
            self.features = self.model.features(self.image, None)
            self.outputs = self.model.head(self.features)
        self.found |= {f"node_x{i}_0": x for i, x in enumerate(self.features.encoder)}

    @property
    def heads(self) -> list[Tensor]:
        return [*self.outputs["deep_logits"], self.outputs["sem_logits"]]

    def target(self) -> Tensor:
        recipe = self.meta["input"]["target"]
        return torch.from_numpy(parity.normal_input(recipe["seed"], recipe["shape"]))

    def check(self, value: Tensor, name: str, tolerance: float = 1e-12) -> None:
        expected = self.expected[name]
        array = parity.thin(value.detach().numpy(), self.meta["outputs"][name])
        np.testing.assert_allclose(array, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {source: Case(source) for source in NETWORKS}


@pytest.fixture
def smp(cases) -> Case:
    return cases["smp"]


@pytest.fixture
def nnunet(cases) -> Case:
    return cases["unetpp-nnunet"]


@pytest.fixture
def keras(cases) -> Case:
    return cases["unetpp-keras"]


@pytest.mark.parametrize("source", NETWORKS)
def test_every_published_key_has_a_place_and_goes_back(source, cases):
    case = cases[source]
    assert detect_source(case.official) == source
    back = to_official(case.model.state_dict(), source)
    assert sorted(back) == sorted(case.official)
    assert all(torch.equal(back[key].double(), value) for key, value in case.official.items())
    # An encoder by itself takes its part of the file.
    part = densepred.convert_state_dict(case.official, source, case.model.encoder)
    assert all(torch.equal(part[key], value) for key, value in case.model.encoder.state_dict().items())


@pytest.mark.parametrize("source", NETWORKS)
def test_number_of_parameters(source, cases):
    config = cases[source].meta["config"]["parameters"]
    count = sum(p.numel() for p in cases[source].model.parameters())
    assert count == (config["UNetPlusPlus deep supervision"] if isinstance(config, dict) else config)


def test_smp_nodes_and_logits(smp):
    found = {f"encoder_{i + 1}": x for i, x in enumerate(smp.features.encoder)}
    for level in range(4):
        for first in range(level + 1):
            found[f"x_{first}_{level}"] = smp.found[f"node_x{3 - level}_{level - first + 1}"]
    found |= {"x_0_4": smp.features.pixels, "logits": smp.outputs["sem_logits"]}
    assert found.keys() == smp.meta["outputs"].keys()
    for name, value in found.items():
        smp.check(value, name)
    assert [x.shape[1] for x in smp.features.levels] == smp.model.decoder.level_channels == [512, 256, 128]


@pytest.mark.parametrize("source", ["unetpp-nnunet", "unetpp-keras"])
def test_official_nodes(source, cases):
    case = cases[source]
    names = [name for name in case.meta["outputs"] if name.startswith("node")]
    assert sorted(names) == sorted(case.found)
    for name in names:
        case.check(case.found[name], name)


def modules_that_run(case: Case, prune: int | None) -> tuple[dict[str, nn.Module], dict]:
    """Return the modules with weights that one prediction runs, by name, and the head's outputs."""
    ran, handles = {}, []
    for name, module in case.model.named_modules():
        if list(module.parameters(recurse=False)):
            hook = module.register_forward_hook(lambda m, _, __, name=name: ran.update({name: m}))
            handles.append(hook)
    case.model.decoder.prune = prune
    with torch.no_grad():
        outputs = case.model.head(case.model.features(case.image, None), deep_supervision=False)
    case.model.decoder.prune = None
    for handle in handles:
        handle.remove()
    return ran, outputs


@pytest.mark.parametrize("j", range(1, 6))
def test_nnunet_pruned_computes_what_it_needs_and_nothing_else(nnunet, j):
    nnunet.check(nnunet.heads[j - 1], f"seg_L{j}")
    ran, outputs = modules_that_run(nnunet, j)
    assert torch.equal(outputs["sem_logits"], nnunet.heads[j - 1]) and "deep_logits" not in outputs
    config = nnunet.meta["config"]
    groups = {".".join(ours_to_nnunet(f"{name}.weight").split(".")[:2]) for name in ran}
    assert groups == set(config["module_groups_needed_by_pruned"][f"L{j}"])
    count = sum(p.numel() for module in ran.values() for p in module.parameters(recurse=False))
    assert count == config["parameters_needed_by_pruned"][f"L{j}"]


@pytest.mark.parametrize("j", range(1, 5))
def test_keras_pruned_computes_what_it_needs_and_nothing_else(keras, j):
    keras.check(keras.heads[j - 1].softmax(1)[:, 1:], f"output_{j}")
    ran, outputs = modules_that_run(keras, j)
    assert torch.equal(outputs["sem_logits"], keras.heads[j - 1])
    needed = {f"conv{i + 1}{k + 1}_{n}" for i in range(j + 1) for k in range(j + 1 - i) for n in (1, 2)}
    needed |= {f"up{i + 1}{k + 1}" for i in range(j) for k in range(1, j + 1 - i)} | {f"output_{j}"}
    assert {ours_to_keras(f"{name}.weight").removesuffix(".weight") for name in ran} == needed
    count = sum(p.numel() for module in ran.values() for p in module.parameters(recurse=False))
    assert count == keras.meta["config"]["parameters_of_pruned"][f"L{j}"]


def test_without_pruning_a_prediction_needs_all_nodes_but_one_classifier(nnunet):
    ran, _ = modules_that_run(nnunet, None)
    own = {name for name, m in nnunet.model.named_modules() if list(m.parameters(recurse=False))}
    assert own - set(ran) == {f"head.deep_classifiers.{i}" for i in range(4)}


def test_averaged_prediction_is_the_mean_of_all_probabilities(keras):
    keras.model.head.average_deep = True
    try:
        found = keras.model.head.class_logits(keras.outputs, (64, 96)).softmax(1)[:, 1:].numpy()
    finally:
        keras.model.head.average_deep = False
    expected = np.mean([keras.expected[f"output_{j}"] for j in range(1, 5)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def nnunet_dice(probs: Tensor, onehot: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return minus the soft dice of the foreground classes; classes and, unless in ``axes``, images are averaged."""
    tp = (probs * onehot).sum(axes)
    both = probs.sum(axes) + onehot.sum(axes)  # 2 tp + fp + fn
    return -((2 * tp + 1e-5) / (both + 1e-5 + 1e-8))[..., 1:].mean()


def test_nnunet_losses_of_the_heads_and_their_sums(nnunet):
    target = nnunet.target()[:, 0]
    labels = (target > 0.3).long() + (target > 1.2).long()  # (B, H, W)
    onehot = F.one_hot(labels, 3).movedim(-1, 1).double()
    losses = []
    for j, logits in enumerate(nnunet.heads, start=1):
        logits = logits.clone().requires_grad_()
        ce, probs = F.cross_entropy(logits, labels), logits.softmax(1)
        dice = nnunet_dice(probs, onehot, (0, 2, 3))
        nnunet.check(ce, f"ce_L{j}")
        nnunet.check(dice, f"dice_L{j}")
        nnunet.check(ce + dice, f"loss_L{j}")
        nnunet.check(ce + nnunet_dice(probs, onehot, (2, 3)), f"loss_persample_L{j}")
        nnunet.check(torch.autograd.grad(ce + dice, logits)[0], f"grad_L{j}")
        losses.append((ce + dice).detach())
    nnunet.check(losses[0], "loss_official_HEAD")
    nnunet.check(sum(losses), "loss_equal_sum")
    weights = np.array([0, 1 / 8, 1 / 4, 1 / 2, 1])
    nnunet.check(sum(w * x for w, x in zip(weights / weights.sum(), losses, strict=True)), "loss_nnunet_weights")


def test_keras_losses_and_what_the_weight_decay_is_on(keras):
    target = (keras.target() > 0.5).double()
    total = torch.zeros((), dtype=torch.float64)
    for j, logits in enumerate(keras.heads, start=1):
        probs = logits.softmax(1)[:, 1:].clone().requires_grad_()
        dice = (2 * (probs * target).sum() + 1) / (probs.sum() + target.sum() + 1)
        loss = 0.5 * F.binary_cross_entropy(probs.clamp(1e-7, 1 - 1e-7), target) - dice
        keras.check(dice, f"dice_coef_{j}")
        keras.check(loss, f"bce_dice_{j}", tolerance=1e-7)  # Keras's cross entropy is exact to float32 only
        keras.check(torch.autograd.grad(loss, probs)[0], f"bce_dice_grad_{j}", tolerance=1e-7)
        total += loss.detach()
    keras.check(total, "bce_dice_sum", tolerance=1e-7)
    kernels = [m.weight for m in keras.model.modules() if isinstance(m, nn.Conv2d)]
    keras.check(1e-4 * sum(w.square().sum() for w in kernels), "l2_penalty")
