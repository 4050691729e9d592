"""docs/upstream.md lists what the plugin imports of vLLM, and which file does."""

import re

from house import ROOT
from vllm_touches import TOUCHES


def test_every_import_is_listed():
    section = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8").partition("`serve/dms_vllm`")[2].partition("\n## ")[0]
    listed = {
        name: set(re.findall(r"`(\w+\.py)`", files)) for name, files in re.findall(r"^\| `(vllm[\w.]+)` \| ([^|]+) \|", section, re.M)
    }
    assert listed == TOUCHES
