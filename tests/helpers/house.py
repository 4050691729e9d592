"""The repository as its guards see it."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *, flags: tuple[str, ...] = (), cwd: Path = ROOT, **env: str) -> str:
    """Run code in a fresh interpreter with cwd first on its path; what it prints, or a failure with what it complains of."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


def tree_files() -> list[Path]:
    """The files that belong to the repository: tracked, or not ignored; without git, all but the usual leavings."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(git, capture_output=True, check=True)
        names = [Path(os.fsdecode(name)) for name in done.stdout.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
    leavings = {".git", ".venv", "runs", "wandb", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    return [ROOT / name for name in names if not leavings & set(name.parts) and (ROOT / name).is_file()]


def imports_of(path: Path, package: str) -> set[str]:
    """Full names of all that a module imports, wherever in it; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def modules(packages: dict[str, Path], top: str, *, without: tuple[str, ...] = ()) -> list[tuple[Path, set[str]]]:
    chosen = [name for name in packages if f"{name}.".startswith(f"{top}.") and not f"{name}.".startswith(tuple(f"{x}." for x in without))]
    return [(path, imports_of(path, name)) for name in chosen for path in sorted(packages[name].glob("*.py"))]
