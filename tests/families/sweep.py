"""Sweep of all families: runs `family_checks.check` on each, in processes of its own, and compares the rows with those committed.

    python tests/families/sweep.py [PATTERN] [--accept] [--fresh] [--processes 2] [--limit 90]

PATTERN: a regular expression, searched for in "MODEL_TYPE:CLASS:VARIANT". Rows of a run lie in runs/families/VERSION.jsonl, from which an
interrupted run goes on. `--accept` writes them into rows-VERSION.jsonl beside this file, and docs/families.md from it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPARED = ("status", "gated", "layers", "skipped", "reason")
# Of the families that one process is given.
CHUNK = 24


def rows_file(version: str) -> Path:
    """The committed rows of a transformers version."""
    return HERE / f"rows-{version}.jsonl"


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by case; a line that was cut off is left out."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["case"]] = row
    return rows


def write_rows(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    text = "".join(json.dumps(rows[case], ensure_ascii=False) + "\n" for case in sorted(rows))
    path.write_text(text, encoding="utf-8")


def changes(before: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[str]:
    """What differs between committed rows and those of a run, a line each."""
    found = []
    for case in sorted(now):
        if case not in before:
            found.append(f"{case}: new, {_told(now[case])}")
        elif any(before[case][name] != now[case][name] for name in COMPARED):
            found.append(f"{case}: was {_told(before[case])}; is {_told(now[case])}")
    return found


def _told(row: dict[str, Any]) -> str:
    return f"{row['status']} ({row['gated']} of {row['layers']} layers gated)" + (f": {row['reason']}" if row["reason"] else "")


def run_cases(cases: list[str], command: list[str], limit: float, note: Callable[[dict[str, Any]], None]) -> None:
    """Give the cases to processes that print a row each; one that crashes, or takes longer than `limit` seconds, loses that case alone."""
    remaining = list(cases)
    while remaining:
        ended: list[str] = []
        process = subprocess.Popen(
            [*command, *remaining], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        late = threading.Event()
        for row in _rows_of(process, limit, late):
            note(row)
            ended.append(row["case"])
        code = process.wait()
        remaining = [case for case in remaining if case not in ended]
        if remaining:
            why = f"it did not end within {limit:g} seconds" if late.is_set() else f"its process ended with {_exit_name(code)}"
            note(make_row(remaining.pop(0), {"status": "WRONG", "reason": why}))


def _rows_of(process: subprocess.Popen, limit: float, late: threading.Event) -> Iterator[dict[str, Any]]:
    def stop() -> None:
        late.set()
        process.kill()

    while True:
        # The first row waits for imports too.
        timer = threading.Timer(limit, stop)
        timer.start()
        line = process.stdout.readline()  # type: ignore[union-attr]
        timer.cancel()
        if not line:
            return
        yield json.loads(line)


def _exit_name(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


def make_row(case: str, found: dict[str, Any]) -> dict[str, Any]:
    model_type, cls, variant = case.split(":", 2)
    row = {"case": case, "model_type": model_type, "class": cls, "variant": variant, "gated": 0, "layers": 0, "skipped": {}, "notes": []}
    return row | {"status": "", "reason": ""} | found


def _work(cases: list[str]) -> None:
    """In a process of its own: print the row of each case."""
    # What libraries print goes elsewhere.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers
    from family_checks import check

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = {case.name: case for case in _all_cases()}
    for name in cases:
        row = make_row(name, check(known[name]))
        row["reason"] = re.sub(r"/\S*/tmp\w+", "FOLDER", row["reason"])
        print(json.dumps(row | {"transformers": transformers.__version__}), file=out, flush=True)


def _all_cases() -> list[Any]:
    from family_settings import cases
    from tiny_models import names

    return cases(names())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--accept", action="store_true", help="commit this run's rows to the table, and write the docs page")
    parser.add_argument("--fresh", action="store_true", help="run again what an earlier run has done")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds that one case may take")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        _work(given.work)
        return 0

    import transformers

    version, start = transformers.__version__, time.monotonic()
    wanted = [case.name for case in _all_cases() if re.search(given.pattern, case.name)]
    if not wanted:
        print(f"no family fits {given.pattern!r}; patterns are searched for in MODEL_TYPE:CLASS:VARIANT, such as ^llama:", file=sys.stderr)
        return 2
    path = ROOT / "runs" / "families" / f"{version}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {} if given.fresh else read_rows(path)
    rows = {case: done[case] for case in wanted if case in done}
    pending = [case for case in wanted if case not in rows]
    lock = threading.Lock()

    def note(row: dict[str, Any]) -> None:
        row.setdefault("transformers", version)
        with lock:
            rows[row["case"]] = row
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if row["status"] == "WRONG":
                print(f"[{len(rows)}/{len(wanted)}] {row['case']}: {_told(row)}", file=sys.stderr, flush=True)

    command = [sys.executable, str(Path(__file__).resolve()), "--work"]
    chunks = [pending[i : i + CHUNK] for i in range(0, len(pending), CHUNK)]
    with ThreadPoolExecutor(given.processes) as pool:
        for future in [pool.submit(run_cases, chunk, command, given.limit, note) for chunk in chunks]:
            future.result()

    counts = Counter(row["status"] for row in rows.values())
    minutes = (time.monotonic() - start) / 60
    print(
        f"transformers {version}: {', '.join(f'{n} {status}' for status, n in counts.most_common())}; {len(pending)} run, {minutes:.1f} min"
    )
    if given.accept:
        kept = {case: row for case, row in read_rows(rows_file(version)).items() if not re.search(given.pattern, case)}
        write_rows(rows_file(version), kept | rows)
        from families_page import write_page

        write_page()
        return 0
    differ = compare(version, given.pattern, rows)
    return int(differ or counts["WRONG"] > 0)


def compare(version: str, pattern: str, rows: dict[str, dict[str, Any]]) -> bool:
    """Print how rows differ from the committed ones of their version, or of the newest where it has none; whether that is a fault."""
    from families_page import committed

    tables = committed()
    if not tables:
        print("there is no committed table; --accept makes one")
        return False
    of = version if version in tables else next(iter(tables))
    before = {case: row for case, row in tables[of].items() if re.search(pattern, case)}
    found = changes(before, rows) + [f"{case}: gone" for case in sorted(before.keys() - rows.keys())]
    if found:
        print(f"differs from the committed rows of transformers {of}:", *found, sep="\n")
    # Another release may bring families and take some away.
    return any(of == version or (not line.endswith(": gone") and ": new, " not in line) for line in found)


if __name__ == "__main__":
    sys.exit(main())
