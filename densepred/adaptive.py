"""ECO-M2F (arXiv:2404.15244): a segmentor that decides for each image how many encoder layers to run.

Three steps train it. The parent: every step leaves the encoder at one depth, drawn at random, so that any depth can exit.
The derived data set: how good each depth is on each image (`densepred.eco`). The gate: a linear layer, alone, that names the
depth from one vector an image. Rebuilt from the published description, which leaves open how the depth is drawn (here:
uniformly) and how it weighs the loss (here: by the number of layers, as far as the official remains tell).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from mmengine import dist
from mmengine.hooks import Hook
from torch import Tensor, nn

from densepred.data.derived import Derived
from densepred.data.preprocessor import SegPreprocessor
from densepred.decoders.adaptive import AdaptiveExit
from densepred.engine.hooks import unwrapped
from densepred.registry import HOOKS, MODELS
from densepred.segmentor import Segmentor
from densepred.structures import Features, SegSample

GATE = "decoder.gate."
"""How the gate's weights are named in an `AdaptiveSegmentor`."""


def gate_loss(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return ``loss_gate``, the cross-entropy, and ``gate_accuracy`` (0..1) of logits (B, E) for exits (B,) int64."""
    accuracy = (logits.argmax(1) == targets).to(logits.dtype).mean()
    return dict(loss_gate=F.cross_entropy(logits, targets), gate_accuracy=accuracy)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a model's weights by name, those of the gate left out: a parent's and its gates' are equal."""
    total = hashlib.sha256()
    for name in sorted(weights):
        if not name.startswith(GATE):
            values = weights[name].detach().cpu().contiguous()
            total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            total.update(values.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


@MODELS.register_module()
class GatePreprocessor(SegPreprocessor):
    """In training it stacks vectors (C,); images, in evaluation, are prepared as `SegPreprocessor` does."""

    def forward(self, data: dict, training: bool = False) -> dict:
        """Return ``inputs`` (B, C) and ``data_samples`` in training, else see `SegPreprocessor`."""
        if not training:
            return super().forward(data)
        data = self.cast_data(data)
        return {"inputs": torch.stack(list(data["inputs"])), "data_samples": data["data_samples"]}


@MODELS.register_module()
class AdaptiveSegmentor(Segmentor):
    """A segmentor whose decoder is an `AdaptiveExit`.

    Predicted samples tell in their metadata what was run: ``encoder_layers`` and, in multiply-adds, ``encoder_flops``.

    Args:
        encoder: config of the encoder.
        decoder: config of the `AdaptiveExit`.
        head: config of the head.
        data_preprocessor: config of the `SegPreprocessor`.
        init_cfg: see `Segmentor`.
        train: what is trained. ``"parent"``: all but the gate, on images. ``"gate"``: the gate alone, on a `GateDataset`;
            the rest is frozen and stays in evaluation mode.
        exit: who chooses the depth in evaluation: the ``"gate"``, a number of layers for all, or the ``"oracle"``: the
            samples' ``ideal_depth``, see `densepred.data.derived.LoadIdealDepth`.

    Raises:
        ValueError: ``train`` or ``exit`` is none of these, or the decoder is no `AdaptiveExit`.
    """

    def __init__(
        self,
        encoder: dict,
        decoder: dict,
        head: dict,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
        train: Literal["parent", "gate"] = "parent",
        exit: Literal["gate", "oracle"] | int = "gate",
    ) -> None:
        if train == "gate" and data_preprocessor:
            data_preprocessor = dict(data_preprocessor, type="GatePreprocessor")
        super().__init__(encoder, decoder, head, data_preprocessor, init_cfg)
        if not isinstance(self.decoder, AdaptiveExit):
            raise ValueError(
                f"AdaptiveSegmentor.decoder is a {type(self.decoder).__name__}: put it into an AdaptiveExit"
            )
        if train not in ("parent", "gate"):
            raise ValueError(f"AdaptiveSegmentor.train={train!r}: choose 'parent' or 'gate'")
        if exit not in ("gate", "oracle", *self.decoder.depths):
            raise ValueError(
                f"AdaptiveSegmentor.exit={exit!r}: choose 'gate', 'oracle' or one of {list(self.decoder.depths)} layers"
            )
        self.trained, self.exit = train, exit
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(GATE) == (train == "gate"))

    def train(self, mode: bool = True) -> nn.Module:
        """Switch to training mode; with the gate alone in training, everything stays in evaluation mode."""
        return super().train(mode and self.trained == "parent")

    def features(self, inputs: Tensor, data_samples: list[SegSample] | None) -> Features:
        """Return what the head reads, at the depth that ``exit`` says; note it in the samples."""
        left = self.decoder.exit(self.encoder(inputs), self._depths(inputs, data_samples))
        for sample, depth in zip(data_samples or (), left.depths, strict=data_samples is not None):
            sample.set_metainfo(dict(encoder_layers=depth, encoder_flops=depth * left.layer_flops))
        return left.features

    def _depths(self, inputs: Tensor, samples: list[SegSample] | None) -> Sequence[int] | None:
        if self.exit == "gate":
            return None
        if self.exit != "oracle":
            return [self.exit] * len(inputs)
        for sample in samples or [SegSample()]:
            if "ideal_depth" not in sample:
                raise ValueError(
                    f"model.exit='oracle': {sample.get('img_path', 'a sample')} has no ideal_depth; end the test pipeline "
                    "with dict(type='LoadIdealDepth', derived=..., beta=...)"
                )
        return [sample.ideal_depth for sample in samples]

    def loss(self, inputs: Tensor, data_samples: list[SegSample]) -> dict[str, Tensor]:
        """Return the losses of a step: the parent's at one random depth, times the depth, or the gate's.

        Args:
            inputs: images (B, 3, H, W), or for the gate the vectors (B, C).
            data_samples: with the head's ground truth, or for the gate with ``ideal_depth``.
        """
        if self.trained == "gate":
            exits = [self.decoder.depths.index(sample.ideal_depth) for sample in data_samples]
            return gate_loss(self.decoder.gate_logits(inputs), torch.tensor(exits, device=inputs.device))
        depth = self._draw_depth()
        features = self.decoder(self.encoder(inputs), [depth] * len(inputs))
        losses = self.head.loss(self.head(features), data_samples)
        weighted = {name: value * depth if "loss" in name else value for name, value in losses.items()}
        return weighted | {"encoder_layers": inputs.new_tensor(float(depth))}

    def _draw_depth(self) -> int:
        """Return a depth drawn from torch's global generator, the same in all processes: they make one batch."""
        exit = torch.randint(len(self.decoder.depths), (1,))
        dist.broadcast(exit)
        return self.decoder.depths[int(exit)]


@HOOKS.register_module()
class GateParentHook(Hook):
    """Start the gate's training from the parent that its data set was derived with, and from no other.

    Without ``load_from`` the checkpoint named in the derived data set is loaded.

    Raises:
        ValueError: the weights, the exits or the validation's classes are not those of the derived data set.
    """

    def before_train(self, runner: Any) -> None:
        """Load the parent where nothing else was loaded, then hold all against the derived data set."""
        derived = runner.train_dataloader.dataset.derived
        if runner.val_loop is not None:
            check_dataset(derived, runner.val_dataloader.dataset)
        check_exits(derived, unwrapped(runner.model).decoder)
        if not runner._has_loaded:
            runner._load_from = str(parent_checkpoint(derived))
            runner.load_checkpoint(runner._load_from)
        if fingerprint(unwrapped(runner.model).state_dict()) != derived.record["model"]["fingerprint"]:
            raise ValueError(
                f"{runner._load_from}: these are not the weights that {derived.path} was derived with "
                f"({derived.record['made_with']['checkpoint']}); load that checkpoint, or derive the data set again"
            )


def parent_checkpoint(derived: Derived) -> Path:
    """Return the checkpoint that a data set was derived with, or raise if it is gone."""
    path = Path(derived.record["made_with"]["checkpoint"])
    if not path.is_file():
        raise ValueError(
            f"{path}, with which {derived.path} was derived, is not there; say where it is: load_from=PATH"
        )
    return path


def check_dataset(derived: Derived, dataset: Any) -> None:
    """Raise ``ValueError`` unless a data set is of the type and has the classes of a derived one."""
    type_, classes = type(dataset).__name__, list(dataset.metainfo["classes"])
    if type_ != derived.record["dataset"]["type"]:
        raise ValueError(
            f"{derived.path} was derived from {derived.record['dataset']['type']} "
            f"({derived.record['dataset']['source']}), but val_dataloader.dataset is {type_}: derive this data set"
        )
    other = derived.record["metainfo"]["classes"]
    if classes != other:
        raise ValueError(
            f"{derived.path} was derived with {len(other)} classes ({', '.join(other[:3])}, ...), val_dataloader.dataset "
            f"has {len(classes)} ({', '.join(classes[:3])}, ...): derive this data set"
        )


def check_exits(derived: Derived, decoder: AdaptiveExit) -> None:
    """Raise ``ValueError`` unless a decoder has the exits and the gate's input of a derived data set."""
    model = derived.record["model"]
    found = dict(depths=list(decoder.depths), embed_dim=decoder.decoder.embed_dim)
    for name, value in found.items():
        if model[name] != value:
            raise ValueError(
                f"{derived.path} was derived with a model of {name}={model[name]}, this one has {value}: take that model's "
                "config, or derive the data set again"
            )
