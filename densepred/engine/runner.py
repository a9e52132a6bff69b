"""From a config to MMEngine's runner."""

import importlib.util
import inspect
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader

from densepred.engine.checkpoint import read_checkpoint
from densepred.engine.config import load_linked_config, resolve_config, runner_keys
from densepred.engine.cures import init_cpu_processes
from densepred.errors import ConfigError, nearest
from densepred.registry import METRICS

LOGGERS = {"tensorboard": "TensorboardVisBackend", "wandb": "WandbVisBackend", "mlflow": "MLflowVisBackend"}

TRAIN_KEYS = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr")
TRAIN_KEYS += ("val_dataloader", "val_cfg", "val_evaluator")

# Every file that MMEngine reads goes through our reader: weights_only, safetensors, no pickle that could execute.
CheckpointLoader.register_scheme(prefixes="", loader=read_checkpoint, force=True)


CONSOLE_NOISE = (
    "\n" + "-" * 60 + "\nSystem environment",
    "Config:\n",
    "Hooks will be executed",
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
)
"""How those messages of MMEngine begin that only the log file needs."""


class SegRunner(Runner):
    """MMEngine's runner with a readable console; the log file keeps every line."""

    def build_logger(self, log_level: str | int = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Build the logger as MMEngine does, and keep environment, config and hook lists off the console."""
        logger = super().build_logger(log_level, log_file, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(lambda record: not record.getMessage().startswith(CONSOLE_NOISE))
        return logger


def build_runner(linked: Config, work_dir: str | None = None, launcher: str = "none", amp: bool = False) -> Runner:
    """Build the runner that trains a config.

    Args:
        linked: the config as `load_linked_config` returns it; with its links in place it is written to ``work_dir``, from
            where it can be run again.
        work_dir: where outputs go; by default the config's ``work_dir`` or ``work_dirs/<config's name>``.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        amp: train in bfloat16 mixed precision.

    Raises:
        ConfigError: the config does not hold together.
    """
    cfg = prepare(linked, work_dir, launcher)
    if amp:
        use_amp(cfg)
    if cfg.get("ema"):
        average = dict(type="EMAHook", momentum=0.0002, update_buffers=True)
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), average]
    runner = SegRunner.from_cfg(cfg)
    write_linked_config(linked, Path(runner.work_dir, config_name(linked)))
    return runner


def config_name(cfg: Config) -> str:
    """Return the file name of a config."""
    return Path(cfg.filename or "config.py").name


def prepare(linked: Config, work_dir: str | None, launcher: str) -> Config:
    """Resolve a config and fill in what every run needs."""
    cfg = resolve_config(linked)
    choose_metrics(cfg)
    stem = Path(config_name(linked)).stem
    cfg.work_dir = work_dir or cfg.get("work_dir") or f"work_dirs/{stem}"
    cfg.launcher = launcher
    cfg.setdefault("default_scope", "densepred")
    cfg.setdefault("experiment_name", f"{stem}_{uuid.uuid4().hex[:8]}")  # MMEngine keeps singletons by this name
    add_loggers(cfg)
    if launcher != "none" and not torch.cuda.is_available():
        use_cpu_processes(cfg)
    known = runner_keys()
    return Config({k: v for k, v in cfg.to_dict().items() if k in known}, filename=cfg.filename)


def choose_metrics(cfg: Config) -> None:
    """Keep the metrics of the config's ``tasks``, in place, where an evaluator is a dict of metrics by task.

    Raises:
        ConfigError: a task has no metric.
    """
    for key in ("val_evaluator", "test_evaluator"):
        by_task = cfg.get(key)
        if not isinstance(by_task, dict) or "type" in by_task:
            continue
        for task in cfg.tasks:
            if task not in by_task:
                raise ConfigError(f"tasks: {key} has no metric for {task!r}{nearest(task, by_task)}")
        chosen = [by_task[task] for task in cfg.tasks]
        cfg[key] = [metric for entry in chosen for metric in (entry if isinstance(entry, list) else [entry])]


def write_results(cfg: Config, out: str) -> None:
    """Let every metric that can write results do so, in place: into ``out``, of several each into its own folder."""
    metrics = [cfg.test_evaluator] if isinstance(cfg.test_evaluator, dict) else cfg.test_evaluator
    writing = [m for m in metrics if "out_dir" in inspect.signature(METRICS.get(m["type"]).__init__).parameters]
    for metric in writing:
        metric["out_dir"] = str(Path(out, metric["type"])) if len(writing) > 1 else out


def use_amp(cfg: Config) -> None:
    """Swap the optimiser wrapper for the mixed precision one, in place."""
    kind = cfg.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ConfigError(f"--amp replaces optim_wrapper.type=OptimWrapper, not {kind}")
    cfg.optim_wrapper["type"] = "AmpOptimWrapper"


def add_loggers(cfg: Config) -> None:
    """Add TensorBoard where it is installed, and the back ends that ``loggers`` names, in place."""
    names = list(cfg.get("loggers", ()))
    if importlib.util.find_spec("tensorboard") and "tensorboard" not in names:
        names.append("tensorboard")
    backends = cfg.setdefault(
        "visualizer", dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
    ).vis_backends
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"loggers: {name!r} is none{nearest(name, LOGGERS)}")
        backend = dict(type=LOGGERS[name])
        if name == "mlflow":  # its default file store is gone
            backend["tracking_uri"] = f"sqlite:///{Path(cfg.work_dir).absolute() / 'mlflow.db'}"
        if all(b["type"] != backend["type"] for b in backends):
            backends.append(backend)


def use_cpu_processes(cfg: Config) -> None:
    """Join the process group over gloo and wrap the model for CPU, in place."""
    if cfg.launcher != "pytorch":
        raise ConfigError(f"--launcher {cfg.launcher} needs GPUs; several processes on CPU start with torchrun")
    init_cpu_processes()
    cfg.model_wrapper_cfg = dict(
        type="densepred.CPUDistributedDataParallel",  # MMEngine looks in its root registry here
        find_unused_parameters=cfg.get("find_unused_parameters", False),
    )
    if cfg.pop("sync_bn", None) and int(os.environ.get("RANK", 0)) == 0:
        print("sync_bn: torch has no synchronised batch norm on CPU; each process normalises its own images")


def write_linked_config(linked: Config, path: Path) -> None:
    """Write the merged config with its links, so that the file can be run and overridden like any other."""
    if int(os.environ.get("RANK", 0)) == 0:
        path.write_text(linked.pretty_text)


def train(config: str, cfg_options: dict, work_dir: str | None, resume: str | None, launcher: str, amp: bool) -> Runner:
    """Train a config; ``resume`` is ``None``, ``"auto"`` (the newest checkpoint in the work dir) or a path."""
    linked = load_linked_config(config, cfg_options)
    if resume is not None:
        linked.resume = True
        linked.load_from = None if resume == "auto" else resume
    runner = build_runner(linked, work_dir, launcher, amp)
    runner.train()
    return runner


def test(
    config: str,
    checkpoint: str,
    cfg_options: dict,
    work_dir: str | None,
    launcher: str,
    out: str | None,
    show_dir: str | None,
) -> Runner:
    """Evaluate a checkpoint; ``out`` takes predictions in the official format, ``show_dir`` a picture an image."""
    linked = load_linked_config(config, cfg_options)
    linked.load_from = checkpoint
    linked.resume = False
    cfg = prepare(linked, work_dir, launcher)
    for key in TRAIN_KEYS:
        cfg.pop(key, None)
    if out:
        write_results(cfg, out)
    if show_dir:
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="PictureGridHook", show_dir=show_dir)]
    runner = SegRunner.from_cfg(cfg)
    runner.test()
    return runner
