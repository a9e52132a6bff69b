"""Hooks of every run: what is checked before the first step, and what is written down."""

import json
import math
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from densepred.engine.checkpoint import state_dict_of
from densepred.engine.conversion import fitting_weights, naming
from densepred.registry import HOOKS


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a data-parallel wrapper, or the model itself."""
    return model.module if is_model_wrapper(model) else model


@HOOKS.register_module()
class LoadWeightsHook(Hook):
    """Make a loaded checkpoint fit exactly or stop: official files are converted on the fly, ours are held strictly.

    MMEngine loads what fits and only logs the rest; a checkpoint of another architecture would train from scratch. A
    training may start from an encoder's file; an evaluation needs every weight.
    """

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Replace the checkpoint's weights by weights under our keys, complete and of the right shapes."""
        trains = runner._train_loop is not None
        with naming(runner._load_from or "checkpoint"):
            weights, report = fitting_weights(unwrapped(runner.model), state_dict_of(checkpoint), whole=not trains)
        checkpoint["state_dict"] = weights
        runner.logger.info(f"Weights: {report}")


@HOOKS.register_module()
class ClassCheckHook(Hook):
    """Stop before the first step when the data sets and the head disagree about the classes.

    Raises:
        ValueError: names both counts and both config keys.
    """

    def before_run(self, runner: Any) -> None:
        """Check every data set of the run."""
        head = unwrapped(runner.model).head
        for phase in ("train", "val", "test"):
            loader = getattr(getattr(runner, f"_{phase}_loop", None), "dataloader", None)
            if loader is not None:  # a loop that this run does not use is still a config
                check_classes(loader.dataset.metainfo, head.num_classes, getattr(head, "thing_classes", None), phase)


def check_classes(metainfo: dict, num_classes: int, thing_classes: Any, phase: str) -> None:
    """Raise ``ValueError`` if a data set's classes are not those the head was built for."""
    classes = metainfo["classes"]
    if len(classes) != num_classes:
        raise ValueError(
            f"{phase}_dataloader.dataset has {len(classes)} classes ({', '.join(classes[:3])}, ...), model.head.num_classes "
            f"is {num_classes}: set the top-level num_classes={len(classes)} (and thing_classes), which both read"
        )
    things = [i for i, thing in enumerate(metainfo.get("isthing", ())) if thing]
    if thing_classes is not None and "isthing" in metainfo and sorted(thing_classes) != things:
        wrong = sorted(set(thing_classes) ^ set(things))
        raise ValueError(
            f"{phase}_dataloader.dataset and model.head.thing_classes disagree whether "
            f"{', '.join(str(i) for i in wrong[:5])} are things: set the top-level thing_classes={things}"
        )


def finite(value: float) -> float | None:
    """Return a number that JSON can hold; NaN (nothing to measure) becomes ``None``."""
    return float(value) if math.isfinite(value) else None


@HOOKS.register_module()
class MetricsFileHook(Hook):
    """Write ``metrics.json``: the metrics of the latest evaluation, overall and per class."""

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        """Write the validation's metrics with their iteration."""
        self._write(runner, runner.val_evaluator, metrics, {"iteration": runner.iter})

    def after_test_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        """Write the test's metrics with the checkpoint they belong to."""
        self._write(runner, runner.test_evaluator, metrics, {"checkpoint": runner._load_from})

    @master_only
    def _write(self, runner: Any, evaluator: Any, metrics: dict | None, record: dict) -> None:
        record = {**record, "metrics": {k: finite(v) for k, v in (metrics or {}).items()}}
        for metric in evaluator.metrics:
            for name, figures in getattr(metric, "per_class", {}).items():
                row = record.setdefault("per_class", {}).setdefault(name, {})
                row.update({k: finite(v) for k, v in figures.items()})
        path = Path(runner.work_dir, "metrics.json")
        scratch = path.with_suffix(".json.part")
        scratch.write_text(json.dumps(record, indent=1) + "\n")
        scratch.replace(path)


@HOOKS.register_module()
class TotalBatchHook(Hook):
    """Say how many images make one optimiser step, and warn when the recipe means another number.

    ``auto_scale_lr.base_batch_size`` states the recipe's total.
    """

    def before_train(self, runner: Any) -> None:
        """Log images a process x processes x accumulation."""
        images, steps = runner.train_dataloader.batch_size, runner.optim_wrapper._accumulative_counts
        total = images * runner.world_size * steps
        text = f"{total} images a step = {images} a process x {runner.world_size} processes x {steps} accumulated"
        base = (runner.auto_scale_lr or {}).get("base_batch_size", total)
        if base == total:
            runner.logger.info(text)
            return
        runner.logger.warning(
            f"{text}, but this recipe's learning rate is meant for {base}: set "
            f"optim_wrapper.accumulative_counts={max(1, round(base / (images * runner.world_size)))} to keep the total, or "
            "auto_scale_lr.enable=True to scale the learning rate"
        )


@HOOKS.register_module()
class BatchNormMomentumHook(Hook):
    """Set the momentum of all batch norms: a run of a few hundred steps ends before a small one has averaged anything.

    Args:
        momentum: weight of a new batch in the running statistics, 0..1.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def before_train(self, runner: Any) -> None:
        """Set it on every batch norm of the model."""
        for module in unwrapped(runner.model).modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = self.momentum
