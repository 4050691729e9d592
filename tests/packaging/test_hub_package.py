"""The package for the Kernel Hub: built, loaded by the Hub's own loader, and used without dms."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_USE = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
from kernels._rust import Build

package = Path(sys.argv[1])
assert [str(backend) for backend in Build.open(package).general.backends] == ["cuda", "cpu"]
dms = get_local_kernel(package, backend="cpu")
q, k, v = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
log_keep = torch.full((1, 9, 2), -0.3, requires_grad=True)
out = dms.gated_attention(q, k, v, log_keep, window=2, scale=0.25, segment_ids=None)
out.sum().backward()
assert out.shape == (1, 9, 4, 16) and log_keep.grad.abs().sum() > 0
count = dms.distill_loss(q.view(9, 64), q.view(9, 64), torch.randn(11, 64), beta=0.0, valid=torch.ones(9, dtype=torch.bool), chunk=4)[1]
assert count == 9
print(*sorted(name for name in sys.modules if "dms" in name))
print(*dms.__all__)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "a package"
    run = subprocess.run([sys.executable, ROOT / "kernels/hub/build.py", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out


def test_it_loads_and_runs(package, tmp_path):
    run = subprocess.run([sys.executable, "-c", _USE, package], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    modules, names = run.stdout.strip().splitlines()
    assert {"gated_attention", "distill_loss"} <= set(names.split())
    # All of it comes from the package, under the loader's name for it.
    tops = {name.split(".")[0] for name in modules.split()}
    assert not tops & {"dms", "dms_kernels"} and any(top.startswith("_dms_kernels_cpu_") for top in tops)


def test_it_holds_every_module_and_no_absolute_import(package):
    source = {path.relative_to(ROOT / "kernels/dms_kernels") for path in (ROOT / "kernels/dms_kernels").rglob("*.py")}
    for folder in (package / "build/torch-cuda", package / "build/torch-cpu", package / "torch-ext/dms_kernels"):
        files = list(folder.rglob("*.py"))
        assert {path.relative_to(folder) for path in files} == source
        for path in files:
            compile(path.read_text(), str(path), "exec")
            assert "from dms_kernels" not in path.read_text()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    run = subprocess.run([sys.executable, ROOT / "kernels/hub/build.py", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1 and "give an empty or a new folder" in run.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_what_cannot_be_carried_is_refused():
    sys.path.insert(0, str(ROOT / "kernels/hub"))
    try:
        from build import relative
    finally:
        sys.path.pop(0)
    assert relative("from dms_kernels.a.b import c\n    from dms_kernels import d\n", 1) == "from ..a.b import c\n    from .. import d\n"
    for text in ("import dms_kernels.a", "    import dms_kernels", "from dms import x", "import dms"):
        with pytest.raises(ValueError, match="cannot be carried"):
            relative(text, 0)
