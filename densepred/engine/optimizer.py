"""Parameter groups and the learning rate schedule of the published recipes, as MMEngine's registries can name them."""

from collections import defaultdict
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import BaseOptimWrapper, _ParamScheduler
from torch import nn

from densepred.encoders import ConvNeXt, SwinTransformer
from densepred.errors import ConfigError, nearest
from densepred.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS

PARAMWISE_KEYS = ("lr_mult", "no_decay", "decay_biases")
LAYER_DECAY_KEYS = ("decay_rate", "num_layers")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DecayGroupsConstructor:
    """Group parameters by learning rate and weight decay.

    No weight decay for vectors and scalars (norms, biases, layer scales) and for the parameters named; a part's learning
    rate can be scaled without touching that rule. (In MMEngine's default constructor a ``custom_keys`` entry for a part
    switches the rules for norms and biases off in it.)

    Args:
        optim_wrapper_cfg: config of the wrapper with ``optimizer``, whose ``lr`` and ``weight_decay`` are the base.
        paramwise_cfg: ``lr_mult``, factor by the first part of parameters' names, e.g. ``dict(encoder=0.1)``;
            ``no_decay``, ends of names, e.g. ``["cluster_centers", "head.level_embed"]``; ``decay_biases=True`` lets biases
            decay, but for those of norms.

    Raises:
        ConfigError: an unknown key in ``paramwise_cfg``, or an entry that names no parameter of the model.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop("optimizer"))
        paramwise_cfg = paramwise_cfg or {}
        for key in paramwise_cfg:
            if key not in PARAMWISE_KEYS:
                raise ConfigError(f"optim_wrapper.paramwise_cfg.{key}: unknown key{nearest(key, PARAMWISE_KEYS)}")
        self.lr_mult = dict(paramwise_cfg.get("lr_mult", {}))
        self.no_decay = tuple(paramwise_cfg.get("no_decay", ()))
        self.decay_biases = bool(paramwise_cfg.get("decay_biases", False))

    def __call__(self, model: nn.Module) -> BaseOptimWrapper:
        """Build the optimizer over the model's trainable parameters, and its wrapper."""
        groups = self.param_groups(model.module if is_model_wrapper(model) else model)
        return _wrapper_over(groups, self.optimizer, self.wrapper)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return ``params``, ``lr`` and ``weight_decay`` of every group."""
        names = [name for name, _ in model.named_parameters()]
        self._check("lr_mult", self.lr_mult, {name.split(".")[0] for name in names})
        self._check("no_decay", self.no_decay, {end for name in names for end in _ends(name)})
        groups = defaultdict(list)
        norms = norm_parameters(model)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            bias = self.decay_biases and name.endswith("bias") and name not in norms
            decays = (parameter.ndim > 1 or bias) and not _ends(name) & set(self.no_decay)
            groups[self.lr_mult.get(name.split(".")[0], 1.0), decays].append(parameter)
        return [
            dict(params=params, lr=self.optimizer["lr"] * mult, weight_decay=self.optimizer["weight_decay"] * decays)
            for (mult, decays), params in groups.items()
        ]

    @staticmethod
    def _check(key: str, entries: Any, known: set[str]) -> None:
        for entry in entries:
            if entry not in known:
                raise ConfigError(
                    f"optim_wrapper.paramwise_cfg.{key} names {entry!r}, which no parameter of the model has"
                    f"{nearest(entry, known)}"
                )


def _wrapper_over(groups: list[dict[str, Any]], optimizer: dict, wrapper: dict) -> BaseOptimWrapper:
    built = OPTIMIZERS.build(optimizer, default_args=dict(params=groups))
    return OPTIM_WRAPPERS.build(wrapper, default_args=dict(optimizer=built))


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor:
    """Learning rates that fall from the decoder and the head towards the encoder's input.

    A parameter of layer i learns at ``decay_rate ** (num_layers + 1 - i)`` times the base rate; `convnext_layer` and
    `swin_layer` number the encoder's layers, everything else (its output norms too) has the base rate. No weight decay
    for vectors, scalars and biases. Source: the constructors of mmsegmentation (ConvNeXt, stage-wise) and VWFormer (both).

    Args:
        optim_wrapper_cfg: config of the wrapper with ``optimizer``, whose ``lr`` and ``weight_decay`` are the base.
        paramwise_cfg: ``decay_rate``, in (0, 1], and ``num_layers``. ConvNeXt: 0.9 and 6 (mmsegmentation, all sizes;
            VWFormer, tiny) or 12 (VWFormer, the others); Swin in VWFormer: 0.85 and 12.

    Raises:
        ConfigError: another key than these two, one of them missing or out of range, an encoder whose layers have no
            numbers, or one with more layers than ``num_layers``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.wrapper = dict(optim_wrapper_cfg)
        self.optimizer = dict(self.wrapper.pop("optimizer"))
        paramwise_cfg = dict(paramwise_cfg or {})
        for key in paramwise_cfg:
            if key not in LAYER_DECAY_KEYS:
                raise ConfigError(f"optim_wrapper.paramwise_cfg.{key}: unknown key{nearest(key, LAYER_DECAY_KEYS)}")
        self.decay_rate, self.num_layers = (paramwise_cfg.get(key) for key in LAYER_DECAY_KEYS)
        if self.decay_rate is None or self.num_layers is None or not 0 < self.decay_rate <= 1:
            raise ConfigError(
                f"optim_wrapper.paramwise_cfg={paramwise_cfg}: LayerDecayConstructor needs decay_rate in (0, 1] and "
                "num_layers, such as dict(decay_rate=0.9, num_layers=6) for ConvNeXt"
            )

    def __call__(self, model: nn.Module) -> BaseOptimWrapper:
        """Build the optimizer over the model's trainable parameters, and its wrapper."""
        groups = self.param_groups(model.module if is_model_wrapper(model) else model)
        return _wrapper_over(groups, self.optimizer, self.wrapper)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return ``params``, ``lr`` and ``weight_decay`` of every group."""
        groups = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and not name.endswith(".bias")
                groups[self._layer(name, model.encoder), decays].append(parameter)
        lr, decay = self.optimizer["lr"], self.optimizer["weight_decay"]
        return [
            dict(
                params=params,
                lr=lr * self.decay_rate ** (self.num_layers + 1 - layer),
                weight_decay=decay * decays,
            )
            for (layer, decays), params in groups.items()
        ]

    def _layer(self, name: str, encoder: nn.Module) -> int:
        number = next((f for kind, f in LAYER_NUMBERS.items() if isinstance(encoder, kind)), None)
        if number is None:
            kinds = " or ".join(kind.__name__ for kind in LAYER_NUMBERS)
            raise ConfigError(
                f"optim_wrapper.constructor='LayerDecayConstructor': model.encoder is {type(encoder).__name__}, and "
                f"only the layers of {kinds} have numbers; use DecayGroupsConstructor"
            )
        inside = name.startswith("encoder.")
        layer = number(name.removeprefix("encoder."), self.num_layers) if inside else None
        if layer is not None and layer > self.num_layers:
            raise ConfigError(
                f"optim_wrapper.paramwise_cfg.num_layers={self.num_layers}: {name} is in layer {layer}; the published "
                "values are 6 and 12"
            )
        return self.num_layers + 1 if layer is None else layer


def convnext_layer(name: str, num_layers: int) -> int | None:
    """Return the layer of a ConvNeXt parameter: 0 for stem and downsampling, 1 to 4 for the stages, None for norms."""
    kind, number, *_ = name.split(".")
    if kind == "downsample_layers":
        return 0
    return int(number) + 1 if kind == "stages" else None


def swin_layer(name: str, num_layers: int) -> int | None:
    """Return the layer of a Swin parameter, None for the output norms.

    0 for the patch embedding, 1 and 2 for the first two stages, 3 and on for each two blocks of the third, ``num_layers``
    for the fourth; a downsampling counts to the layer its stage begins with.
    """
    kind, *rest = name.split(".")
    if kind != "layers":
        return 0 if kind == "patch_embed" else None
    stage, part, block = int(rest[0]), rest[1], rest[2]
    if stage == 3:
        return num_layers
    return stage + 1 + (int(block) // 2 if stage == 2 and part == "blocks" else 0)


LAYER_NUMBERS = {ConvNeXt: convnext_layer, SwinTransformer: swin_layer}


def norm_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters that belong to normalisation layers."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    norms = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return {f"{norm}.{name}" for norm in norms for name in ("weight", "bias")}


def _ends(name: str) -> set[str]:
    """Return the name's dotted ends: of ``a.b.c`` these are ``c``, ``b.c`` and ``a.b.c``."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


@PARAM_SCHEDULERS.register_module()
class WarmupPolyLR(_ParamScheduler):
    """Linear warm-up, then polynomial decay (1 - t / T) ** power with t counted from 0.

    Because t does not start after the warm-up, the rate drops a little at its end (3 % for 5,000 of 150,000). Source:
    the TF2WarmupPolyLR of bytedance/kmax-deeplab.

    Args:
        optimizer: the optimizer's wrapper.
        warmup_iters: iterations of warm-up.
        warmup_factor: factor on the learning rate at t = 0.
        power: of the decay.
        end: T, the length of the training.
        last_step: as in MMEngine's schedulers.
    """

    def __init__(
        self,
        optimizer: BaseOptimWrapper,
        warmup_iters: int,
        end: int,
        warmup_factor: float = 0.001,
        power: float = 0.9,
        last_step: int = -1,
    ) -> None:
        self.warmup_iters, self.warmup_factor, self.power = warmup_iters, warmup_factor, power
        super().__init__(optimizer, "lr", end=end, by_epoch=False, last_step=last_step)

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a stored position; the schedule's own numbers stay the config's, so that a run can be prolonged."""
        own = ("warmup_iters", "warmup_factor", "power", "end")
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in own})
        self.last_step = self._global_step  # MMEngine stops counting the former at the end

    def factor(self, t: int) -> float:
        """Return the factor on the base learning rate in iteration t, 0 <= t < T."""
        if t < self.warmup_iters:
            share = t / self.warmup_iters
            return self.warmup_factor * (1 - share) + share
        return (1 - t / self.end) ** self.power

    def _get_value(self) -> list[float]:
        return [base * self.factor(self.last_step) for base in self.base_values]
