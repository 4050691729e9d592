"""The notebook in examples/ runs from top to bottom, on a CPU and offline, and shows what it says."""

import re

import pytest
from house import ROOT

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (scripts/setup_env.sh dev brings it)")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (scripts/setup_env.sh dev brings it)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (scripts/setup_env.sh dev brings it)")

NOTEBOOK = ROOT / "examples" / "retrofit_and_look.ipynb"


def test_no_outputs_are_committed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") for output in outputs)
    shown = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in data for data in shown) == 2
    (html,) = [data["text/html"] for data in shown if "opacity" in data.get("text/html", "")]
    assert html.count("<span") > 100
    # More is evicted as the bias rises, and something at 0.
    (seen,), held = set(re.findall(r"evict_bias .* of ([\d,]+) KV entries", said)), re.findall(r"evict_bias [+-]\d: ([\d,]+) of", said)
    least, trained, most = (int(number.replace(",", "")) for number in reversed(held))
    assert least < trained < most <= int(seen.replace(",", ""))
