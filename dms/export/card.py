"""README.md of an exported folder: the model's card with its figures, and how to load what the folder is now."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from dms.report.card import hub_id, introduction, shown_name
from dms.report.card_sections import join_card, set_section, split_card

_LOADING = "How to load it"
_NEEDED = ("torch", "transformers", "safetensors")

_WITH_CODE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)  # this folder, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

It evicts from the start, in prefill as in decode. {needs}

The code lies in this folder and `trust_remote_code=True` runs it; without that, transformers loads the dense model.

- `from_pretrained(..., evict_bias=1.0)`, `generate(..., evict_bias=1.0)` or `model.dms.evict_bias`: added to every gate's logit; above 0 evicts more than was trained, below 0 less.
- `model.dms.activate("dense")`: the model without eviction again; `model.dms.activate("evict")`: back.
- lm-evaluation-harness: `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks ...`
"""

_WITHOUT_CODE = """```python
import dms
from transformers import AutoTokenizer

model = dms.load("FOLDER")  # this folder
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

It evicts from the start and works with `model.generate`; transformers alone loads the dense model.
"""

_GATES = """```python
import dms

model = dms.load("FOLDER", base="{base}")  # this folder, and the base that the gates were trained on
```

The base's weights are not here. Another base is refused: these gates belong to weights with hash `{hash}`.
"""


def write(source: Path, folder: Path, metadata: Mapping[str, str], *, with_code: bool) -> Path:
    """Write `folder`/README.md: the card `source` (which may be missing) with a new section on loading."""
    fields, body = split_card(source.read_text(encoding="utf-8")) if source.is_file() else ({}, "")
    base = metadata.get("base_name") or ""
    tags = [tag for tag in fields.get("tags") or ["kv-cache", "dms"] if tag != "custom_code"]
    fields = {
        "base_model": hub_id(base),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **fields,
        "tags": (["custom_code"] if with_code else []) + tags,
    }
    body = body if body.strip() else introduction(base)
    loading = _WITH_CODE.format(needs=_requirements()) if with_code else _WITHOUT_CODE
    return _write(folder, fields, set_section(body, _LOADING, loading, before=("Intended use and limits",)))


def write_gates_card(folder: Path, metadata: Mapping[str, str]) -> Path:
    base = metadata.get("base_name") or ""
    fields = {"base_model": hub_id(base), "tags": ["kv-cache", "dms"]}
    loading = _GATES.format(base=shown_name(base), hash=metadata.get("base_hash"))
    return _write(folder, fields, set_section(introduction(base), _LOADING, loading))


def _write(folder: Path, fields: Mapping, body: str) -> Path:
    path = folder / "README.md"
    path.write_text(join_card(fields, body), encoding="utf-8")
    return path


def _requirements() -> str:
    """Which of this project's own requirements the folder's code has."""
    try:
        declared = importlib.metadata.requires("dms-retrofit") or []
    except importlib.metadata.PackageNotFoundError:
        declared = []
    named = {re.match(r"[\w.-]+", line)[0]: line.split(";")[0].strip() for line in declared if "extra ==" not in line}
    needed = [f"`{named.get(name, name)}`" for name in _NEEDED]
    return f"It needs {', '.join(needed[:-1])} and {needed[-1]}, not dms itself."
