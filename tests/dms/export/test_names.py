"""An exported folder loads whatever it is called: its name becomes part of its modules', and of its operators' namespace."""

import json
import os
import shutil

import pytest

from dms.export.folder import export

NAMES = ["modèle", "modéle", "模型", "1st", "٣", "class", "§§", "a b.c-d"]
# The operators' modules are imported where a GPU calls for them; here all are, to see that they register.
CODE = """
import importlib
from pathlib import Path
from transformers import AutoModelForCausalLM

found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    package = next(cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers_modules")).rpartition(".")[0]
    operators = [importlib.import_module(f"{package}.{path.stem}") for path in sorted(Path(folder).glob("dms_kernels_*fused.py"))]
    dispatch = importlib.import_module(f"{package}.dms_kernels_dispatch")
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{dispatch.NAMESPACE}::")]
    found[Path(folder).name] = [model.dms.mode, len(operators), len(registered)]
import json
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="loads the kernels in the interpreter")
def test_any_name(tiny, run_without_us, tmp_path):
    pytest.importorskip("triton")
    export(tiny, tmp_path / "out")
    for name in NAMES:
        shutil.copytree(tmp_path / "out", tmp_path / "named" / name)
    folders = [str(tmp_path / "named" / name) for name in NAMES]
    found = json.loads(run_without_us(CODE, tmp_path, keep=["triton"], folders=folders).splitlines()[-1])
    assert set(found) == set(NAMES)
    for name, (mode, operators, registered) in found.items():
        assert mode == "evict" and operators > 0 and registered >= operators, name
