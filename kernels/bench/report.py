"""Rows that were measured, beside what was predicted and the best that others are known to reach.

`python -m bench.report FILE`: the table of a file of rows, then the rows that are off by more than the factor in predictions.json.
`python -m bench.report --gpu H100`: what all rows should be; needs torch.
"""

import argparse
import importlib
import sys
from pathlib import Path

from bench.predictions import load, predict
from bench.rows import read_rows, table
from bench.shapes import Shape, all_shapes


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


def expected(gpu: str, shapes: list[Shape]) -> str:
    """Lines: what each row with a prediction should be on this GPU, and the best known."""
    import torch

    lines = []
    for shape in shapes:
        for one in importlib.import_module(f"bench.{shape.operation}").competitors(shape, "cpu", torch.bfloat16):
            row = {
                "operation": shape.operation,
                "shape": shape.name,
                "competitor": one.name,
                "gpu": gpu,
                "bytes": one.bytes,
                "flops": one.flops,
            }
            found = predict(row)
            if found is not None:
                best = f"; {found.best_name} {found.best_ms:.3g} ms" if found.best_ms is not None else ""
                lines.append(f"{shape.operation}, {shape.name}, {one.name}: {found.ms:.3g} ms{best}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="rows, as lines of JSON, such as bench/results/h200.jsonl")
    parser.add_argument("--gpu", choices=load()["gpus"], help="in place of FILE: what all rows should be on this GPU")
    options = parser.parse_args(arguments)
    if (options.file is None) == (options.gpu is None):
        parser.error("give a FILE of rows, or --gpu and no file")
    if options.gpu:
        print(expected(options.gpu, all_shapes()))
        return 0
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
