"""Fixtures shared by the suite: small generated data sets, made once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
torch.set_num_threads(2)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def make_shapes(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that writes Shapes in a layout and returns its root; the same call is made once."""
    made: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(f"shapes_{layout}")
            script = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py"), str(made[layout])]
            sizes = ["--train", "6", "--val", "3", "--height", "64", "--width", "80"]
            subprocess.run([*script, "--layout", layout, *sizes], check=True, capture_output=True, text=True)
        return made[layout]

    return make


@pytest.fixture(scope="session")
def shapes(make_shapes) -> Path:
    """Root of a small Shapes set in COCO's layout."""
    return make_shapes("coco")
