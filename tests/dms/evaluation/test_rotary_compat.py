"""Every touch of transformers in `policies.rotary_compat`: held against what is installed, and named where it is broken on purpose."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from dms.evaluation.policies import rotary_compat
from dms.upstream import UpstreamChanged

TOUCHES = [
    name
    for name, value in vars(rotary_compat).items()
    if inspect.isfunction(value) and value.__module__ == rotary_compat.__name__ and name[0] != "_"
]
UPSTREAM = Path(__file__).parents[3] / "docs" / "upstream.md"
POSITIONS = torch.tensor([3, 100])


def test_rotary_embedding(build_model):
    model = build_model("llama")
    cos, sin = rotary_compat.rotary_embedding(model.model, model.model.layers[0].self_attn, POSITIONS)
    angle = torch.outer(POSITIONS, model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)).repeat(1, 2)
    torch.testing.assert_close(cos[0], angle.cos())
    torch.testing.assert_close(sin[0], angle.sin())


def test_rotate(build_model):
    module = build_model("llama").model.layers[0].self_attn
    angle = torch.rand(1, 2, 8)
    x = torch.rand(1, 3, 2, 16)
    found = rotary_compat.rotate(module, x, angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2))
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(found, torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1))


def _embedding(patch, model):
    patch.delattr(model.model, "rotary_emb")
    rotary_compat.rotary_embedding(model.model, model.model.layers[0].self_attn, POSITIONS)


def _rotate(patch, model):
    module = model.model.layers[0].self_attn
    patch.delattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb")
    rotary_compat.rotate(module, torch.rand(1, 3, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16))


BREAKS = {"rotary_embedding": _embedding, "rotate": _rotate}


@pytest.mark.parametrize("touch", BREAKS)
def test_a_broken_touch_is_named(touch, build_model, monkeypatch):
    model = build_model("llama")
    with monkeypatch.context() as patch, pytest.raises(UpstreamChanged) as error:
        BREAKS[touch](patch, model)
    assert re.match(
        rf"transformers \S+: rotary_compat\.{touch} needs .+, which is not there any more; .*see docs/upstream\.md$", str(error.value)
    )


def test_every_touch_is_held_broken_and_listed():
    section = UPSTREAM.read_text(encoding="utf-8").partition("`dms/evaluation/policies/rotary_compat.py`")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == TOUCHES
    for touch in TOUCHES:
        assert f"test_{touch}" in globals() and touch in BREAKS, touch
        assert re.search(r"\n\n    Assumes: ", getattr(rotary_compat, touch).__doc__), touch
