"""The mutants of a Python file: mutmut's operators, less what this project calls text.

mutmut says how a node of the syntax tree is mutated; where it may be, and how the mutant is run, is decided here and in
``mutate_core.py``. (mutmut's own runner copies each function once per mutant and dispatches between the copies. It
leaves out decorated functions, class bodies and constants, which here are half of what matters, and Dynamo would trace
the dispatch.)

Left out, because nothing but a reader's eye depends on it:

    texts        a string with a space in it, a raise statement, the arguments of warn_caller and add_note,
                 description=, what only shows an object (``TEXT_FUNCTIONS``)
    types        annotations, imports, assertions (each is there for the type checker), TYPE_CHECKING, ``__all__``
    decorators   and the variants of a string that differ in case: one mutant of a string is enough
    nothing      a mutant that compiles to the same bytecode, or does not compile
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import CodeType
from typing import Any

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

TEXT_FUNCTIONS = {
    "__repr__",
    "__str__",
    "extra_repr",
    "_settings",
    "show",
    "describe",
    "_warn_fp16",
    "_repr_html_",
    "__rich__",
    "__rich_console__",
    "_parts",
}
_TYPES_ONLY = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Assert)
_TEXT_CALLS = {"warn_caller", "add_note"}


@dataclass(frozen=True)
class Mutant:
    """Bytes ``start`` to ``stop`` of ``file`` become ``text``. ``key`` outlives edits elsewhere in the file."""

    file: str
    function: str
    line: int
    last_line: int
    start: int
    stop: int
    text: str
    before: str
    after: str
    key: str

    def apply(self, source: bytes) -> bytes:
        """The source with the mutation in it."""
        return source[: self.start] + self.text.encode() + source[self.stop :]

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Every mutant of a file, in the order of the text."""
    visitor = _Visitor(file, source)
    MetadataWrapper(cst.parse_module(source)).visit(visitor)
    original = compile(source, file, "exec", dont_inherit=True)
    found: dict[bytes, Mutant] = {}
    seen: dict[str, int] = {}
    for mutant in visitor.found:
        mutated = mutant.apply(source)
        try:
            code = compile(mutated, file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            continue
        if mutated in found or same_bytecode(original, code):
            continue
        name = f"{mutant.file}:{mutant.function}: {mutant.before} -> {mutant.after}"
        seen[name] = seen.get(name, 0) + 1
        key = hashlib.sha1(f"{name} #{seen[name]}".encode()).hexdigest()[:10]
        found[mutated] = Mutant(**(mutant.plain() | {"key": key}))
    return sorted(found.values(), key=lambda m: (m.start, m.stop, m.text))


def same_bytecode(a: CodeType, b: CodeType, deep: bool = True) -> bool:
    """Whether two pieces of code do the same, line numbers aside."""
    mine, theirs = _own(a), _own(b)
    if mine != theirs or len(nested_code(a)) != len(nested_code(b)):
        return False
    return not deep or all(same_bytecode(x, y) for x, y in zip(nested_code(a), nested_code(b), strict=True))


def nested_code(code: CodeType) -> list[CodeType]:
    """The functions, classes and comprehensions inside, in order."""
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def _own(code: CodeType) -> tuple[Any, ...]:
    constants = [(type(c), repr(c)) for c in code.co_consts if not isinstance(c, CodeType)]
    arguments = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code, constants, arguments, names, code.co_exceptiontable


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider, ByteSpanPositionProvider)

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.found: list[Mutant] = []
        self._where: list[str] = []
        self._statements: list[tuple[int, int]] = [(1, 1)]

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_text_or_type(node):
            return False
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self._where.append(node.name.value)
        if isinstance(node, (cst.BaseCompoundStatement, cst.SimpleStatementLine)):
            span = self.get_metadata(PositionProvider, node)
            simple = isinstance(node, cst.SimpleStatementLine)
            self._statements.append((span.start.line, span.end.line if simple else span.start.line))
        for mutated in _mutations(node):
            self.found += self._mutant(node, mutated)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if _is_text_or_type(node):
            return
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self._where.pop()
        if isinstance(node, (cst.BaseCompoundStatement, cst.SimpleStatementLine)):
            self._statements.pop()

    def _mutant(self, node: cst.CSTNode, mutated: cst.CSTNode) -> Iterator[Mutant]:
        span = self.get_metadata(ByteSpanPositionProvider, node, None)
        place = self.get_metadata(PositionProvider, node, None)
        if span is None or place is None or span.length == 0:
            return
        start, stop = span.start, span.start + span.length
        text = cst.Module([]).code_for_node(mutated)
        text = text.strip() if self.source[start:stop].strip() == self.source[start:stop] else text
        first, last = self._statements[-1]
        lines = self.source.decode().splitlines()
        line_start = self.source.rfind(b"\n", 0, start) + 1
        line_stop = self.source.find(b"\n", stop)
        before = b" ".join(self.source[line_start:line_stop].split()).decode()
        after = " ".join((self.source[line_start:start].decode() + text + self.source[stop:line_stop].decode()).split())
        assert first <= len(lines)
        yield Mutant(
            file=self.file,
            function=".".join(self._where) or "module",
            line=min(place.start.line, max(first, place.start.line)),
            last_line=max(last, place.end.line),
            start=start,
            stop=stop,
            text=text,
            before=before,
            after=after,
            key="",
        )


def _mutations(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            for at, mutated in enumerate(operator(node)):
                if isinstance(node, cst.BaseString) and (at > 0 or " " in getattr(node, "value", " ")):
                    return
                yield mutated


def _is_text_or_type(node: cst.CSTNode) -> bool:
    match node:
        case cst.FunctionDef(name=cst.Name(value=name)):
            return name in TEXT_FUNCTIONS
        case cst.Raise() | cst.Expr(value=cst.SimpleString() | cst.ConcatenatedString()):
            return True
        case cst.Call(func=cst.Name(value=name) | cst.Attribute(attr=cst.Name(value=name))):
            return name in _TEXT_CALLS
        case cst.Arg(keyword=cst.Name(value=name)):
            return name == "description"
        case cst.If(test=cst.Name(value="TYPE_CHECKING")):
            return True
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))]):
            return name in ("__all__", "description")
    return isinstance(node, _TYPES_ONLY)
