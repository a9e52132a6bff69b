"""Fixtures shared by the suite: small generated data sets, made once."""

import os
import runpy
from pathlib import Path

import pytest
import torch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is first imported
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def make_shapes(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that writes Shapes in a layout and returns its root; the same call is made once."""
    from densepred.data.shapes_files import FIXED_COUNTS

    made: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(f"shapes_{layout}")
            train, val = FIXED_COUNTS.get(layout, {"train": 6, "val": 3}).values()
            sizes = ["--train", str(train), "--val", str(val), "--height", "64", "--width", "80"]
            script = runpy.run_path(str(ROOT / "datasets" / "prepare_shapes.py"))
            script["main"](script["make_parser"]().parse_args([str(made[layout]), "--layout", layout, *sizes]))
        return made[layout]

    return make


@pytest.fixture(scope="session")
def shapes(make_shapes) -> Path:
    """Root of a small Shapes set in COCO's layout."""
    return make_shapes("coco")
