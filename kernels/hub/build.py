"""Build a package for the Hugging Face Kernel Hub out of `dms_kernels`: `python kernels/hub/build.py OUT`.

OUT gets `build.toml`, a card, and `build/torch-cuda` and `build/torch-cpu`: the same pure-Python tree with relative imports, which
`kernels.get_local_kernel(Path(OUT))`, or the Hub once OUT is uploaded, loads beside any other version of itself. On a CPU the
operations run on plain PyTorch. Format: the "Kernel requirements" and "Write kernels" pages of the package `kernels`, 0.17.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

NAME, VERSION = "dms-kernels", 1
BACKENDS = ("cuda", "cpu")
SOURCE = Path(__file__).resolve().parents[1] / "dms_kernels"
_IMPORT = re.compile(r"^(?P<indent>\s*)from dms_kernels(?P<module>(\.\w+)*) import ", re.MULTILINE)
_ABSOLUTE = re.compile(r"^\s*import dms_kernels|^\s*(from|import) dms\b", re.MULTILINE)

_BUILD = """[general]
edition = 5
name = "{name}"
version = {version}
license = "apache-2.0"
backends = [{backends}]

[torch-noarch]
"""

_CARD = """---
library_name: kernels
license: apache-2.0
---

# {name}

Kernels of Dynamic Memory Sparsification (arXiv 2506.05345), learned KV-cache eviction: training attention with gates, sparse
prefill, decoding from ragged pages, the cache's append, and a chunked distillation loss. Triton on NVIDIA GPUs of compute
capability 8.0 and later, plain PyTorch elsewhere.

```python
from kernels import get_kernel

dms = get_kernel("ORGANISATION/{name}", version={version}, trust_remote_code=True)
{functions}
```

Each function's docstring gives shapes, dtypes and errors.
"""


def relative(text: str, depth: int) -> str:
    """The text of a module that lies `depth` folders below the package, with relative imports."""
    text = _IMPORT.sub(lambda found: f"{found['indent']}from {'.' * (depth + 1)}{found['module'][1:]} import ", text)
    if wrong := _ABSOLUTE.search(text):
        raise ValueError(f"cannot be carried: {wrong.group().strip()!r}; import names as 'from dms_kernels.module import name'")
    return text


def public_names() -> list[str]:
    """What `dms_kernels` hands on."""
    listed = re.search(r"__all__ = \[(.*?)\]", (SOURCE / "__init__.py").read_text(encoding="utf-8"), re.DOTALL)
    return re.findall(r'"(\w+)"', listed[1])


def build(out: Path) -> list[Path]:
    """Write the package into `out`, which is made anew. Returns the variants' folders."""
    files = sorted(path for path in SOURCE.rglob("*.py"))
    texts = {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in files}
    texts = {path: relative(text, len(path.parts) - 1) for path, text in texts.items()}
    digest = hashlib.sha256("".join(f"{path}\0{text}\0" for path, text in texts.items()).encode()).hexdigest()[:8]
    if out.exists():
        if any(out.iterdir()) and not (out / "build.toml").is_file():
            raise ValueError(f"{out} holds other things than a kernel package; give an empty or a new folder")
        shutil.rmtree(out)
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        for path, text in texts.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{digest}",
            "version": VERSION,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (out / "build.toml").write_text(_BUILD.format(name=NAME, version=VERSION, backends=backends), encoding="utf-8")
    functions = "\n".join(f"dms.{name}" for name in public_names())
    (out / "README.md").write_text(_CARD.format(name=NAME, version=VERSION, functions=functions), encoding="utf-8")
    # The builder's own layout, for those who build with it.
    shutil.copytree(out / "build" / "torch-cuda", out / "torch-ext" / NAME.replace("-", "_"), ignore=lambda *_: ["metadata.json"])
    return [out / "build" / f"torch-{backend}" for backend in BACKENDS]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, new, empty or an earlier build")
    try:
        folders = build(parser.parse_args(arguments).out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for folder in folders:
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
