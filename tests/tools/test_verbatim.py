"""What refq4 prints arrives whole: rich takes brackets for markup and colons for emoji, and drops what it takes."""

from __future__ import annotations

import ast
import importlib
import io
import re
from pathlib import Path

import pytest
import rich.console
import torch
from safetensors.torch import save_file

import refq4
from refq4 import cli, pipeline, registry
from refq4.bench import show
from refq4.checkpoint.convert import CheckpointReport
from refq4.checkpoint.inspection import CheckpointContents, Problem, TensorReport
from refq4.internals import verbatim
from refq4.models.report import LayerReport, QuantizationReport
from refq4.reference import ReferenceBackend
from refq4.testing.cases import Case
from refq4.testing.verification import CheckReport, Failure, Report
from refq4.tools.explain import Comparison, Explanation
from refq4.trace import CallRecord, Decision, OpRecord, StepRecord, Trace

pytestmark = pytest.mark.reference_only("it is about what is printed")

ROOT = Path(__file__).parents[2]
EATEN = "a[cuda]b :smile: [/] [bold]c[/bold] \\[d] [link=x]"  # each piece is something that rich makes something of
WIDE = 3000


def rendered(thing: object) -> list[str]:
    """What a thing looks like as text, as HTML, and in a console of the user's, where ``rich.print`` sends it."""
    theirs = rich.console.Console(file=io.StringIO(), width=WIDE, force_jupyter=False)
    theirs.print(thing)
    if not hasattr(thing, "text"):
        return [theirs.file.getvalue()]
    html = re.sub("<[^>]*>", "", thing._shown(width=WIDE, record=True).export_html(code_format="{code}"))
    return [thing.text(WIDE), html, theirs.file.getvalue()]


def unwrapped(printed: str) -> str:
    """The words of a text, one space apart: a title is as wide as its table."""
    return " ".join(printed.split())


def trace_of(text: str) -> Trace:
    made = Trace()
    op = OpRecord(text, text, text, text, [(text, text)], 1.0)
    made.calls.append(CallRecord(text, [StepRecord(1, text, text, text, text, 1.0, [op])]))
    return made


def comparison_of(text: str) -> Comparison:
    other = f"{text}2"
    made = Comparison([text, other, f"{text}3", "broken"], errors={"broken": text})
    made.traces = {text: trace_of(text), other: trace_of(text), f"{text}3": Trace()}
    made.results = {name: torch.ones(1) for name in made.traces}
    made.first_difference[other] = (0, 0)
    return made


def verified(text: str) -> Report:
    counts = CheckReport(text, differs=1)
    counts.known[text] += 1
    counts.refused[text] += 1
    failure = Failure(Case("gemv_4bit"), Case("gemv_4bit"), text, text, text, text)
    return Report(text, text, "quick", [counts, CheckReport(text)], [failure], 1.0)


def thread_trace_of(text: str) -> object:
    tracing = pytest.importorskip("refq4_cuda.emulator.tracing", reason="refq4_cuda is missing: pip install -e .")
    return tracing.ThreadTrace(text, [tracing.Line(1, text, text, text, text)])


REPORTS = {  # how to make one, and how often it shows the text
    "trace": (trace_of, 11),
    "explanation": (lambda text: Explanation(trace_of(text), 0.0, 0.0, 0.0, 0.0, {text: 1}, 1), 12),
    "comparison": (comparison_of, 14),
    "quantisation": (lambda text: QuantizationReport([LayerReport(text, (1, 1), 4.5, 0.1)], {text: text}), 3),
    "checkpoint": (lambda text: CheckpointReport(left={text: text}, left_out=[text]), 3),
    "contents": (
        lambda text: CheckpointContents(text, text, [TensorReport(text, text, (1,), 8.0, 1)], [Problem(text, text)]),
        6,
    ),
    "verify": (verified, 10),
    "thread": (thread_trace_of, 5),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_shows_every_text_in_it_whole_wherever_it_is_printed(name):
    make, times = REPORTS[name]
    for shown in rendered(make(EATEN)):
        shown = shown.replace("&quot;", '"').replace("&#x27;", "'")
        assert shown.count(EATEN) == times, shown


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_passes_no_control_characters_on_to_the_terminal(name):
    make, _ = REPORTS[name]
    for shown in rendered(make("a\x1b[31m\x07\udcffb")):
        assert "a\\x1b[31m\\x07\\udcffb" in shown
        shown.encode()


def benches(text: str) -> list[object]:
    row = {"n": 1, "k": 1, "m": 1, "dtype": text, "layers": 1, "missing": {text: text}}
    on_cpu, on_gpu = row | {"ms": {"refq4": 1.0, text: 1.0}}, row | {"ms": {text: {"refq4": 1.0, text: 1.0}}}
    return [
        show.describe({"machine": {text: text, "backend": "cpu"}, "limits": {}}),
        show.product_table([on_cpu], 1, 1, {}),
        show.ops_table({text: {"refq4": 1.0, text: 1.0}}, 1, 1),
        show.gpu_table([on_gpu], 1, 1, {"copy_gb_s": 1.0}),
        show.gpu_ops_table({text: {"bytes": 1, text: 1.0}}, {"copy_gb_s": 1.0}),
    ]


def test_what_the_bench_prints_is_whole(capsys, monkeypatch):
    command = importlib.import_module("refq4.bench.command")
    monkeypatch.setattr(command, "console", lambda **_: verbatim.Console(width=WIDE))
    for thing, times in zip(benches(EATEN), (2, 4, 2, 6, 2), strict=True):
        monkeypatch.setattr(command, "_measured", lambda asked, console, thing=thing: console.print(thing))
        assert cli.main(["bench"]) == 0
        assert unwrapped(capsys.readouterr().out).count(EATEN) == times


class Broken(ReferenceBackend):
    name = "broken"
    reason: str | None = EATEN

    def available(self) -> str | None:
        return self.reason

    def info(self) -> dict[str, object]:
        return super().info() | {"description": EATEN}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refq4.internals.verbatim.PIPED_WIDTH", WIDE)


def test_info_shows_reasons_and_what_backends_say_of_themselves_whole(capsys, wide, monkeypatch):
    refq4.register_backend(Broken())
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, EATEN)
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"no: {EATEN}" in said
    assert f"{registry.ENVIRONMENT_VARIABLE:<22} {EATEN}" in said


def test_the_tour_and_inspect_show_names_of_tensors_and_files_whole(tmp_path, capsys, wide):
    file = tmp_path / f"{EATEN.replace('/', '-')}.safetensors"
    save_file({f"{EATEN}.1.weight": torch.randn(64, 64), f"{EATEN}.2.weight": torch.randn(64, 64)}, file)
    for command in ("tour", "inspect"):
        assert cli.main([command, str(file)]) == 0
        said = unwrapped(capsys.readouterr().out)
        assert file.name in said
        assert EATEN in said.replace(file.name, "")


def test_the_errors_of_the_command_line_are_whole(tmp_path, capsys):
    (tmp_path / "[cuda]:smile:").write_bytes(b"nothing")
    for command in (["inspect"], ["tour"], ["verify", "--backend"], ["explain", "64x64", "--backend"]):
        assert cli.main([*command, str(tmp_path / "[cuda]:smile:")]) == 1
        assert "[cuda]:smile:" in capsys.readouterr().err


# --- each message -----------------------------------------------------------------------------------------------------


def literals() -> list[str]:
    """Every string of the source that could be a message, the places for values filled with brackets."""
    found = []
    for file in [*(ROOT / "refq4").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "[x]" for p in node.values))
    return sorted({text for text in found if re.search(r"\[|:\w+:|\\", text)})


def test_each_message_of_the_source_is_shown_whole_by_the_console_a_cell_and_a_title():
    messages = literals()
    assert any("[cuda]" in text for text in messages)
    assert len(messages) > 200
    for text in messages:
        made, console = trace_of(text), verbatim.Console(file=io.StringIO(), width=WIDE)
        console.print(text)
        for shown in (console.file.getvalue(), made.text(WIDE)):
            packed = "".join(shown.split())
            for line in verbatim.visible(text).split("\n"):
                assert "".join(line.split()) in packed, text


@pytest.mark.parametrize("name", refq4.list_backends())
def test_why_a_backend_is_not_available_stands_in_info_as_the_backend_says_it(name, capsys, wide):
    reason = refq4.backend_info(name).get("reason")
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert name in said
    assert reason is None or " ".join(reason.split()) in " ".join(said.split())


def test_every_decision_of_the_pipeline_is_shown_whole():
    decisions = [value for value in vars(pipeline).values() if isinstance(value, Decision)]
    assert len(decisions) > 10
    for decision in decisions:
        made = Trace()
        made.begin("a call")(1, None, decision)
        assert f"{decision.choice} " in made.text(WIDE)
        assert decision.why in made.text(WIDE)


# --- and it stays so --------------------------------------------------------------------------------------------------


def test_only_one_file_makes_consoles_and_nothing_else_takes_text_for_markup():
    """Strings that reach another console are markup again, so rich's own names for that are for one file."""
    allowed = {"Table", "Text"}  # they show strings as the console does that draws them
    wrong = []
    files = [*(ROOT / "refq4").rglob("*.py"), *(ROOT / "backends").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    for file in files:
        tree = ast.parse(file.read_text())
        types = {id(n) for block in ast.walk(tree) if is_for_types(block) for n in ast.walk(block)}
        for node in ast.walk(tree):
            names: set[str] = set()
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rich" and not node.level:
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names if alias.name.split(".")[0] == "rich"}
            elif isinstance(node, ast.Attribute):
                names = {node.attr} & {"from_markup"}
            if names - allowed and id(node) not in types and file.name != "verbatim.py":
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} uses {sorted(names - allowed)}")
    assert not wrong, "\n".join(wrong)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
