"""Measure every operation against its competitors on this machine's GPU."""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    from bench.shapes import OPERATIONS

    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short list of shapes")
    parser.add_argument("--only", metavar="NAMES", default=",".join(OPERATIONS), help="operations, comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append rows to this file, as lines of JSON")
    parser.add_argument("--budget", type=float, metavar="SECONDS", default=float("inf"), help="drop what is left after so long")
    options = parser.parse_args()
    only = options.only.split(",")
    unknown = sorted(set(only) - set(OPERATIONS))
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(OPERATIONS)}")

    import torch

    if not torch.cuda.is_available():
        print("bench: no GPU here, and there is nothing to measure without one", file=sys.stderr)
        return 2
    # Rather no row than one of plain PyTorch under the kernels' name.
    os.environ["DMS_KERNELS"] = "triton"
    from bench.run import run_on_gpu
    from bench.shapes import all_shapes

    shapes = [shape for shape in all_shapes() if shape.operation in only and (shape.quick or not options.quick)]
    return run_on_gpu(shapes, out=options.out, budget=options.budget)


if __name__ == "__main__":
    sys.exit(main())
