"""What a bare `pip install dms-retrofit` gives: the library, help, and a word on which extra is missing; and how little that costs to import."""

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from dms.requirements import EXTRAS

HELPERS = Path(__file__).parents[1] / "helpers"
HEAVY = ("torch", "transformers", "numpy", "pydantic", "accelerate", "datasets", "wandb", "matplotlib")
PRELUDE = f"""
import json, sys
sys.path.insert(0, {str(HELPERS)!r})

def dms(*arguments):
    from dms_train import cli
    sys.argv = ["dms", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0

def tell(found):
    print("FOUND", json.dumps(found))

def heavy():
    return [module for module in {HEAVY} if module in sys.modules]

def peak():
    # Of this program alone, where getrusage counts what it was forked from.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
"""
HIDE_EXTRAS = "\n        import base_alone; hidden = base_alone.hide()\n        "


def python(code: str, **environment: str) -> tuple[dict, str]:
    """What the code tells, and all that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND ")), done.stdout + done.stderr


def test_importing_dms_and_help_are_light():
    """As measured: 5 ms for `import dms`, 0.12 s and 25 MiB for --help, of which Python itself takes 11."""
    found, out = python("""
        import dms as package
        imported = heavy()
        code = dms("--help")
        tell({"import": imported, "help": heavy(), "code": code, "peak": peak(), "modules": len(sys.modules)})
    """)
    assert found["import"] == found["help"] == [] and found["code"] == 0
    assert found["peak"] < 60 and found["modules"] < 600, found
    for command in ("retrofit", "pretrain", "generate-data", "evaluate", "report", "analyze", "generate", "export", "doctor"):
        assert command in out


@pytest.mark.slow
def test_help_of_every_command_and_doctor_need_no_extra():
    found, out = python(
        HIDE_EXTRAS
        + """
        import typer
        from dms import doctor
        from dms_train.cli import app
        codes = {}
        def commands(group, *words):
            for name, command in group.commands.items():
                yield from commands(command, *words, name) if hasattr(command, "commands") else [(*words, name)]
        for words in [(), *commands(typer.main.get_command(app))]:
            codes[" ".join(words)] = dms(*words, "--help")
        # What it runs in processes of their own is tested elsewhere.
        doctor.show(doctor.collect(doctor.Environment(run=lambda code, variables: doctor.Ran(1, err="not run"))))
        tell({"codes": codes, "hidden": sorted(hidden)})
        """
    )
    assert set(found["codes"].values()) == {0} and {"", "retrofit", "bench retrofit", "doctor", "report"} <= set(found["codes"])
    assert set(EXTRAS) & set(found["hidden"]) == {module for module in EXTRAS if find_spec(module)}
    for extra in ("train", "report", "evaluate", "track", "lora", "deepspeed"):
        assert f"pip install 'dms-retrofit[{extra}]'" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            ["retrofit", "tiny/retrofit"],
            "dms retrofit needs accelerate and matplotlib, which are not installed; pip install 'dms-retrofit[train,report]'",
        ),
        (
            ["cache-teacher", "tiny/retrofit"],
            "dms cache-teacher needs accelerate, which is not installed; pip install 'dms-retrofit[train]'",
        ),
        (["report", "x"], "dms report needs matplotlib, which is not installed; pip install 'dms-retrofit[report]'"),
    ],
)
def test_a_command_says_which_extra_it_misses(command, sentence):
    found, out = python(HIDE_EXTRAS + f"tell(dms(*{command}))")
    assert found == 1 and f"dms: failed: {sentence}" in out and "Traceback" not in out, out


@pytest.mark.slow
def test_a_retrofit_is_saved_loaded_and_generates_without_extras(tmp_path):
    found, _ = python(
        HIDE_EXTRAS
        + f"""
        import torch, dms as package
        from dms.io.base_models import load_base
        torch.manual_seed(0)
        model = package.retrofit(load_base("builtin:tiny", "float32"), package.DMSConfig(window=4))
        package.save(model, {str(tmp_path)!r}, base_name="builtin:tiny")
        model = package.load({str(tmp_path)!r}, evict_bias=20.0)
        with torch.no_grad():
            output = model.generate(torch.arange(40)[None], max_new_tokens=8, return_dict_in_generate=True, do_sample=False)
        tell({{"tokens": output.sequences.shape[1], "cache": type(output.past_key_values).__name__, "mode": model.dms.mode}})
        """
    )
    assert found == {"tokens": 48, "cache": "DMSCache", "mode": "evict"}
