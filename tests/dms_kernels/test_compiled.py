"""Kernels compiled for GPUs that are not here: registers, local and shared memory within their budgets, tensor cores in use.

The default tests compile a few representative cases, the slow ones the whole matrix; `python kernels/aot/table.py` prints it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).resolve().parents[2] / "kernels" / "aot"
sys.path.insert(0, str(AOT))
try:
    from cases import budget_of, full_matrix, representative
finally:
    sys.path.remove(str(AOT))

SHARED_BYTES = {80: 166_912, 90: 232_448}


def compile_all(tmp_path_factory, *arguments: str) -> list[dict]:
    out = tmp_path_factory.mktemp("compiled") / "rows.json"
    # Where Triton is interpreted nothing is compiled, and that is decided when it is imported.
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DMS_KERNELS")}
    command = [sys.executable, AOT / "table.py", "--json", out, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text())


def check(rows: list[dict], cases: list) -> None:
    chosen = ("operation", "capability", "head_dim", "group", "kv", "num_windows", "tokens")
    assert {tuple(row[name] for name in chosen) for row in rows} == {tuple(getattr(case, name) for name in chosen) for case in cases}
    wrong = []
    for row in rows:
        budget = budget_of(row["kernel"], row["tokens"])
        takes = f"{row['operation']} sm_{row['capability']} D{row['head_dim']} G{row['group']} {row['kv']} K{row['num_windows']} T{row['tokens']}: {row['kernel']} takes"
        for name, limit in (
            ("registers", budget.registers),
            ("stack_bytes", budget.stack_bytes),
            ("shared_bytes", SHARED_BYTES[row["capability"]]),
        ):
            if row[name] > limit:
                wrong.append(f"{takes} {row[name]} {name} of {limit}")
        if budget.matrix and not row["matrix"]:
            wrong.append(f"{takes} no tensor core")
        if budget.wgmma and row["capability"] >= 90 and "HGMMA" not in row["matrix"]:
            wrong.append(f"{takes} no HGMMA but {row['matrix']}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_representative_kernels(tmp_path_factory):
    check(compile_all(tmp_path_factory), representative())


@pytest.mark.slow
def test_the_whole_matrix(tmp_path_factory):
    check(compile_all(tmp_path_factory, "--full"), full_matrix())


def test_interpreting_is_refused():
    run = subprocess.run([sys.executable, AOT / "table.py"], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 2 and "unset it" in run.stderr
