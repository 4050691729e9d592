"""The table of what the kernels take: `python kernels/aot/table.py [--full | --windows] [--json FILE] [--only OPERATION ...]`. No GPU needed."""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--full", action="store_true", help="the whole matrix; otherwise a few representative cases")
    parser.add_argument("--windows", action="store_true", help="three windows beside one")
    parser.add_argument("--only", nargs="+", metavar="OPERATION")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it", file=sys.stderr)
        return 2
    from cases import full_matrix, representative, several_windows
    from compiling import compiling

    rows = []
    print(f"{'case':<44} {'kernel':<24} {'warps':>5} {'regs':>5} {'stack':>6} {'shared':>8}  tensor cores")
    for case in full_matrix() if given.full else several_windows() if given.windows else representative():
        if given.only and case.operation not in given.only:
            continue
        start = time.monotonic()
        with compiling(case.capability) as found:
            case.launch()
        for kernel in found:
            matrix = " ".join(f"{name} {number}" for name, number in sorted(kernel.matrix.items()))
            print(
                f"{case.name:<44} {kernel.kernel.lstrip('_'):<24} {kernel.num_warps:>5} {kernel.registers:>5} {kernel.stack_bytes:>6} "
                f"{kernel.shared_bytes:>8}  {matrix}",
                flush=True,
            )
            rows.append({**asdict(case), **asdict(kernel), "seconds": time.monotonic() - start})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
