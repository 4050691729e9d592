"""`dms doctor`: what works on this machine, and what each missing piece costs.

Importing this module is cheap. Whatever is slow, prints much or may die (torch, DeepSpeed, a bfloat16 matmul) runs in processes of its
own.
"""

import json
import netrc
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from dms.requirements import DISTRIBUTION, EXTRAS, fits, installed, tested

# Some virtual machines advertise AMX but cannot run it: any bfloat16 matmul then dies with SIGILL inside oneDNN. This keeps oneDNN off it.
AMX_CURE = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}

# What each optional package is for.
_OPTIONAL = {
    "accelerate": "no `dms retrofit` and no `dms cache-teacher`",
    "matplotlib": "no `dms retrofit`, which plots its metrics, and no `dms report`",
    "datasets": "recipes cannot name data sets of the hub; local files and the built-in data still work",
    "peft": "no `trainable: gates+lora`",
    "gguf": "no GGUF files as models",
    "bitsandbytes": "no `quantize: nf4` or `int8`, and no bases in those formats",
    "torchao": "no `quantize: torchao-int8` or `torchao-int4`, and no bases that torchao packed",
    "lm_eval": "no `dms evaluate --lm-eval`",
    "tensorboard": "no `tracking.tensorboard`",
}

# Only against a hang: a probe takes one or two seconds, on an overloaded machine many times that.
_PROBE_SECONDS = 300

BFLOAT16_PROBE = """
import json, time, torch
torch.set_num_threads(1)
a = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
exact = a @ a.T
assert (a.bfloat16() @ a.T.bfloat16()).float().sub(exact).abs().max() < 0.05 * exact.abs().max()

def seconds(dtype):
    x, found = torch.ones(512, 512, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        x @ x.T
        found.append(time.perf_counter() - start)
    return min(found)

print(json.dumps({"times": seconds(torch.bfloat16) / seconds(torch.float32), "has_gpu": torch.cuda.is_available()}), flush=True)
"""
# Times as long as in float32 from which bfloat16 is emulated: CPUs that multiply it take less, those that do not some eight times as long.
EMULATED = 2.0

DEVICE_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({
    "cuda": torch.version.cuda,
    "hip": torch.version.hip,
    "threads": torch.get_num_threads(),
    "gpus": [{"name": gpu.name, "bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]} for gpu in gpus],
}), flush=True)
"""

DEEPSPEED_PROBE = """
import json
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
print(json.dumps({"adam": CPUAdamBuilder().is_compatible(verbose=False), "aio": AsyncIOBuilder().is_compatible(verbose=False)}), flush=True)
"""


@dataclass(frozen=True)
class Ran:
    """What became of a Python process."""

    code: int
    """Its exit code; negative: killed by that signal."""
    out: str = ""
    err: str = ""

    @property
    def complaint(self) -> str:
        """The last line of what it wrote to standard error, or its exit code."""
        return (self.err.strip().splitlines() or [f"exit code {self.code}"])[-1][:200]

    def answer(self) -> dict[str, Any]:
        """The JSON line in what it printed, or `{"error": its complaint}`."""
        for line in reversed(self.out.splitlines()):
            if line.startswith("{"):
                return json.loads(line)
        return {"error": self.complaint}


def run_python(code: str, variables: Mapping[str, str]) -> Ran:
    """Run code in a Python of its own, with variables added to this process's environment."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Ran(124, err=f"no answer within {_PROBE_SECONDS} s")
    return Ran(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """How the checks look around. The defaults look at this machine and this Python."""

    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    """Environment variables."""
    version_of: Callable[[str], str | None] = installed
    """The installed version of a package, or None."""
    path_of: Callable[[str], str | None] = shutil.which
    """The path of a command, or None."""
    run: Callable[[str, Mapping[str, str]], Ran] = run_python


Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table."""

    name: str
    found: str
    """Version, device or reason; empty when there is nothing to say."""
    status: Status
    cost: str = ""
    """What does not work without it, and the cure; empty when nothing is lost."""
    required: bool = False
    """Whether nothing works without it."""


@dataclass(frozen=True)
class Bfloat16:
    """A bfloat16 matmul on this CPU, where it works."""

    times: float
    """How many times as long as one in float32 it takes."""
    has_gpu: bool
    """torch has a GPU, and the CPU matters little."""

    @property
    def is_emulated(self) -> bool:
        return self.times >= EMULATED

    @classmethod
    def of(cls, tried: Ran) -> "Bfloat16 | None":
        return None if tried.code else cls(**tried.answer())


def try_bfloat16(variables: Mapping[str, str] | None = None) -> Bfloat16 | None:
    """A matmul in a process of its own (about two seconds); None: it dies, or is wrong.

    variables: added to the environment for the trial, such as `AMX_CURE`.
    """
    return Bfloat16.of(run_python(BFLOAT16_PROBE, variables or {}))


def collect(environment: Environment | None = None) -> list[Check]:
    """Every check, in the order of the table. environment: None: this one."""
    environment = environment or Environment()
    has_torch = environment.version_of("torch") is not None
    has_deepspeed = environment.version_of("deepspeed") is not None
    # The three probes mostly wait for imports: side by side they take as long as the slowest.
    with ThreadPoolExecutor(max_workers=3) as pool:
        devices_job = pool.submit(environment.run, DEVICE_PROBE, {}) if has_torch else None
        bfloat16_job = pool.submit(_bfloat16, environment) if has_torch else None
        deepspeed_job = pool.submit(environment.run, DEEPSPEED_PROBE, _deepspeed_variables(environment)) if has_deepspeed else None
        devices = devices_job.result().answer() if devices_job else None
        compiler, ninja = _compiler(environment), _ninja(environment)
        checks = [
            _python(),
            _torch(environment, devices),
            _package(environment, "transformers", "nothing runs without it", required=True),
            *(_package(environment, name, cost) for name, cost in _OPTIONAL.items()),
            _wandb(environment),
            _cpu(),
            *_gpus(environment, devices),
            compiler,
            _headers(),
            ninja,
        ]
        if bfloat16_job:
            checks.append(bfloat16_job.result())
        checks.append(_triton(environment, devices))
        can_build = compiler.status == ninja.status == "ok"
        checks.extend(_deepspeed(environment, deepspeed_job.result().answer() if deepspeed_job else None, can_build))
    return checks


def main() -> int:
    """Print the table; the exit code is 1 when something required is missing, else 0."""
    return show(collect())


def show(checks: list[Check]) -> int:
    """Print checks as a table; the exit code of the command."""
    from rich.table import Table
    from rich.text import Text

    from dms.console import make_console

    table = Table(title="dms doctor", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("what it costs", overflow="fold")
    style = {"ok": "green", "warn": "yellow", "missing": "red"}
    for check in checks:
        table.add_row(check.name, Text(check.found), Text(check.status, style[check.status]), Text(check.cost))
    make_console().print(table)
    lost = [check.name for check in checks if check.required and check.status == "missing"]
    if lost:
        print(f"dms doctor: required and missing: {', '.join(lost)}; pip install {DISTRIBUTION} brings what is required", file=sys.stderr)
    return 1 if lost else 0


def _package(environment: Environment, name: str, cost: str, *, required: bool = False, label: str | None = None) -> Check:
    """A package: its version, compared with those that were tested."""
    label, version, wanted = label or name, environment.version_of(name), tested(name)
    if version is None:
        brought_by = f"'{DISTRIBUTION}[{EXTRAS[name]}]'" if name in EXTRAS else name
        status: Status = "missing" if required else "warn"
        return Check(name=label, found="", status=status, cost=f"{cost}; pip install {brought_by}", required=required)
    found, cure = f"{version} (tested: {wanted})" if wanted else version, f"pip install '{name}{wanted}'"
    if not fits(name, version, floor_only=True):
        return Check(name=label, found=found, status="missing", cost=f"too old; {cure}", required=required)
    if not fits(name, version):
        return Check(name=label, found=found, status="warn", cost=f"not tested; if anything fails, {cure}", required=required)
    return Check(name=label, found=found, status="ok", required=required)


def _python() -> Check:
    # An older Python does not get this far: it cannot import this module.
    return Check(name="Python", found=f"{platform.python_version()} ({sys.executable})", status="ok", required=True)


def _torch(environment: Environment, devices: dict[str, Any] | None) -> Check:
    check = _package(environment, "torch", "nothing runs without it", required=True)
    if check.status != "ok" or devices is None:
        return check
    if "error" in devices:
        return Check(
            name="torch", found=f"{check.found}: {devices['error']}", status="missing", cost="torch does not import", required=True
        )
    build = f"CUDA {devices['cuda']}" if devices["cuda"] else f"ROCm {devices['hip']}" if devices["hip"] else "CPU build"
    return Check(name="torch", found=f"{check.found}, {build}", status="ok", required=True)


def _wandb(environment: Environment) -> Check:
    check = _package(environment, "wandb", "no tracking; metrics.jsonl is written all the same")
    if check.status != "ok":
        return check
    mode = environment.variables.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return Check(name="wandb", found=f"{check.found}, WANDB_MODE={mode}", status="ok")
    if has_wandb_key(environment.variables):
        return Check(name="wandb", found=f"{check.found}, with a key", status="ok")
    return Check(
        name="wandb",
        found=f"{check.found}, no key",
        status="ok",
        cost="runs are tracked offline; `wandb login` first, or `wandb sync` later",
    )


def has_wandb_key(variables: Mapping[str, str] | None = None) -> bool:
    """Whether wandb will find a key, in environment variables (None: this process's) or in the file of keys."""
    variables = os.environ if variables is None else variables
    if variables.get("WANDB_API_KEY"):
        return True
    host = urlparse(variables.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(variables.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _cpu() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check(name="CPU", found=f"{cores} cores, {_memory_bytes() / 2**30:.0f} GiB of memory", status="ok")


def _memory_bytes() -> int:
    """The machine's memory, or the container's share of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return memory
    return min(memory, int(limit)) if limit.isdigit() else memory


def _gpus(environment: Environment, devices: dict[str, Any] | None) -> list[Check]:
    gpus = (devices or {}).get("gpus", [])
    checks = []
    for index, gpu in enumerate(gpus):
        major, minor = gpu["capability"]
        found = f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB, compute capability {major}.{minor}"
        checks.append(Check(name=f"GPU {index}", found=found, status="ok"))
    if checks:
        return checks
    if environment.path_of("nvidia-smi"):
        cost = "the driver's tools are here but torch sees no GPU: a CPU build of torch, a driver too old, or CUDA_VISIBLE_DEVICES"
        return [Check(name="GPU", found="not usable", status="warn", cost=cost)]
    return [
        Check(
            name="GPU",
            found="none",
            status="warn",
            cost="everything runs on the CPU: fit for the tiny recipes, not for billions of weights",
        )
    ]


def _compiler(environment: Environment) -> Check:
    # The order in which torch's extension builder and DeepSpeed look.
    chosen = environment.variables.get("CXX")
    candidates = [chosen] if chosen else ["c++", "g++", "clang++"]
    path = next((found for name in candidates if (found := environment.path_of(name))), None)
    if path is None:
        cost = "no DeepSpeed CPU ops (offload) and no torch.compile; apt-get install g++"
        return Check(name="C++ compiler", found=f"none of {', '.join(candidates)}", status="missing", cost=cost)
    done = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    return Check(name="C++ compiler", found=(done.stdout.splitlines() or [path])[0], status="ok")


def _headers() -> Check:
    folder = sysconfig.get_paths()["include"]
    if Path(folder, "Python.h").exists():
        return Check(name="Python headers", found=folder, status="ok")
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    cost = f"DeepSpeed ops, Triton and torch.compile cannot build; apt-get install {package}"
    return Check(name="Python headers", found="no Python.h", status="warn", cost=cost)


def _ninja(environment: Environment) -> Check:
    cost = "DeepSpeed ops cannot be built"
    if path := environment.path_of("ninja"):
        return Check(name="ninja", found=path, status="ok")
    beside = Path(sysconfig.get_path("scripts"), "ninja")
    if beside.exists():
        return Check(
            name="ninja", found=str(beside), status="warn", cost=f"{cost}: it is installed but not on PATH; activate the environment"
        )
    return Check(name="ninja", found="", status="warn", cost=f"{cost}; pip install ninja")


def _bfloat16(environment: Environment) -> Check:
    name = "bfloat16 matmul (CPU)"
    tried = environment.run(BFLOAT16_PROBE, {})
    if (works := Bfloat16.of(tried)) is not None:
        cure = environment.variables.get("ONEDNN_MAX_CPU_ISA")
        found = f"works{f' with ONEDNN_MAX_CPU_ISA={cure}' if cure else ''}, in {works.times:.1f} times the time of float32"
        if not works.is_emulated:
            return Check(name=name, found=found, status="ok")
        cost = f"emulated: precision=bf16 of a recipe and dtype=bfloat16 of an evaluation take {works.times:.0f} times as long as fp32 and float32"
        return Check(name=name, found=found, status="warn", cost=cost)
    died = f"dies of {signal.Signals(-tried.code).name}" if tried.code < 0 else tried.complaint
    if environment.run(BFLOAT16_PROBE, AMX_CURE).code == 0:
        ((variable, value),) = AMX_CURE.items()
        cost = f"precision=bf16 on this CPU needs {variable}={value} in the environment before torch starts; dms commands set it themselves"
        return Check(name=name, found=f"{died}; works with {variable}={value}", status="warn", cost=cost)
    return Check(name=name, found=died, status="warn", cost="precision=bf16 does not work on this CPU; use precision=fp32")


def _triton(environment: Environment, devices: dict[str, Any] | None) -> Check:
    version = environment.version_of("triton")
    if version is None:
        return Check(name="Triton", found="", status="warn", cost="no fused kernels: attention and loss run in plain PyTorch")
    if environment.variables.get("DMS_KERNELS") == "reference":
        return Check(name="Triton", found=version, status="warn", cost="DMS_KERNELS=reference: fused kernels are turned off; unset it")
    if environment.variables.get("TRITON_INTERPRET") == "1":
        cost = "kernels run in Python: right in float32 and float16 only, and slow"
        return Check(name="Triton", found=f"{version}, interpreter", status="warn", cost=cost)
    if (devices or {}).get("gpus"):
        return Check(name="Triton", found=f"{version}, GPU", status="ok")
    cost = "no GPU: kernels run only with TRITON_INTERPRET=1, in float32 and float16, slowly"
    return Check(name="Triton", found=version, status="warn", cost=cost)


def _deepspeed_variables(environment: Environment) -> dict[str, str]:
    """On a machine without a GPU DeepSpeed builds nothing unless this variable says so."""
    if "DS_ACCELERATOR" in environment.variables or environment.path_of("nvidia-smi"):
        return {}
    return {"DS_ACCELERATOR": "cpu"}


def _deepspeed(environment: Environment, ops: dict[str, Any] | None, can_build: bool) -> list[Check]:
    package = _package(environment, "deepspeed", "no ZeRO: weights and optimizer states must fit on each device", label="DeepSpeed")
    if not package.found or ops is None:
        return [package]
    if "error" in ops:
        return [Check(name="DeepSpeed", found=f"{package.found}: {ops['error']}", status="warn", cost="installed, but does not import")]
    offload = "no optimizer offload to the CPU"
    if not ops["adam"]:
        adam = Check(name="DeepSpeedCPUAdam", found="not compatible", status="warn", cost=offload)
    elif not can_build:
        adam = Check(
            name="DeepSpeedCPUAdam", found="cannot be built", status="warn", cost=f"{offload}: needs the C++ compiler and ninja above"
        )
    else:
        adam = Check(name="DeepSpeedCPUAdam", found="can be built (about 40 s at first use)", status="ok")
    if ops["aio"] and can_build:
        nvme = Check(name="NVMe offload", found="libaio found", status="ok")
    else:
        missing = "no libaio headers" if not ops["aio"] else "cannot be built"
        nvme = Check(
            name="NVMe offload",
            found=missing,
            status="warn",
            cost="no offload to NVMe; apt-get install libaio-dev, with the compiler and ninja",
        )
    return [package, adam, nvme]
