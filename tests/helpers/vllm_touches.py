"""What serve/dms_vllm imports of vLLM, by its modules."""

import ast

from house import ROOT

PLUGIN = ROOT / "serve" / "dms_vllm"


def _touches() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted(PLUGIN.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    found.setdefault(f"{node.module}.{alias.name}", set()).add(path.name)
            assert not (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vllm" for alias in node.names)), (
                "vLLM is imported by name, so that docs/upstream.md can list it"
            )
    return found


TOUCHES = _touches()
"""The files that import each name."""
