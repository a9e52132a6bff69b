"""Checkpoint files: every kind is read, none can execute, and damage is named."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from densepred.engine.checkpoint import check_loadable, read_checkpoint, state_dict_of, write_checkpoint


class Payload:
    """Creates a file when unpickled without care."""

    def __init__(self, marker):
        self.command = f"touch '{marker}'"

    def __reduce__(self):
        return os.system, (self.command,)


def _refusal(path):
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    weights = {"a.weight": torch.randn(2, 3, dtype=torch.float64), "a.steps": torch.tensor(7)}
    write_checkpoint({"state_dict": weights}, tmp_path / f"new folder/x{suffix}")
    found = state_dict_of(read_checkpoint(tmp_path / f"new folder/x{suffix}"))
    assert list(found) == sorted(weights) if suffix == ".safetensors" else list(weights)
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in weights.items())
    assert os.listdir(tmp_path / "new folder") == [f"x{suffix}"]


def test_safetensors_takes_tied_and_strided_tensors(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    write_checkpoint({"a": base, "b": base, "c": base.T}, tmp_path / "x.safetensors")
    found = read_checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(found["b"], base) and torch.equal(found["c"], base.T)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pth"
    write_checkpoint({"a": torch.ones(1)}, path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        write_checkpoint({"a": torch.zeros(1), "b": lambda: None}, path)
    assert read_checkpoint(path)["a"] == 1 and os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_pickles_are_read(tmp_path, protocol):
    arrays = OrderedDict(
        conv=np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        big_endian=np.arange(3, dtype=">f8"),
        half=np.ones(2, np.float16),
        count=np.int64(5),
    )
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party"}, protocol=protocol))
    found = state_dict_of(read_checkpoint(path))
    assert list(found) == list(arrays)
    for key, array in arrays.items():
        assert np.array_equal(found[key].numpy(), array) and found[key].dtype.itemsize == array.dtype.itemsize


def test_numpy_pickle_of_python_2_is_read(tmp_path):
    # As Python 2 with NumPy 1 wrote it: array data as str, the old module path.
    data = np.array([1.5, -200.25], np.float32).tobytes()
    stream = b"(dS'w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
    stream += b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
    stream += b"S" + repr(data)[1:].encode() + b"\ntbs."
    path = tmp_path / "x.pkl"
    path.write_bytes(stream)
    assert read_checkpoint(path)["w"].tolist() == [1.5, -200.25]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_torch_file_is_refused_unexecuted(tmp_path, legacy):
    path, marker = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "meta": Payload(marker)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    message = _refusal(path)
    assert not marker.exists() and "system" in message and "weights_only" not in message
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload is a live one


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused_unexecuted(tmp_path, protocol):
    path, marker = tmp_path / "evil.pkl", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"model": {"a": np.ones(1)}, "x": Payload(marker)}, protocol=protocol))
    message = _refusal(path)
    assert not marker.exists() and "system" in message
    pickle.loads(path.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize(
    ("stream", "named"),
    [
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "numpy.dtype('O')"),
        (b"c_codecs\nencode\n(S'x'\nS'evil_module'\ntR.", "_codecs.encode with 'evil_module'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        (b"ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
    ],
)
def test_the_refused_global_is_named(tmp_path, stream, named):
    path = tmp_path / "x.pkl"
    path.write_bytes(stream)
    message = _refusal(path)
    assert f"holds the object {named}" in message and "keep the weights alone: torch.save(" in message


def test_plain_mmengine_checkpoints_are_refused_with_a_way_out(tmp_path):
    path = tmp_path / "iter_100.pth"
    torch.save({"state_dict": {}, "message_hub": {"loss": HistoryBuffer([1.0], [1])}}, path)
    message = _refusal(path)
    assert "HistoryBuffer" in message and "plain MMEngine checkpoints: where they were trained" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_files_are_named_with_the_remedy(tmp_path, suffix, damage):
    path = tmp_path / f"x{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"a": np.ones(999)}))
    else:
        write_checkpoint({"a": torch.ones(999)}, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"<!doctype html>\n<html>", "empty": b""}[damage])
    message = _refusal(path)
    assert "download or save it again" in message
    assert ("0 bytes" if damage == "empty" else "damaged") in message and "weights_only" not in message


def test_absent_unknown_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such checkpoint file; check the path"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path)
    (tmp_path / "x.onnx").write_bytes(b"onnx")
    assert "unknown kind of checkpoint '.onnx'; known: .pth, .pt, .bin, .safetensors" in _refusal(tmp_path / "x.onnx")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list instead of a dict" in _refusal(tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"cannot write '\.pkl'"):
        write_checkpoint({"a": torch.ones(1)}, tmp_path / "x.pkl")


@pytest.mark.parametrize("wrap", [lambda w: {"state_dict": w, "meta": {}}, lambda w: {"model": w}, lambda w: w])
def test_weights_are_found_and_unwrapped(wrap):
    found = state_dict_of(wrap({"module.a": torch.ones(1), "module.module.b": np.zeros(2)}))
    assert list(found) == ["a", "module.b"] and found["module.b"].dtype == torch.float64


def test_module_prefix_stays_when_it_is_not_on_every_key():
    assert list(state_dict_of({"module.a": torch.ones(1), "b": torch.ones(1)})) == ["module.a", "b"]


@pytest.mark.parametrize(
    "checkpoint", [{"epoch": 3, "optimizer": {}}, {}, {"state_dict": {"a": "text"}}, {1: torch.ones(1)}]
)
def test_a_checkpoint_without_weights_is_refused(checkpoint):
    with pytest.raises(ValueError, match="no weights in the checkpoint: looked for state_dict, model"):
        state_dict_of(checkpoint)


def test_another_architecture_lists_the_first_mismatches_of_each_kind():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)])
    state = {k.replace("0.", "x."): v for k, v in model.state_dict().items()} | {"5.bias": torch.ones(3)}
    state |= {f"extra.{i}": torch.ones(1) for i in range(10)}
    with pytest.raises(ValueError) as error:
        check_loadable(model, state)
    message = str(error.value)
    assert "belongs to another architecture than Sequential" in message
    assert "2 missing from the file: 0.weight, 0.bias\n" in message
    assert "12 unknown to the model: x.weight, x.bias, extra.0, " in message and "extra.5, and 4 more" in message
    assert "extra.6" not in message
    assert "1 of another shape: 5.bias (file (3,), model (2,))" in message
    check_loadable(model, model.state_dict())
