"""The GPU times that pages show are rows of kernels/bench/results, to the digits shown."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = {"decode": "decode", "training attention": "attention", "append": "append", "distillation loss, forward KL": "loss"}


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    """Milliseconds of every competitor, by operation."""
    found: dict[str, list[float]] = {}
    for line in (ROOT / "kernels/bench/results/h200.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["ms"] is not None:
            found.setdefault(row["operation"], []).append(row["ms"])
    return found


def shown(page: str) -> list[tuple[str, str]]:
    """(operation, milliseconds as written) of a page's table of times; a row without an operation goes on with the one before."""
    found, operation = [], ""
    text = (ROOT / page).read_text(encoding="utf-8")
    for line in text[text.index("| operation | shape | ours, ms") :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        operation = OPERATIONS[cells[0]] if cells[0] else operation
        found += [(operation, cell) for cell in (cells[2], cells[5]) if cell]
    return found


@pytest.mark.parametrize("page", ["docs/kernels.md"])
def test_every_time_is_a_row(page, measured):
    times = shown(page)
    assert len(times) > 10
    for operation, written in times:
        digits = len(written.partition(".")[2])
        assert any(f"{ms:.{digits}f}" == written for ms in measured[operation]), f"{page}: {operation} {written} ms is no row"


def test_the_readme_quotes_rows(measured):
    quoted = re.search(r"attention takes ([\d.]+) ms where dense SDPA takes ([\d.]+)", " ".join((ROOT / "README.md").read_text().split()))
    assert quoted
    assert all(any(f"{ms:.2f}" == text for ms in measured["decode"]) for text in quoted.groups())
