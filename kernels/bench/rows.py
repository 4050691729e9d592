"""Rows of results, as lines of JSON and as a table."""

import json
from pathlib import Path

from bench.predictions import predict
from bench.shapes import Shape

# Those whose time is that of moving bytes; the others' is that of matrix products.
_MOVING = ("decode", "append")
_HEADS = ("operation", "shape", "competitor", "ms", "rate", "ceiling", "x ours", "predicted", "measured/predicted", "best known", "error")


def make_row(shape: Shape, result: dict, *, machine: dict, ceilings: dict, ours_ms: float | None = None) -> dict:
    """result: as `run.Measurement.time` gives it. share_of_ceiling: of the copy's bandwidth or of the matrix product's rate, whichever
    binds; None where `ceilings` ({"copy_gbps", "gemm_tflops"}) lacks it."""
    ms, tflops, gbps, share = result["ms"], None, None, None
    if ms is not None and shape.operation in _MOVING and result["bytes"]:
        gbps = result["bytes"] / ms / 1e6
        share = gbps / ceilings["copy_gbps"] if ceilings.get("copy_gbps") else None
    elif ms is not None and result["flops"]:
        tflops = result["flops"] / ms / 1e9
        share = tflops / ceilings["gemm_tflops"] if ceilings.get("gemm_tflops") else None
    return {
        "operation": shape.operation,
        "shape": shape.name,
        "competitor": result["competitor"],
        **machine,
        "ms": ms,
        "bytes": result["bytes"] or None,
        "flops": result["flops"] or None,
        "tflops": tflops,
        "gbps": gbps,
        "share_of_ceiling": share,
        "copy_gbps": ceilings.get("copy_gbps"),
        "gemm_tflops": ceilings.get("gemm_tflops"),
        "ratio_to_ours": None if ms is None or not ours_ms else ms / ours_ms,
        "parity_error": result["parity_error"],
        "problem": result["problem"],
    }


def write_row(path: Path | None, row: dict) -> None:
    """Appended at once: what was measured before an interruption stays."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict]:
    """What `write_row` wrote.

    Raises:
        ValueError: a line is no row.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as failure:
            raise ValueError(f"{path}, line {number} is no JSON: {failure}") from failure
        if not isinstance(row, dict) or not {"operation", "shape", "competitor", "ms"} <= row.keys():
            raise ValueError(f"{path}, line {number} is no row of a benchmark: it lacks operation, shape, competitor or ms")
        rows.append(row)
    return rows


def line_of(row: dict) -> str:
    """One row by itself, as it is printed when it is known."""
    where = f"{row['operation']}, {row['shape']}, {row['competitor']}:"
    if row["ms"] is None:
        return f"{where} {_shortened(row['problem'])}"
    cells = _cells(row)
    more = [
        cells["rate"],
        cells["ceiling"] and f"{cells['ceiling']} of the ceiling",
        cells["predicted"] and f"predicted {cells['predicted']}",
    ]
    return f"{where} {cells['ms']} ms" + "".join(f", {part}" for part in more if part) + (cells["off"] and f" ({cells['off']})")


def table(rows: list[dict]) -> str:
    """Lines of fixed columns, a shape's rows under one another. Times in ms; measured over predicted has a mark where it is off."""
    places: dict[tuple, int] = {}
    for row in rows:
        places.setdefault((row["operation"], row["shape"]), len(places))
    operations = sorted({row["operation"] for row in rows})
    lines, before = [_HEADS], None
    for row in sorted(rows, key=lambda row: (operations.index(row["operation"]), places[row["operation"], row["shape"]])):
        where = (row["operation"], row["shape"])
        names = ("", "") if where == before else where
        before = where
        if row["ms"] is None:
            lines.append((*names, row["competitor"], "-", *[""] * 6, _shortened(row["problem"])))
            continue
        cells = _cells(row)
        lines.append(
            (*names, row["competitor"], *(cells[name] for name in ("ms", "rate", "ceiling", "ratio", "predicted", "off", "best", "error")))
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADS) - 1)]
    left = (0, 1, 2)
    return "\n".join(
        "  ".join(
            [*(f"{cell:<{widths[i]}}" if i in left else f"{cell:>{widths[i]}}" for i, cell in enumerate(line[:-1])), line[-1]]
        ).rstrip()
        for line in lines
    )


def _cells(row: dict) -> dict[str, str]:
    """Of a row with a time, as they are printed."""
    expected = predict(row)
    return {
        "ms": f"{row['ms']:.4g}",
        "rate": f"{row['gbps']:,.0f} GB/s" if row["gbps"] is not None else f"{row['tflops']:,.0f} TFLOP/s" if row["tflops"] else "",
        "ceiling": "" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}",
        "ratio": "" if row["ratio_to_ours"] is None else f"{row['ratio_to_ours']:.2f}",
        "predicted": "" if expected is None else f"{expected.ms:.3g}",
        "off": "" if expected is None else f"x{row['ms'] / expected.ms:.2f}{expected.verdict(row['ms'])}",
        "best": "" if expected is None or expected.best_ms is None else f"{expected.best_ms:.3g} {expected.best_name}",
        "error": "" if row["parity_error"] is None else f"{row['parity_error']:.1e}",
    }


def _shortened(problem: str | None) -> str:
    first = (problem or "").strip().splitlines()
    return first[0][:120] if first else ""
