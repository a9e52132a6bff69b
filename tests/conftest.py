"""Fixtures shared by the suite: one small generated data set, made once."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
