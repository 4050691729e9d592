"""Which of a folder's files a server reads as weights, and what modes files have."""

import json
import stat
from pathlib import Path


def files_read(folder: Path) -> set[str]:
    """The rule of vLLM and SGLang: every *.safetensors there is; where an index is, those that it names, which must be there."""
    files = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return files
    named = set(json.loads(index.read_text())["weight_map"].values())
    assert named <= files, f"the index names {named - files}, which are not there"
    return named


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
