"""Rows of results, as lines of JSON and as a table."""

import json
from pathlib import Path

from bench.measuring import Ceilings, Competitor
from bench.shapes import Shape

# Those whose time is that of moving bytes; the others' is that of matrix products.
_MOVING = ("decode", "append")


def make_row(
    shape: Shape,
    competitor: Competitor,
    machine: dict,
    ceilings: Ceilings,
    *,
    ms: float | None = None,
    ours_ms: float | None = None,
    parity_error: float | None = None,
    problem: str | None = None,
) -> dict:
    """problem: why there is no time. share_of_ceiling: of the copy's bandwidth or of the matrix product's rate, whichever binds."""
    tflops = gbps = share = None
    if ms is not None and shape.operation in _MOVING and competitor.bytes:
        gbps = competitor.bytes / ms / 1e6
        share = gbps / ceilings.copy_gbps
    elif ms is not None and competitor.flops:
        tflops = competitor.flops / ms / 1e9
        share = tflops / ceilings.gemm_tflops
    return {
        "operation": shape.operation,
        "shape": shape.name,
        "competitor": competitor.name,
        **machine,
        "ms": ms,
        "bytes": competitor.bytes or None,
        "flops": competitor.flops or None,
        "tflops": tflops,
        "gbps": gbps,
        "share_of_ceiling": share,
        "copy_gbps": ceilings.copy_gbps,
        "gemm_tflops": ceilings.gemm_tflops,
        "ratio_to_ours": None if ms is None or not ours_ms else ms / ours_ms,
        "parity_error": parity_error,
        "problem": problem,
    }


def write_row(path: Path | None, row: dict) -> None:
    """Appended at once: what was measured before an interruption stays."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def table(rows: list[dict]) -> str:
    """Lines of fixed columns, a shape's rows under one another."""
    lines = [("operation", "shape", "competitor", "ms", "rate", "ceiling", "x ours", "error")]
    before = None
    for row in sorted(rows, key=lambda row: row["operation"]):
        where = (row["operation"], row["shape"])
        names = ("", "") if where == before else where
        before = where
        if row["ms"] is None:
            lines.append((*names, row["competitor"], "-", "", "", "", _shortened(row["problem"])))
            continue
        rate = f"{row['gbps']:,.0f} GB/s" if row["gbps"] is not None else f"{row['tflops']:,.0f} TFLOP/s" if row["tflops"] else ""
        share = "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}"
        ratio = "" if row["ratio_to_ours"] is None else f"{row['ratio_to_ours']:.2f}"
        error = "" if row["parity_error"] is None else f"{row['parity_error']:.1e}"
        lines.append((*names, row["competitor"], f"{row['ms']:.4g}", rate, share, ratio, error))
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    left = (0, 1, 2)
    return "\n".join(
        "  ".join(f"{cell:<{widths[i]}}" if i in left else f"{cell:>{widths[i]}}" for i, cell in enumerate(line[:7])) + "  " + line[7]
        for line in lines
    )


def _shortened(problem: str | None) -> str:
    first = (problem or "").strip().splitlines()
    return first[0][:90] if first else ""
