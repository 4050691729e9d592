"""Triton decides when it is imported, which other conftests do, whether kernels are compiled or interpreted."""

import os
import sys

# A CPU can only interpret them; `-m gpu` wants them compiled.
if "gpu" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
