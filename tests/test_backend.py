"""The choice between the eager form and the kernel of an op, and the check of its tensors."""

import logging

import pytest
import torch

from densepred.ops import backend
from densepred.ops.backend import check_tensors, uses_triton

FLOAT, DOUBLE = torch.ones(2), torch.ones(2, dtype=torch.float64)
ELSEWHERE = torch.ones(2, device="meta")


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.delenv("DENSEPRED_OPS", raising=False)
    cached = (backend.obstacle, backend._log_once)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_a_cpu_is_eager_unless_told(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not uses_triton("op", [FLOAT])
    for name, kernel in (("eager", False), ("triton", True), ("", False)):
        monkeypatch.setenv("DENSEPRED_OPS", name)
        assert uses_triton("op", [FLOAT]) is kernel


def test_float64_is_eager_always(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    assert not uses_triton("op", [FLOAT, DOUBLE])


def test_triton_asked_for_in_vain_is_an_error(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"DENSEPRED_OPS=triton, but op cannot.*7 channels.*unset DENSEPRED_OPS"):
        uses_triton("op", [FLOAT], unfit="7 channels")
    backend.obstacle.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="on cpu, kernels run on NVIDIA GPUs"):
        uses_triton("op", [FLOAT])
    backend.obstacle.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        uses_triton("op", [FLOAT])


def test_a_fallback_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "obstacle", lambda device: None)
    with caplog.at_level(logging.WARNING, "densepred"):
        assert uses_triton("op", [ELSEWHERE])
        for _ in range(3):
            assert not uses_triton("op", [ELSEWHERE], unfit="7 channels, not a multiple of 8")
    assert [record.message for record in caplog.records] == [
        "op runs in its eager form: 7 channels, not a multiple of 8"
    ]


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend.obstacle(torch.device("cuda")) == "the GPU has compute capability 7.5, kernels need 8.0"


def test_an_unknown_name_is_an_error(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "abacus")
    with pytest.raises(ValueError, match=r"DENSEPRED_OPS='abacus': choose eager or triton"):
        uses_triton("op", [FLOAT])


def test_tensors_are_floats_of_one_device():
    check_tensors("op", x=FLOAT, bias=None, weight=DOUBLE)
    with pytest.raises(ValueError, match="op: weight is on meta, x on cpu"):
        check_tensors("op", x=FLOAT, weight=ELSEWHERE)
    with pytest.raises(ValueError, match=r"op: weight is torch.int64, it must be a float tensor"):
        check_tensors("op", x=FLOAT, weight=FLOAT.long())
