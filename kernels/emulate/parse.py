"""PTX as Triton writes it, read into instructions.

One entry function a module; inline assembly stands among the rest, in scopes whose registers are declared anew each time, with the
same names and types. Comments behind `.loc` directives name the line of the kernel's source that what follows comes from.
"""

import re
from dataclasses import dataclass
from functools import cached_property

_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,()]*?\s(\w+)\s*$")
_REGISTERS = re.compile(r"(%?\w+)(?:<(\d+)>)?$")
_LABEL = re.compile(r"([$%\w]+):(?!:)")
_GUARDED = re.compile(r"@(!?)(%?\w+)\s+(.*)", re.S)
# Of a body, what says nothing about what it computes.
_IGNORED = (".loc", ".file", ".pragma")


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: the predicate's register that it depends on, negated: whether on its being false."""

    text: str
    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    source: str
    """line of the kernel's source, "" where it is not known"""

    @cached_property
    def parts(self) -> list[str]:
        """The opcode's: `add`, then modifiers, then types."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        return f"`{self.text}`" + (f" ({self.source})" if self.source else "")


@dataclass(frozen=True)
class Program:
    """One kernel. parameters: types by name, in order; registers: types by name; labels: the instruction that follows each."""

    name: str
    num_threads: int
    parameters: dict[str, str]
    registers: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Raises ValueError where there is not one entry function, or one without a fixed number of threads."""
    entries = list(re.finditer(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx))
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} entry functions in this PTX; one is emulated at a time")
    name, parameters, directives = entries[0].groups()
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1\s*,\s*1)?\s*$", directives.strip(), re.M)
    if threads is None:
        raise ValueError(f"{name} has no .reqntid of one dimension: {directives.strip()!r}")
    registers: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = text = ""
    depth = 1
    for line in ptx[entries[0].end() :].splitlines():
        code, _, comment = line.partition("//")
        if code.strip().startswith(_IGNORED):
            if code.strip().startswith(".loc"):
                source = comment.strip()
            continue
        code = code.strip()
        while code:
            if not text:
                if label := _LABEL.match(code):
                    labels[label[1]] = len(instructions)
                    code = code[label.end() :].lstrip()
                    continue
                # A brace where no instruction has begun is a scope's.
                if code[0] in "{}":
                    depth += 1 if code[0] == "{" else -1
                    code = code[1:].lstrip()
                    if depth == 0:
                        return Program(name, int(threads[1]), _parameters(parameters), registers, tuple(instructions), labels)
                    continue
            statement, ends, code = code.partition(";")
            text, code = text + statement + " ", code.lstrip()
            if not ends:
                continue
            if text.startswith(".reg"):
                _declare(text, registers)
            elif text.strip():
                instructions.append(_instruction(text, source))
            text = ""
    raise ValueError(f"the body of {name} does not end")


def _parameters(text: str) -> dict[str, str]:
    found = {}
    for parameter in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.search(parameter)
        if match is None:
            raise ValueError(f"a parameter that is not emulated: {parameter!r}")
        found[match[2]] = match[1]
    return found


def _declare(statement: str, registers: dict[str, str]) -> None:
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()  # type: ignore[union-attr]  # the compiler's own
    for given in names.split(","):
        name, count = _REGISTERS.match(given.strip()).groups()  # type: ignore[union-attr]
        for each in [name] if count is None else [f"{name}{i}" for i in range(int(count))]:
            if registers.setdefault(each, kind) != kind:
                raise ValueError(f"register {each} is declared as .{registers[each]} and as .{kind}; one of them is emulated")


def _instruction(statement: str, source: str) -> Instruction:
    text, guard, negated = " ".join(statement.split()), None, False
    if guarded := _GUARDED.match(statement):
        negated, guard, statement = bool(guarded[1]), guarded[2], guarded[3]
    opcode, _, rest = " ".join(statement.split()).partition(" ")
    return Instruction(text, opcode, tuple(split(rest)), guard, negated, source)


def split(operands: str) -> list[str]:
    """At commas outside of braces and brackets."""
    found, depth, current = [], 0, ""
    for character in operands:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return found + ([current.strip()] if current.strip() else [])


def elements(operand: str) -> list[str]:
    """Of a vector `{a, b}`, or the operand itself."""
    return split(operand[1:-1]) if operand.startswith("{") else [operand]
