"""Carry a module elsewhere: it and all of ours that it imports, rewritten as flat sibling modules.

A model folder can bring its code along, but transformers follows no packages there: it copies the files beside the model's file that
are named by a line `from .module import name`. So `dms/cache/cache.py` becomes `dms_cache_cache.py`, and
`from dms.cache import DMSCache` becomes `from .dms_cache_cache import DMSCache`, found through the package's re-export.

What only training needs stays at home: an import of it within a function becomes an error that says so.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

OURS = ("dms", "dms_kernels")
# A part of the source, and what becomes of it.
_Edit = tuple[ast.stmt | ast.expr, str]
# Packages and modules of ours that are not carried.
AT_HOME = ("dms.training", "dms.requirements")
_NOT_HERE = (
    "is not part of this folder, whose code is for inference; to train its gates install dms-retrofit and load the folder with dms.load"
)
# What an exported model may need; anything else must be imported within try/except ImportError.
ALLOWED = ("torch", "transformers", "safetensors")


def flat_name(module: str) -> str:
    return module.replace(".", "_")


@dataclass(frozen=True)
class SourceModule:
    """A module's source."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def package(self) -> str:
        """What relative imports in it start from."""
        return self.name if self.is_package else self.name.rpartition(".")[0]


def flatten(
    entry: str, ours: tuple[str, ...] = OURS, allowed: tuple[str, ...] = ALLOWED, at_home: tuple[str, ...] = AT_HOME
) -> dict[str, SourceModule]:
    """`entry` and all modules of `ours` that it imports, anywhere in them, by flat name and with flat imports; entry first.

    Nothing is imported for it. Packages' `__init__` come along where a name is imported that they define; names that they only
    hand on are taken from where they are defined. at_home: packages and modules that are not carried; an import of them within a function
    becomes an ImportError, and one for type checkers nothing.

    Raises:
        RuntimeError: code that cannot be carried: an import that cannot be followed, one that a plain installation lacks, or one of a
            module at home outside functions.
    """
    sources = _Sources(ours, at_home)
    carried: dict[str, SourceModule] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop(0)
        flat = flat_name(name)
        if flat in carried and carried[flat].name != name:
            raise RuntimeError(f"{carried[flat].name} and {name} would both become {flat}.py; rename one of them")
        if flat in carried:
            continue
        module = sources.read(name)
        _check_dependencies(module, ours, allowed)
        text, needed = _rewrite(module, sources)
        carried[flat] = replace(module, text=text)
        waiting += needed
    return carried


class _Sources:
    """Finds modules of `ours` by name, without importing them."""

    def __init__(self, ours: tuple[str, ...], at_home: tuple[str, ...]):
        self.ours, self.at_home = ours, at_home
        self._read: dict[str, SourceModule] = {}

    def owns(self, name: str) -> bool:
        return name.split(".")[0] in self.ours

    def stays(self, name: str) -> bool:
        """Whether a module is at home, or in a package that is."""
        return any(f"{name}.".startswith(f"{one}.") for one in self.at_home)

    def find(self, name: str) -> Path | None:
        top, *rest = name.split(".")
        spec = importlib.util.find_spec(top)
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            path = Path(root, *rest)
            for candidate in (path / "__init__.py", path.with_suffix(".py")):
                if candidate.is_file():
                    return candidate
        return None

    def read(self, name: str) -> SourceModule:
        if name not in self._read:
            path = self.find(name)
            if path is None:
                raise RuntimeError(f"there is no module {name}")
            text = path.read_text(encoding="utf-8")
            self._read[name] = SourceModule(name, path, text, ast.parse(text, str(path)))
        return self._read[name]

    def resolve(self, module: str, name: str, where: str) -> tuple[str, str | None]:
        """What `from module import name` gives: (module, name in it), or (module, None) for a module itself."""
        source = self.read(module)
        if not source.is_package:
            return module, name
        # What the package binds wins over a submodule of that name, as in Python.
        for node in source.tree.body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        origin = _absolute(source, node)
                        return self.resolve(origin, alias.name, where) if self.owns(origin) else (module, name)
            elif name in _bound(node):
                return module, name
        if self.find(f"{module}.{name}") is not None:
            return f"{module}.{name}", None
        raise RuntimeError(f"{where}: {module} does not define {name!r} itself; import it from the module that does")


def _absolute(module: SourceModule, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = module.package.split(".")
    base = parents[: len(parents) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _bound(node: ast.stmt) -> set[str]:
    """Names that a statement of a module defines; imports aside."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    if isinstance(node, (ast.If, ast.Try)):
        return set().union(*(_bound(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)))
    return set()


def _check_dependencies(module: SourceModule, ours: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """transformers refuses a model whose code imports, outside try, what is not installed; even inside a function."""
    known = {*sys.stdlib_module_names, *ours, *allowed}
    for node in _outside_try(module.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [] if node.level else [node.module or ""]
        for name in names:
            if name.split(".")[0] not in known:
                raise RuntimeError(
                    f"{module.name}, line {node.lineno}: {name} is imported, and an exported model has only {', '.join(allowed)}; "
                    "put the import into try/except ImportError, or into a module that inference does not need"
                )


def _outside_try(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif not isinstance(child, ast.Try):
            yield from _outside_try(child)


def _rewrite(module: SourceModule, sources: _Sources) -> tuple[str, list[str]]:
    """The module's text with flat imports, and the names of the modules that it imports."""
    edits: list[_Edit] = []
    needed: list[str] = []
    dotted: dict[str, str] = {}
    text = module.text.encode()
    starts = _line_starts(text)
    for node in ast.walk(module.tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        where = f"{module.name}, line {node.lineno}"
        if home := [name for name in _imported(module, node) if sources.stays(name)]:
            edits.append((node, _instead(module, node, home[0], where)))
            continue
        if isinstance(node, ast.ImportFrom) and sources.owns(origin := _absolute(module, node)):
            statements, found = _flat_from(node, origin, sources, where)
        elif isinstance(node, ast.Import) and any(sources.owns(alias.name) for alias in node.names):
            statements, found = _flat_import(node, sources, dotted)
        else:
            continue
        needed += found
        before = text[starts[node.lineno - 1] :][: node.col_offset]
        # One statement a line, as transformers looks for them; after other code on the line that cannot be.
        joint = "; " if before.strip() else "\n" + before.decode()
        edits.append((node, joint.join(statements)))
    if dotted:
        edits += _flat_uses(module, dotted)
    return _apply(text, starts, edits), needed


def _imported(module: SourceModule, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full names of all that an import may name: modules, and names in modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = _absolute(module, node)
    return [origin, *(f"{origin}.{alias.name}" for alias in node.names)]


def _instead(module: SourceModule, node: ast.stmt, name: str, where: str) -> str:
    """The statement in place of an import of a module at home."""
    if any(
        node in ast.walk(function) for function in ast.walk(module.tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    ):
        return f'raise ImportError("{name} {_NOT_HERE}")'
    for branch in ast.walk(module.tree):
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test) and node in branch.body:
            return "pass"
    raise RuntimeError(f"{where}: {name} stays at home; import it within a function, or under `if TYPE_CHECKING:`")


def _flat_from(node: ast.ImportFrom, origin: str, sources: _Sources, where: str) -> tuple[list[str], list[str]]:
    if any(alias.name == "*" for alias in node.names):
        raise RuntimeError(f"{where}: `from {origin} import *` cannot be carried; name what is imported")
    names: dict[str, list[str]] = {}
    modules: list[tuple[str, str]] = []
    for alias in node.names:
        target, name = sources.resolve(origin, alias.name, where)
        local = alias.asname or alias.name
        if name is None:
            modules.append((target, local))
        else:
            names.setdefault(target, []).append(name if name == local else f"{name} as {local}")
    statements = [f"from . import {flat_name(target)} as {local}" for target, local in modules]
    statements += [f"from .{flat_name(target)} import {', '.join(given)}" for target, given in names.items()]
    return statements, [*(target for target, _ in modules), *names]


def _flat_import(node: ast.Import, sources: _Sources, dotted: dict[str, str]) -> tuple[list[str], list[str]]:
    """`dotted` collects the modules that are bound by their full names."""
    statements, needed = [], []
    for alias in node.names:
        flat = flat_name(alias.name)
        if not sources.owns(alias.name):
            statements.append(f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else ""))
            continue
        needed.append(alias.name)
        if alias.asname is None:
            dotted[alias.name] = flat
        statements.append(f"from . import {flat}" + (f" as {alias.asname}" if alias.asname else ""))
    return statements, needed


def _flat_uses(module: SourceModule, dotted: dict[str, str]) -> list[_Edit]:
    """`a.b.c.f(x)`, after `import a.b.c`, becomes `a_b_c.f(x)`."""
    tops = {name.split(".")[0] for name in dotted}
    edits: list[_Edit] = []
    done = set()
    for node in ast.walk(module.tree):
        # Outermost first: the longest module name wins.
        if isinstance(node, (ast.Attribute, ast.Name)) and (name := _chain(node)) in dotted:
            top = next(n for n in ast.walk(node) if isinstance(n, ast.Name))
            if id(top) not in done:
                done.add(id(top))
                edits.append((node, dotted[name]))
        elif isinstance(node, ast.Name) and node.id in tops and id(node) not in done:
            raise RuntimeError(f"{module.name}, line {node.lineno}: {node.id} is used otherwise than through {', '.join(dotted)}")
    return edits


def _chain(node: ast.expr) -> str | None:
    """`a.b.c` as text; None for any other expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _line_starts(text: bytes) -> list[int]:
    starts = [0]
    for line in text.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    return starts


def _apply(text: bytes, starts: list[int], edits: list[_Edit]) -> str:
    def span(node: ast.stmt | ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None, "what was parsed from a text has an end"
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    for node, replacement in sorted(edits, key=lambda edit: span(edit[0]), reverse=True):
        begin, end = span(node)
        text = text[:begin] + replacement.encode() + text[end:]
    return text.decode()
