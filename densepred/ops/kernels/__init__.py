"""Triton kernels, one module per op; imported when an op first runs as one, as Triton need not be installed."""

import os

# What Triton before 3.10 does unasked, with a warning that it will cease to.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
