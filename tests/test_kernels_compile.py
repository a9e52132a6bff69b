"""Every kernel goes through Triton's compiler for a GPU, its registers not spilled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from densepred.engine.op_cases import CASES
from densepred.ops import kernels
from tests.conftest import ROOT

OPS = sorted(path.stem for path in Path(kernels.__file__).parent.glob("*.py") if path.stem in {c.op for c in CASES})
STACK = {"float32": 1024, "bfloat16": 128}
"""Bytes of a thread's registers that may go to memory; float32 splits its operands in two."""


@pytest.mark.parametrize("op", OPS)
def test_compiles_for_hopper(op):
    words = [op, "--dtype", *STACK, "--capability", "90", "--cases", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, most in STACK.items():
        stacks = [int(size) for size in re.findall(rf"torch\.{name}: .* (\d+) bytes of stack", done.stdout)]
        assert stacks and max(stacks) <= most, done.stdout
