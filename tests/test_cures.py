"""Each cure of MMEngine, held to what it promises."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from densepred.engine import cures
from densepred.engine.cures import (
    AmpOptimWrapper,
    IterationSeedHook,
    NonFiniteLossHook,
    PlainMessageHubHook,
    SeekableTrainLoop,
    plain,
)


def hub_checkpoint() -> dict:
    buffer = HistoryBuffer([1.0, 2.0, 3.0], [1, 1, 2])
    hub = {
        "log_scalars": {"train/loss": buffer},
        "runtime_info": {"best_score": np.float64(3.5), "shape": (np.int64(3), 4), "table": np.arange(3)},
        "resumed_keys": {"train/loss": True},
    }
    return {"message_hub": hub, "meta": {"iter": np.int64(3)}, "state_dict": {}}


def test_message_hub_is_plain_on_disk_and_whole_after_loading(tmp_path):
    checkpoint = hub_checkpoint()
    hook = PlainMessageHubHook()
    hook.before_save_checkpoint(None, checkpoint)
    torch.save(checkpoint, tmp_path / "c.pth")
    loaded = torch.load(tmp_path / "c.pth", weights_only=True)
    assert loaded["message_hub"]["runtime_info"] == {"best_score": 3.5, "shape": (3, 4), "table": [0, 1, 2]}
    hook.after_load_checkpoint(None, loaded)
    buffer = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == pytest.approx((1 + 2 + 3) / 4)


def test_plain_leaves_tensors_alone():
    tensor = torch.ones(2)
    assert plain({"a": [tensor]})["a"][0] is tensor


def test_seed_depends_on_iteration_and_nothing_else():
    def draw(iteration: int) -> float:
        IterationSeedHook().before_train_iter(SimpleNamespace(seed=5, iter=iteration), iteration)
        return torch.rand(1).item()

    first = draw(3)
    torch.rand(100)
    assert draw(3) == first
    assert draw(4) != first


def test_non_finite_loss_names_iteration_term_and_files(monkeypatch):
    hook = NonFiniteLossHook()
    hook.after_train_iter(None, 0, None, {"loss": torch.tensor(1.0)})

    def step(self, data_batch):
        hook.after_train_iter(None, 0, data_batch, {"loss_ce": torch.tensor(float("nan")), "loss": torch.tensor(1.0)})

    monkeypatch.setattr(IterBasedTrainLoop, "run_iter", step)
    loop = SeekableTrainLoop.__new__(SeekableTrainLoop)
    loop._iter, loop._runner = 41, SimpleNamespace(work_dir="work_dirs/x")
    batch = {"data_samples": [{"img_path": "a.jpg"}, {"img_path": "b.jpg"}]}
    with pytest.raises(
        FloatingPointError, match=r"iteration 42: loss_ce not finite; images of this batch: a.jpg, b.jpg"
    ):
        loop.run_iter(batch)


def test_amp_runs_in_bfloat16_on_cpu_and_updates_in_float32():
    layer = nn.Linear(4, 4)
    wrapper = AmpOptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    before = layer.weight.detach().clone()
    with wrapper.optim_context(layer):
        output = layer(torch.ones(2, 4))
    assert output.dtype is torch.bfloat16
    wrapper.update_params(output.float().sum())
    assert layer.weight.dtype is torch.float32
    assert not torch.equal(layer.weight, before)


def test_config_is_laid_out_once(monkeypatch):
    calls = []
    monkeypatch.setattr(cures, "FormatCode", lambda text, **options: (calls.append(text), (text, True))[1])
    cfg = Config(dict(probe=dict(type="LaidOutOnce", width=[1, 2, 3])))
    assert cfg.pretty_text == cfg.pretty_text
    assert "LaidOutOnce" in calls[0]
    assert len(calls) == 1
