"""The mutants of C and CUDA sources: one operator, constant, operand or instruction changed at a time.

    operators      + <-> -   * -> +   / -> *   % -> /   < <-> <=   > <-> >=   == <-> !=   && <-> ||
                   << <-> >>   & <-> |   ^ -> |   += <-> -=   |= -> &=   a dropped ! or unary -
    constants      1 -> 2, 1 -> 0; 0x0F -> 0x10, 0x0E; 0.5f -> 1.5f
    conditions     if (c) -> if (1), if (0);  c ? a : b -> c ? b : a;  min(a, b), max(a, b) -> a, b
    instructions   lo <-> hi, min <-> max, add <-> sub, fmadd -> fnmadd, srl <-> sll, packs <-> packus, GT -> GE,
                   hadd -> hsub, and -> or, fmaf(a, b, c) -> fmaf(-a, b, c), nearest -> towards zero

Source text is enough for that: comments, strings, preprocessor lines and declarations are masked first. What is left
out is not arithmetic, and no result depends on it:

    tuning         enum lines, choose_run, how many threads a product gets, prefetching, streaming stores, large pages,
                   barriers to the optimiser (KEEP_IN_REGISTERS), the sizes of scratch memory and of
                   arrays (the guard pages and sanitizers are about those)
    files          threads.c, limits.c, cpu_features.c; library.c, which hands arguments on
    loop steps     ++ and the sign of a loop's step: such a mutant only runs away
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from mutate_core_mutants import Mutant

_BINARY = {
    "+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=",
    "!=": "==", "&&": "||", "||": "&&", "<<": ">>", ">>": "<<", "&": "|", "|": "&", "^": "|", "+=": "-=", "-=": "+=",
    "|=": "&=",
}  # fmt: skip
_NAMES = {
    "unpacklo": "unpackhi", "unpackhi": "unpacklo", "_min_": "_max_", "_max_": "_min_", "_add_": "_sub_",
    "_sub_": "_add_", "fmadd": "fnmadd", "_srli_": "_slli_", "_slli_": "_srli_", "srlv": "sllv", "packs_": "packus_",
    "packus_": "packs_", "_CMP_GT_OQ": "_CMP_GE_OQ", "hadd": "hsub", "_and_si": "_or_si", "fminf": "fmaxf",
    "fmaxf": "fminf", "__fadd_rn": "__fsub_rn", "cvt.rn.": "cvt.rz.", "__shfl_xor_sync": "__shfl_up_sync",
}  # fmt: skip
_TOKEN = re.compile(
    r"(?P<name>[A-Za-z_]\w*)|(?P<number>0[xX][0-9a-fA-F]+[uUlL]*|(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?[fFuUlL]*)"
    r"|(?P<op><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||\+=|-=|\*=|/=|%=|&=|\|=|\^=|[-+*/%<>&|^!~?:;,.(){}\[\]=])"
)
_TYPES = {
    "void", "char", "int", "float", "double", "unsigned", "long", "short", "const", "static", "inline",
    "struct", "typedef", "sizeof", "extern", "template", "typename", "enum", "dtype", "int64_t", "int32_t",
    "uint64_t", "uint32_t", "uint16_t", "uint8_t", "intptr_t", "size_t", "i64", "u64", "u32", "u16", "u8", "T",
    "uint2", "uint4", "float4", "__m256", "__m256i", "__m128", "__m128i", "__m256d", "Weight", "Product",
    "Plan", "Quantize", "Dequantize", "Scales", "Cell", "Tables", "Stream", "RawScales", "BlockedPlan",
    "ScalarPlan", "Decoded", "ByteTable", "ProductArguments", "QuantizeArguments", "DequantizeArguments",
    "ProductFn", "WorkFn", "Engine", "TileKernel", "GemvPlanAvx2", "CodeRegistersAvx2",
}  # fmt: skip
_TUNING = re.compile(
    r"^\s*(?:enum\b|typedef\b|template\b|KERNEL|DYNAMIC_SHARED|case\b|_Pragma|static const \w+ \w+\[.*\{NULL)|"
    r"prefetch|p->threads|q->threads|d->threads|threads > 1|STREAM_BYTES|ask_for_large_pages|"
    r"scratch\(|KEEP_IN_REGISTERS|^\s*\"\+x\"\(|_Alignas\(\d+\) float sums"
)
_TUNING_FUNCTIONS = {"choose_run", "ask_for_large_pages", "scratch"}


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of a C or CUDA file, in the order of the text."""
    masked = mask(source)
    found: dict[str, Mutant] = {}
    seen: dict[str, int] = {}
    functions = function_of_lines(masked)
    for start, stop, text in _edits(masked):
        line = source.count("\n", 0, start) + 1
        begin, end = source.rfind("\n", 0, start) + 1, source.find("\n", stop)
        whole = source[begin:end]
        function = functions.get(line, "file")
        if _TUNING.search(whole) or function in _TUNING_FUNCTIONS:
            continue
        mutated = source[:start] + text + source[stop:]
        before = " ".join(whole.split())
        after = " ".join((source[begin:start] + text + source[stop:end]).split())
        if mutated in found or before == after:
            continue
        name = f"{file}:{function}: {before} -> {after}"
        seen[name] = seen.get(name, 0) + 1
        key = hashlib.sha1(f"{name} #{seen[name]}".encode()).hexdigest()[:10]
        first = len(source[:start].encode())
        found[mutated] = Mutant(
            file, function, line, line, first, first + len(source[start:stop].encode()), text, before, after, key
        )
    return list(found.values())


def mask(source: str) -> str:
    """The source with comments, strings, characters and preprocessor lines blanked, position by position."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    source = re.sub(r"/\*.*?\*/|//[^\n]*|'(?:\\.|[^'\\])'", blank, source, flags=re.DOTALL)
    source = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, source, flags=re.MULTILINE)
    return re.sub(r'"(?:\\.|[^"\\])*"', blank, source)


def function_of_lines(masked: str) -> dict[int, str]:
    """The function around each line."""
    inside: dict[int, str] = {}
    depth, name = 0, "file"
    for number, line in enumerate(masked.splitlines(), 1):
        if depth == 0:
            match = re.search(r"KERNEL\w*\((\w+)|\b(\w+)\s*\(", line)
            if match and not line.startswith((" ", "}", "typedef")):
                name = match.group(1) or match.group(2)
        inside[number] = name
        depth += line.count("{") - line.count("}")
    return inside


def _edits(text: str) -> Iterator[tuple[int, int, str]]:
    tokens = [(m.lastgroup, m.group(), m.start(), m.end()) for m in _TOKEN.finditer(text)]
    for at, (kind, token, start, stop) in enumerate(tokens):
        before = tokens[at - 1] if at else (None, ";", 0, 0)
        after = tokens[at + 1] if at + 1 < len(tokens) else (None, ";", 0, 0)
        operand = before[0] == "number" or (before[0] == "name" and before[1] not in _TYPES | {"return"})
        operand = operand or before[1] in (")", "]")
        if kind == "number" and before[1] not in (".", "->") and not _is_declared_size(text, start):
            yield from ((start, stop, new) for new in _numbers(token))
        elif kind == "op" and token in _BINARY and operand:
            if token in ("*", "&") and (_is_cast(tokens, at - 1) or _is_declaration(tokens, at)):
                continue
            if token in ("+=", "-=") and _in_for_header(text, start):
                continue
            yield start, stop, _BINARY[token]
        elif (kind == "op" and token == "!") or (token == "-" and not operand and after[0] in ("name", "number")):
            yield start, stop, " "
        elif kind == "name" and token == "if" and after[1] == "(":
            closing = _closing(text, after[2])
            yield after[2], closing, "(1)"
            yield after[2], closing, "(0)"
        elif kind == "name" and token in ("min", "max", "min64", "fminf", "fmaxf") and after[1] == "(":
            closing = _closing(text, after[2])
            arguments = _split(text[after[2] + 1 : closing - 1])
            if len(arguments) == 2 and before[1] != "int64_t":
                yield from ((start, closing, f"({argument.strip()})") for argument in arguments)
        elif kind == "name" and token == "fmaf" and after[1] == "(":
            closing = _closing(text, after[2])
            a, b, c = (part.strip() for part in _split(text[after[2] + 1 : closing - 1]))
            yield start, closing, f"fmaf(-({a}), {b}, {c})"
        elif kind == "op" and token == "?":
            yield from _swapped_arms(text, stop)
        if kind == "name":
            yield from ((start, stop, token.replace(old, new)) for old, new in _NAMES.items() if old in token)


def _numbers(token: str) -> Iterator[str]:
    digits = re.match(r"0[xX][0-9a-fA-F]+|[\d.]+(?:[eE][-+]?\d+)?", token)
    assert digits is not None
    suffix = token[digits.end() :]
    if "." in digits.group() or ("e" in digits.group().lower() and not digits.group().lower().startswith("0x")):
        if float(digits.group()) + 1 != float(digits.group()):
            yield f"{float(digits.group()) + 1}{suffix}"
        return
    value = int(digits.group(), 0)
    show = hex if digits.group().lower().startswith("0x") else str
    yield f"{show(value + 1)}{suffix}"
    if value > 0:
        yield f"{show(value - 1)}{suffix}"


def _swapped_arms(text: str, start: int) -> Iterator[tuple[int, int, str]]:
    """``a : b`` after a question mark, up to the end of the expression."""
    depth, colon, at = 0, -1, start
    while at < len(text):
        c = text[at]
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        if depth < 0 or (depth == 0 and c in ";,"):
            break
        if depth == 0 and c == "?":
            return  # a chain: the inner one is found by itself
        if depth == 0 and c == ":" and colon < 0:
            colon = at
        at += 1
    if colon > 0:
        yield start, at, f" ({text[colon + 1 : at].strip()}) : ({text[start:colon].strip()})"


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    return len(text)


def _split(arguments: str) -> list[str]:
    parts, depth = [""], 0
    for c in arguments:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _is_cast(tokens: list[tuple[str | None, str, int, int]], at: int) -> bool:
    """Whether the ``)`` at this place ends a cast, after which * and & take one operand."""
    if tokens[at][1] != ")":
        return False
    inner = at - 1
    while inner >= 0 and (tokens[inner][1] in ("*", "&") or tokens[inner][1] in _TYPES):
        inner -= 1
    return tokens[inner][1] == "(" and inner < at - 1


def _is_declaration(tokens: list[tuple[str | None, str, int, int]], at: int) -> bool:
    """``type *name``, and ``*name`` after the comma of such a declaration: a name and a star with no space behind."""
    return tokens[at - 1][1] in _TYPES or (tokens[at + 1][2] == tokens[at][3] and tokens[at - 1][3] != tokens[at][2])


def _is_declared_size(text: str, start: int) -> bool:
    """Sizes in declarations of arrays: a larger one changes nothing, a smaller one is undefined."""
    begin = text.rfind("\n", 0, start) + 1
    declared = re.match(r"\s*(?:static |const |_Alignas\(\d+\) )*(?:[A-Za-z_]\w* )+\*?\w+(?:\[[^]=]*\])+", text[begin:])
    return declared is not None and start < begin + declared.end()


def _in_for_header(text: str, start: int) -> bool:
    begin = text.rfind("for (", 0, start)
    return begin >= 0 and _closing(text, begin + 4) > start
