"""Imported first, leaves this Python with torch, transformers, safetensors and their own needs: nothing of ours, nothing extra.

KEEP_PACKAGES, comma-separated, names what may stay.
"""

import os
import sys
from importlib.machinery import PathFinder

ABSENT = {"dms", "dms_kernels", "pydantic", "accelerate", "typer", "rich", "datasets", "wandb", "peft", "deepspeed", "lm_eval", "triton"}
ABSENT -= set(os.environ.get("KEEP_PACKAGES", "").split(","))

_find = PathFinder.find_spec


def _hiding(name, path=None, target=None):
    return None if name.split(".")[0] in ABSENT else _find(name, path, target)


# An editable installation brings a finder of its own.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
PathFinder.find_spec = staticmethod(_hiding)
