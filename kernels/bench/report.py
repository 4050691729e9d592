"""Rows that were measured, beside what was predicted and the best that others are known to reach.

`python -m bench.report FILE`: the table of a file of rows, then the rows that are off by more than the factor in predictions.json.
"""

import argparse
import sys
from pathlib import Path

from bench.predictions import load, predict
from bench.rows import read_rows, table


def off(rows: list[dict]) -> list[tuple[float, dict]]:
    """Measured over predicted, and the row, of those that are off by more than the factor; the farthest first."""
    found = []
    for row in rows:
        expected = None if row["ms"] is None else predict(row)
        if expected is not None and expected.verdict(row["ms"]):
            found.append((row["ms"] / expected.ms, row))
    return sorted(found, key=lambda pair: -max(pair[0], 1 / pair[0]))


def summary(rows: list[dict]) -> str:
    """Lines: how many rows have a prediction, and which of them are off."""
    predicted = [row for row in rows if row["ms"] is not None and predict(row) is not None]
    if not predicted:
        return "no row has a prediction: they are for an H100 and an H200, and for shapes that are measured"
    lines = [f"{len(predicted)} of {len(rows)} rows have a prediction; off by more than {load()['factor']:g}:"]
    lines += [f"  x{ratio:.2f}  {row['operation']}, {row['shape']}, {row['competitor']}: {row['ms']:.4g} ms" for ratio, row in off(rows)]
    return "\n".join(lines if len(lines) > 1 else [*lines, "  none"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="rows, as lines of JSON, such as results/h200.jsonl")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.file)
    except (OSError, ValueError) as problem:
        parser.error(str(problem))
    if not rows:
        parser.error(f"{options.file} has no rows")
    print(table(rows), summary(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
