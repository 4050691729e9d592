"""Modules become flat siblings: every kind of import, found where it is defined, and nothing that cannot be carried."""

import ast
import importlib
import sys

import pytest

from dms.export.closure import flatten


@pytest.fixture
def carry(tmp_path, monkeypatch):
    """`carry({path: text})`: the modules of a package `ours`, flattened from `ours.entry`; texts by flat name."""
    monkeypatch.syspath_prepend(str(tmp_path / "source"))

    def write_and_flatten(files: dict[str, str], **options) -> dict[str, str]:
        for path, text in {"ours/__init__.py": "", **files}.items():
            file = tmp_path / "source" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        return {flat: module.text for flat, module in flatten("ours.entry", ours=("ours", "others"), **options).items()}

    yield write_and_flatten
    assert not [name for name in sys.modules if name.split(".")[0] in ("ours", "others")], "nothing is imported for it"


def run(texts: dict[str, str], tmp_path, expression: str):
    """Import the flat modules as a package and evaluate an expression in ours_entry."""
    folder = tmp_path / "flat" / "carried"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for flat, text in texts.items():
        (folder / f"{flat}.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder.parent))
    try:
        return eval(expression, vars(importlib.import_module("carried.ours_entry")))
    finally:
        sys.path.remove(str(folder.parent))
        for name in [name for name in sys.modules if name.split(".")[0] == "carried"]:
            del sys.modules[name]


SUB = {
    "ours/sub/__init__.py": "from ours.sub.deep import thing\nfrom ours.sub.deep import thing as renamed\nOWN = 7\n",
    "ours/sub/deep.py": "def thing():\n    return 1\n",
    "ours/sub/thing.py": "raise SystemExit('the package binds `thing` to a function')\n",
}


@pytest.mark.parametrize(
    ("statement", "flat", "use", "value"),
    [
        ("from ours.sub.deep import thing", "from .ours_sub_deep import thing", "thing()", 1),
        ("from ours.sub.deep import thing as t", "from .ours_sub_deep import thing as t", "t()", 1),
        ("from ours.sub import thing", "from .ours_sub_deep import thing", "thing()", 1),
        ("from ours.sub import renamed as r", "from .ours_sub_deep import thing as r", "r()", 1),
        ("from ours.sub import renamed", "from .ours_sub_deep import thing as renamed", "renamed()", 1),
        ("from ours.sub import OWN", "from .ours_sub import OWN", "OWN", 7),
        ("from ours.sub import deep", "from . import ours_sub_deep as deep", "deep.thing()", 1),
        ("from ours import sub", "from . import ours_sub as sub", "sub.OWN", 7),
        ("from .sub.deep import thing", "from .ours_sub_deep import thing", "thing()", 1),
        ("from . import sub", "from . import ours_sub as sub", "sub.thing()", 1),
        ("import ours.sub.deep", "from . import ours_sub_deep", "ours.sub.deep.thing()", 1),
        ("import ours.sub.deep as d", "from . import ours_sub_deep as d", "d.thing()", 1),
        ("import math, ours.sub.deep", "from . import ours_sub_deep", "int(math.sqrt(1)) * ours.sub.deep.thing()", 1),
        ("import ours.sub, ours.sub.deep", "from . import ours_sub_deep", "ours.sub.OWN * ours.sub.deep.thing()", 7),
        (
            "from ours.sub import (\n    deep,  # the module\n    OWN,\n    thing,\n)",
            "from .ours_sub_deep import thing",
            "OWN * thing() * deep.thing()",
            7,
        ),
        ("if True: from ours.sub.deep import thing", "from .ours_sub_deep import thing", "thing()", 1),
        ("if True: import ours.sub.deep as a, ours.sub as b", "from . import ours_sub as b", "a.thing() * b.OWN", 7),
    ],
)
def test_an_import_is_rewritten_and_works(statement, flat, use, value, carry, tmp_path):
    texts = carry({**SUB, "ours/entry.py": f'"""Grüße."""\n{statement}\nVALUE = {use}  # ours.sub.deep stays in comments\n'})
    assert flat in texts["ours_entry"]
    assert texts["ours_entry"].startswith('"""Grüße."""\n') and texts["ours_entry"].endswith("  # ours.sub.deep stays in comments\n")
    assert "ours_sub_thing" not in texts
    assert run(texts, tmp_path, "VALUE") == value


def test_imports_within_functions_and_conditions_are_followed(carry, tmp_path):
    texts = carry(
        {
            "ours/entry.py": (
                "from typing import TYPE_CHECKING\n"
                "try:\n    import triton\nexcept ImportError:\n    triton = None\n"
                "if TYPE_CHECKING:\n    from ours.a import A\n"
                "def late():\n    if True:\n        from ours.b import B, C\n        from others import kernel\n        return B + C + kernel\n"
            ),
            "ours/a.py": "A = 1\n",
            "ours/b.py": "from ours.entry import late\nB = 2\nC = 3\n",
            "others/__init__.py": "from others.fast import kernel\n",
            "others/fast.py": "kernel = 4\n",
        }
    )
    assert set(texts) == {"ours_entry", "ours_a", "ours_b", "others_fast"} and next(iter(texts)) == "ours_entry"
    assert "        from .ours_b import B, C\n        from .others_fast import kernel\n" in texts["ours_entry"]
    assert run(texts, tmp_path, "late()") == 9


@pytest.mark.parametrize(
    ("entry", "files", "message"),
    [
        ("import numpy\n", {}, r"ours.entry, line 1: numpy is imported, and an exported model has only torch, transformers, safetensors"),
        ("def f():\n    from yaml import dump\n", {}, "ours.entry, line 2: yaml is imported"),
        ("from ours.b import x\n", {"ours/b.py": "import yaml.nodes\nx = 1\n"}, "ours.b, line 1: yaml.nodes is imported"),
        ("from ours.b import *\n", {"ours/b.py": "x = 1\n"}, r"`from ours.b import \*` cannot be carried"),
        ("from ours import lazy\n", {}, "ours.entry, line 1: ours does not define 'lazy' itself; import it from the module that does"),
        ("import ours.b\nx = ours\n", {"ours/b.py": ""}, "line 2: ours is used otherwise than through ours.b"),
        ("from ours.nowhere import x\n", {}, "there is no module ours.nowhere"),
        (
            "from ours.a_b import x\nfrom ours.a import b\n",
            {"ours/a_b.py": "x = 1\n", "ours/a/__init__.py": "", "ours/a/b.py": ""},
            "ours.a_b and ours.a.b would both become ours_a_b.py",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(entry, files, message, carry):
    with pytest.raises(RuntimeError, match=message):
        carry({"ours/entry.py": entry, **files})


HOME = {"ours/home/__init__.py": "", "ours/home/train.py": "import yaml\nstep = 1\n", "ours/a.py": "A = 1\n"}


@pytest.mark.parametrize(
    "statement",
    [
        "from ours.home.train import step",
        "from ours.home import train",
        "from ours import home",
        "import ours.home.train",
        "from .home import train",
    ],
)
def test_what_stays_at_home_is_an_error_where_it_is_called_for(statement, carry, tmp_path):
    texts = carry(
        {
            **HOME,
            "ours/entry.py": (
                "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom ours.a import A\n"
                "if TYPE_CHECKING:\n    from ours.home.train import step as typed\n"
                f"def train() -> typed:\n    if A:\n        {statement}\n    return step\n"
                "def told():\n    try:\n        train()\n    except ImportError as error:\n        return str(error)\n"
            ),
        },
        at_home=("ours.home",),
    )
    assert set(texts) == {"ours_entry", "ours_a"}
    said = run(texts, tmp_path, "told()")
    assert said.startswith("ours.home") and "install dms-retrofit and load the folder with dms.load" in said


@pytest.mark.parametrize("entry", ["from ours.home.train import step\n", "if True:\n    import ours.home\n"])
def test_what_stays_at_home_is_not_imported_outside_functions(entry, carry):
    with pytest.raises(RuntimeError, match=r"ours.entry, line .: ours.home.* stays at home; import it within a function"):
        carry({**HOME, "ours/entry.py": entry}, at_home=("ours.home",))


def test_our_own_code_can_be_carried():
    modules = flatten("dms.export.pretrained")
    assert {"dms_export_pretrained", "dms_retrofitting", "dms_config", "dms_masks", "dms_cache_layer"} <= set(modules)
    assert not [flat for flat in modules if flat.startswith(("dms_training", "dms_kernels_gated_attention", "dms_kernels_distill"))]
    assert len(modules) <= 48
    for flat, module in modules.items():
        for node in ast.walk(ast.parse(module.text)):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {"dms", "dms_kernels", "pydantic"}, flat
            elif isinstance(node, ast.ImportFrom):
                assert node.level or node.module.split(".")[0] not in ("dms", "dms_kernels", "pydantic"), flat
                assert node.level < 2 and (not node.level or not node.module or node.module in modules), flat
