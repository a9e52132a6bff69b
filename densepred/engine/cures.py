"""What MMEngine 0.10.7 gets wrong on a current torch, each with its smallest cure. Delete a cure when upstream heals.

1. Checkpoints carry ``HistoryBuffer`` objects, which torch >= 2.6 refuses to load (open-mmlab/mmengine#1655):
   `PlainMessageHubHook` stores plain lists and numbers instead.
2. A resumed run loads and discards every batch it has already seen, and its random state is another one
   (open-mmlab/mmengine#1520, #1633): `SeekableTrainLoop` seeks, `IterationSeedHook` derives the state from the iteration.
3. ``AmpOptimWrapper`` asserts a GPU and scales bfloat16 losses, which need no scaling: ours replaces it.
4. ``init_dist`` and ``MMDistributedDataParallel`` assume CUDA devices, so two processes on CPU fail:
   `init_cpu_processes`, `CPUDistributedDataParallel`.
5. A NaN loss trains on in silence: `NonFiniteLossHook`.
6. A run lays out its whole config as text six times, half a second each: `format_once`.
"""

import functools
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.config import config as mmengine_config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import nn
from yapf.yapflib.yapf_api import FormatCode

from densepred.registry import HOOKS, LOOPS, MODEL_WRAPPERS, OPTIM_WRAPPERS

KEPT_HISTORY = 1000
"""Logged values kept in a checkpoint for each scalar: more than any smoothing window reads."""


@functools.lru_cache(maxsize=4)
def _formatted(text: str, options: tuple) -> tuple[str, bool]:
    return FormatCode(text, style_config=dict(options))


def format_once(text: str, style_config: dict) -> tuple[str, bool]:
    """Lay out Python text as yapf does, and remember the latest results."""
    return _formatted(text, tuple(style_config.items()))


mmengine_config.FormatCode = format_once


@HOOKS.register_module()
class PlainMessageHubHook(Hook):
    """Write the message hub as plain lists and numbers; build its buffers again on resume."""

    priority = "VERY_HIGH"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Replace the hub's objects by plain data."""
        hub = checkpoint["message_hub"]
        checkpoint["message_hub"] = {
            "log_scalars": {name: _plain_buffer(buffer) for name, buffer in hub["log_scalars"].items()},
            "runtime_info": plain(hub["runtime_info"]),
            "resumed_keys": dict(hub["resumed_keys"]),
        }
        checkpoint["meta"] = plain(checkpoint["meta"])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Build the history buffers again."""
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for name, buffer in scalars.items():
            if isinstance(buffer, dict):
                scalars[name] = HistoryBuffer(buffer["values"], buffer["counts"])


def _plain_buffer(buffer: HistoryBuffer) -> dict:
    values, counts = buffer.data
    return {"values": values[-KEPT_HISTORY:].tolist(), "counts": counts[-KEPT_HISTORY:].tolist()}


def plain(value: Any) -> Any:
    """Return nested containers with NumPy scalars and arrays turned into Python's own."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    if isinstance(value, np.generic):
        return value.item()
    return value.tolist() if isinstance(value, np.ndarray) else value


@LOOPS.register_module()
class SeekableTrainLoop(IterBasedTrainLoop):
    """Iteration-based training whose resumed run starts reading where it stopped.

    A checkpoint is written before the validation of its iteration, so a run resumed there validates first: a run killed
    while validating loses no metric.
    """

    def run(self) -> nn.Module:
        """Train from the current iteration to the last."""
        self.runner.call_hook("before_train")
        self.runner.call_hook("before_train_epoch")
        if self._iter > 0:
            self._seek()
            self._validate_when_due()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            self._validate_when_due()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")
        return self.runner.model

    def run_iter(self, data_batch: dict) -> None:
        """Run one step; a non-finite loss or prediction stops the run, named with its iteration and images."""
        try:
            super().run_iter(data_batch)
        except FloatingPointError as error:
            files = [str(sample.get("img_path", "?")) for sample in data_batch["data_samples"]]
            raise FloatingPointError(
                f"iteration {self._iter + 1}: {error}; images of this batch: {', '.join(files)}; no checkpoint was "
                f"overwritten: the last good one is named in {self.runner.work_dir}/last_checkpoint. Lower "
                "optim_wrapper.optimizer.lr, add optim_wrapper.clip_grad, or look at these images"
            ) from error

    def _seek(self) -> None:
        sampler = self.dataloader.sampler
        if not hasattr(sampler, "seek"):
            raise ValueError(
                f"train_dataloader.sampler {type(sampler).__name__} cannot resume at iteration {self._iter}; "
                "use dict(type='SeekableSampler')"
            )
        sampler.seek(self._iter * self.dataloader.batch_size)
        self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)

    def _validate_when_due(self) -> None:
        due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
        if self.runner.val_loop is not None and self._iter >= self.val_begin and due:
            self.runner.val_loop.run()


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seed torch from (seed, rank, iteration) before each training step.

    Dropout, drop path and sampled losses then repeat in a resumed run without any stored random state, on any number of
    processes.
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: dict | None = None) -> None:
        """Seed torch's generators of all devices."""
        entropy = np.random.SeedSequence((runner.seed, get_rank(), runner.iter))
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on any device; bfloat16 has float32's range, so no loss scaling is needed.

    Takes the arguments of MMEngine's ``OptimWrapper``.

    Raises:
        ValueError: the GPU has no bfloat16.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, accumulative_counts: int = 1, clip_grad: dict | None = None
    ) -> None:
        super().__init__(optimizer, accumulative_counts, clip_grad)
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise ValueError(
                f"--amp: {torch.cuda.get_device_name()} has no bfloat16; train without --amp, or in float16 with "
                "optim_wrapper.type='mmengine.AmpOptimWrapper'"
            )

    @contextmanager
    def optim_context(self, model: nn.Module) -> AbstractContextManager:
        """Enter autocast around one forward pass."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


def init_cpu_processes() -> None:
    """Join the process group that ``torchrun`` describes, over gloo."""
    torch.distributed.init_process_group("gloo")


def leave_processes() -> None:
    """Leave the process group, if there is one: gloo's threads can abort a process that ends within it."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """``MMDistributedDataParallel`` without device ids, for processes on CPU.

    Takes the arguments of MMEngine's class.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: list[int] | None = None,
        broadcast_buffers: bool = False,
        find_unused_parameters: bool = False,
    ) -> None:
        super().__init__(module, broadcast_buffers=broadcast_buffers, find_unused_parameters=find_unused_parameters)


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop the run at the first loss that is NaN or infinite, before anything is written.

    Raises:
        FloatingPointError: names the loss terms; `SeekableTrainLoop` adds the iteration and the image files.
    """

    priority = "VERY_HIGH"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Check every loss term of the step."""
        bad = sorted(name for name, value in (outputs or {}).items() if not torch.isfinite(value).all())
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} not finite")
