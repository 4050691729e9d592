"""Fails unless the table that a retrofit printed compares dense, dms and a sliding window of the same size, and dms has evicted."""

import re
import sys
from pathlib import Path

ROW = re.compile(r"^\s*(dense|dms|sliding_window)\s+(.*)$", re.M)
text = Path(sys.argv[1]).read_text(encoding="utf-8")
rows = {name: cells.split() for name, cells in ROW.findall(text)}
if set(rows) != {"dense", "dms", "sliding_window"}:
    sys.exit(f"check_table: rows of {sorted(rows)}; dense, dms and sliding_window were expected in:\n{text}")

# The columns end in: cr decided, cr, memory.
cr = {name: float(cells[-2]) for name, cells in rows.items()}
if cr["dense"] != 1:
    sys.exit(f"check_table: dense has a cr of {cr['dense']}, and drops nothing")
if cr["dms"] < 1.5:
    sys.exit(f"check_table: dms has a cr of {cr['dms']}; it has evicted next to nothing")
if abs(cr["sliding_window"] / cr["dms"] - 1) > 0.05:
    sys.exit(f"check_table: the sliding window has a cr of {cr['sliding_window']}, dms of {cr['dms']}: not the same size")
print(f"check_table: dms evicted (cr {cr['dms']}), beside dense and a sliding window of the same size")
