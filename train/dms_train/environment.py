"""Environment variables and warning filters that must be set before torch is imported: so this module imports nothing heavy."""

import json
import os
import sys
import warnings
from pathlib import Path

from dms.requirements import untested

# Every retrofit uses the first for its processes, and the second for its plots.
RETROFIT_NEEDS = ("accelerate", "matplotlib")


def prepare(precision: str) -> None:
    """Call before torch is imported: quiets libraries, and makes bfloat16 work on CPUs that advertise AMX without having it.

    The first of several processes prints which libraries have versions that were not tested.
    """
    if os.environ.get("RANK", "0") == "0":
        for sentence in untested():
            print(f"dms: warning: {sentence}", file=sys.stderr)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        # OpenMP's threads spin while they wait for each other, 300,000 rounds by default: beside another job on the same cores they spin for
        # threads that are not running, and take CPU time from them. 1000 rounds bridge the gap between two operations. Not spinning at all
        # costs a third of the speed on an idle machine.
        os.environ["GOMP_SPINCOUNT"] = "1000"
    # DeepSpeed uses names that newer PyTorch deprecates, at every step of every process.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    if _has_no_gpu():
        # transformers imports DeepSpeed where it is installed, and DeepSpeed then warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if precision == "bf16":
        prepare_bfloat16()


def prepare_bfloat16() -> None:
    """Call before anything is multiplied in bfloat16: on a CPU alone, find out whether that works, and say where it is slow.

    Raises:
        RuntimeError: it does not work.
    """
    if not _has_no_gpu() or "ONEDNN_MAX_CPU_ISA" in os.environ:
        return
    from dms.doctor import AMX_CURE, try_bfloat16

    works = try_bfloat16()
    if works is None:
        works = try_bfloat16(AMX_CURE)
        if works is None:
            raise RuntimeError("bfloat16 matmul does not work on this CPU; use precision=fp32 (dtype=float32 of an evaluation)")
        os.environ.update(AMX_CURE)
    if works.is_emulated and not works.has_gpu and os.environ.get("RANK", "0") == "0":
        print(
            f"dms: warning: this CPU emulates bfloat16, which takes {works.times:.0f} times as long as float32: that (precision=fp32 of a recipe, "
            "dtype=float32 of an evaluation) is faster here",
            file=sys.stderr,
        )


def is_bfloat16(folder: str) -> bool:
    """Whether a model folder is saved in bfloat16. What is wrong with the folder is reported when it is loaded."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return (config.get("dtype") or config.get("torch_dtype")) == "bfloat16"
    except (OSError, ValueError, AttributeError):
        return False


def _has_no_gpu() -> bool:
    return not os.path.exists("/proc/driver/nvidia/version")
