"""The differential kit finds what is wrong, shrinks it and says why; and finds nothing where nothing is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from loopback import Loopback

import refq4
import refq4.functional as F
from refq4 import cli, layout
from refq4.backend import Backend, PackedWeight
from refq4.reference import ReferenceBackend
from refq4.testing import CHECKS, Case, catalogue, check, error_budget, oracle, shrink, verify
from refq4.testing.cases import ACTIVATIONS, DEPTHS, WEIGHTS, simpler
from refq4.testing.diagnose import diagnose_product, diagnose_quantised
from refq4.testing.verification import Failure

pytestmark = pytest.mark.reference_only("the kit is tested on backends with planted bugs")


SLOW = pytest.mark.slow


class Buggy(ReferenceBackend):
    """The reference with one bug, planted by name."""

    name = "buggy"

    def __init__(self, bug: str) -> None:
        self.bug = bug

    def quantize_4bit(self, A, code, blocksize):
        if self.bug == "x >= threshold":
            code = code._replace(thresholds=code.thresholds.nextafter(torch.tensor(-9.0)))
        packed, absmax = super().quantize_4bit(A, code, blocksize)
        if self.bug in ("divides", "overflows"):
            scales = absmax.repeat_interleave(blocksize)[: A.numel()]
            x = A.reshape(-1).float()
            scaled = x / scales if self.bug == "divides" else x * (1 / scales)
            scaled = scaled.nan_to_num(0.0 if self.bug == "divides" else -1.0).clamp(-1, 1)
            packed = layout.pack(code.order[torch.bucketize(scaled, code.thresholds)], code.zero_code())
        if self.bug == "low nibble first":
            packed = (packed << 4) | (packed >> 4)
        if self.bug == "absmax without abs":
            absmax = torch.stack([block.max().float() for block in A.reshape(-1).split(blocksize)])
        if self.bug == "padding":
            packed = packed.clone()
            packed[-1] &= 0xF0 if A.numel() % 2 else 0xFF
        return packed, absmax

    def quantize_blockwise(self, A, code, blocksize):
        q, absmax = super().quantize_blockwise(A, code, blocksize)
        return (q.clamp(max=254) if self.bug == "top 8-bit code lost" else q), absmax

    def dequantize_4bit(self, weight, dtype):
        if self.bug == "rounded twice" and dtype != torch.float32:
            return super().dequantize_4bit(weight, torch.float16).to(dtype)
        return super().dequantize_4bit(self.damaged(weight), dtype)

    def dequantize_blockwise(self, q, absmax, code, blocksize, dtype):
        out = super().dequantize_blockwise(q, absmax, code, blocksize, dtype)
        return out * (1 + 2**-20) if self.bug == "8-bit decoding off by a little" else out

    def gemm_4bit(self, x, weight, bias):
        if self.bug == "bias forgotten":
            bias = None
        if self.bug == "writes to x":
            x.view(-1)[0] += 1
        if self.bug == "sums in bf16":
            terms = x.unsqueeze(1).bfloat16() * super().dequantize_4bit(weight, torch.bfloat16)
            return terms.sum(-1).to(x.dtype) + (0 if bias is None else bias)
        if self.bug == "tail left out" and x.shape[1] > 16:
            keep = x.shape[1] // 16 * 16
            return torch.nn.functional.linear(x[:, :keep], self.dequantize_4bit(weight, x.dtype)[:, :keep], bias)
        if self.bug == "NaN":
            return super().gemm_4bit(x, weight, bias) * float("nan")
        return ReferenceBackend().gemm_4bit(x, self.damaged(weight), bias)

    def damaged(self, weight: PackedWeight) -> PackedWeight:
        if self.bug == "nibbles swapped":
            return weight._replace(packed=(weight.packed << 4) | (weight.packed >> 4))
        if self.bug == "offset forgotten" and weight.nested is not None:
            return weight._replace(nested=weight.nested._replace(offset=torch.zeros(())))
        if self.bug == "first scale for all":
            return weight._replace(absmax=weight.absmax[:1].expand(len(weight.absmax)).contiguous())
        return weight


# bug -> a check that must find it, and words that must be in its message
BUGS = {
    "x >= threshold": ("quantize_4bit", "wrong codes"),
    "divides": ("quantize_4bit", "x is divided by absmax instead of multiplied by 1 / absmax"),
    "overflows": ("quantize_4bit", "a 1 / absmax that overflows is not replaced by 0"),
    "low nibble first": ("quantize_4bit", "the first element goes to the low nibble"),
    "absmax without abs": ("quantize_4bit", "absmax: "),
    "padding": ("quantize_4bit", "the spare low nibble of the last byte must hold the code of 0.0"),
    "top 8-bit code lost": ("quantize_blockwise", "8-bit codes"),
    "8-bit decoding off by a little": ("dequantize_blockwise", "decoded values"),
    "rounded twice": ("dequantize_4bit", "decoded weight"),
    "nibbles swapped": ("gemm_4bit", "the two nibbles of each byte are swapped"),
    "offset forgotten": ("gemv_4bit", "the offset of the nested scales is not added"),
    "first scale for all": ("gemm_4bit", "scale"),
    "bias forgotten": ("forward", "the bias is not added"),
    "writes to x": ("forward", ""),
    "sums in bf16": ("gemm_4bit", "allowed"),
    "tail left out": ("gemv_4bit", "the last K % 16 elements of each row are left out"),
    "NaN": ("gemm_4bit", "got nan"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_shrunk_and_explained(bug):
    name, words = BUGS[bug]
    refq4.register_backend(Buggy(bug))
    report = verify("buggy", checks=(name,), progress=False)
    assert not report.agrees
    (failure,) = report.failures
    if CHECKS[name].sums and bug != "writes to x":
        assert report.checks[0].error > 1, "the worst error is that of a case that fails"
        json.dumps(report.to_dict(), allow_nan=False)
    assert words in f"{failure.message}\n{failure.hint}"
    assert all(
        size(c) >= size(failure.smallest) or check(c, "buggy").status != "differs" for c in simpler(failure.smallest)
    )
    scope: dict[str, object] = {}
    exec(failure.snippet().replace("print(", "seen = (", 1), scope)  # the snippet shows the same difference
    assert scope["seen"].message == failure.message


def test_the_budget_of_a_single_output_does_not_hang_on_how_its_weight_happens_to_round():
    """Constant activations, and a bias that leaves next to nothing: the reference errs by rounding its weight."""
    errors, allowed = [], []
    for seed in range(30):
        B, state = F.quantize_4bit(torch.randn(1, 256, generator=torch.Generator().manual_seed(seed)), quant_type="nf4")
        x = torch.ones(2, 256, dtype=torch.bfloat16)
        budget = error_budget(x, B, state, -oracle(x, B, state)[0].bfloat16())
        errors.append(float((budget.reference.double() - budget.oracle)[0, 0]))
        allowed.append(float(budget.allowed.min()))
    typical = torch.tensor(errors).square().mean().sqrt()
    assert min(map(abs, errors)) < typical / 10  # one is nearly exact, by chance
    assert min(allowed) > typical


def sequential(terms):
    return sum(terms.unbind(-1), torch.zeros(()))


def in_pairs(terms):
    while terms.shape[-1] > 1:
        terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2))
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]


def by_sixteens(terms):
    return torch.nn.functional.pad(terms, (0, -terms.shape[-1] % 16)).unflatten(-1, (-1, 16))


SUMS = {
    "numpy": lambda x, W: torch.from_numpy(x.numpy() @ W.numpy().T),
    "upwards": lambda x, W: sequential(x[:, None] * W),
    "downwards": lambda x, W: sequential((x[:, None] * W).flip(-1)),
    "pairs": lambda x, W: in_pairs(x[:, None] * W),
    "blocks of 16": lambda x, W: sequential(sequential(by_sixteens(x[:, None] * W))),
    "16 lanes": lambda x, W: sequential(sequential(by_sixteens(x[:, None] * W).mT)),
}
FP4_ROWS = [Case("gemv_4bit", n=2, k=512, code="fp4", blocksize=32, seed=seed) for seed in (706, 378, 600, 542)]
SMALL = [
    replace(case, dtype="float32", n=min(case.n, 3), m=min(case.m, 3))
    for case in catalogue(("gemv_4bit", "gemm_4bit"), "deep")
]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(FP4_ROWS + SMALL[:: len(SMALL) // 40], id="some"),
        pytest.param([replace(c, seed=s) for c in FP4_ROWS[:1] + SMALL for s in (1, 2, 3)], id="swept", marks=SLOW),
    ],
)
def test_a_plain_fp32_sum_in_any_order_keeps_the_budget_of_a_few_outputs(cases):
    for case in cases:
        W, x, bias = case.operands()
        B, state = F.quantize_4bit(W, **case.settings(), backend="reference")
        budget, decoded = error_budget(x, B, state, bias), F.dequantize_4bit(B, state, backend="reference")
        for order, product in SUMS.items():
            y = product(x.contiguous(), decoded)
            budget.check(y if bias is None else y + bias, f"{case!r}, {order}")


def test_a_bug_that_changes_nothing_in_a_case_is_not_named():
    """K is a multiple of the blocksize, so counting blocks anew in each row gives the right product."""
    W, x, _ = FP4_ROWS[0].operands()
    B, state = F.quantize_4bit(W, **FP4_ROWS[0].settings(), backend="reference")
    budget = error_budget(x, B, state)

    def hint(share):
        return diagnose_product((budget.oracle + share * budget.allowed).float(), budget, x, B, state, None)

    assert re.fullmatch(r"no known bug gives this; at 1\.[56]\d of what is allowed, look at roundings .*", hint(1.55))
    assert hint(5) == ""


def test_a_block_whose_reciprocal_overflows_is_shown_as_the_rule_scales_it():
    W = torch.tensor([1e-39, -1e-39])
    rule = refq4.functional.quantize_4bit(W, quant_type="nf4", backend="reference")[0].view(-1)
    where, hint = diagnose_quantised(torch.tensor([0xF0], dtype=torch.uint8), rule, W, W.abs().amax(0, True), TINY)
    assert "1 / absmax overflows, so the scaled value is 0; got code 15 (1), expected 7 (0)" in where
    assert "x * (1 / absmax)" not in where
    assert "x is divided by absmax" in hint
    third = torch.tensor([1.0, 3.0])
    where, hint = diagnose_quantised(
        torch.tensor([0xFF], dtype=torch.uint8), torch.tensor([0xCF], dtype=torch.uint8), third, third[1:], TINY
    )
    assert f"x * (1 / absmax) = {float(third[0] * (1 / third[1])):.9g};" in where
    assert hint == ""


TINY = Case("quantize_4bit", k=2, weights="tiny")


def size(case: Case) -> int:
    return case.m * case.n * case.k


def test_small_bugs_shrink_to_small_inputs():
    refq4.register_backend(Buggy("nibbles swapped"))
    (failure,) = verify("buggy", checks=("gemm_4bit",), progress=False).failures
    assert failure.smallest == Case("gemm_4bit", k=1, blocksize=32, weights="ramp", activations="ones")
    refq4.register_backend(Buggy("tail left out"), replace=True)
    (failure,) = verify("buggy", checks=("gemm_4bit",), progress=False).failures
    assert (failure.smallest.m, failure.smallest.n, failure.smallest.k) == (1, 1, 17)


@pytest.mark.parametrize("own", [False, True], ids=["canonical layout", "own layout"])
def test_a_right_backend_agrees_on_everything(own):
    refq4.register_backend(Loopback(own_layout=own))
    report = verify("loopback", depth="quick", progress=False)
    assert report.agrees
    assert report.cases == (len(CHECKS) - (not own)) * DEPTHS["quick"]
    assert "loopback agrees with reference" in str(report)


def test_an_own_layout_that_does_not_come_back_is_found():
    class Forgetful(Loopback):
        def restore_weight(self, prepared):
            return super().restore_weight(prepared)._replace(packed=torch.zeros(32, dtype=torch.uint8))

        def _canonical(self, weight):
            return Loopback.restore_weight(self, weight) if not isinstance(weight, PackedWeight) else weight

    refq4.register_backend(Forgetful(own_layout=True))
    message = check(Case("own layout"), "loopback").message
    assert "packed bytes after prepare and restore" in message


def test_a_result_of_another_backend_does_not_count():
    class Borrower(ReferenceBackend):
        name = "borrower"

        def gemm_4bit(self, x, weight, bias):
            return refq4.internals.dispatch.product("gemm_4bit", x, weight, bias, "reference")

    refq4.register_backend(Borrower())
    outcome = check(Case("gemm_4bit"), "borrower")
    assert outcome.status == "differs"
    assert "asked 'borrower', but ['borrower', 'reference'] computed" in outcome.message


def test_a_crash_is_a_difference_and_a_refusal_is_not():
    class Moody(ReferenceBackend):
        name = "moody"

        def can_run(self, call):
            return "no double quantisation here" if call.nested else None

        def gemm_4bit(self, x, weight, bias):
            raise ZeroDivisionError("oh")

    refq4.register_backend(Moody())
    outcome = check(Case("gemm_4bit"), "moody")
    assert (outcome.status, outcome.message) == ("differs", "raised ZeroDivisionError: oh")
    report = verify("moody", depth="quick", checks=("dequantize_4bit", "gemm_4bit"), progress=False)
    assert report.checks[0].differs == 0
    assert report.checks[0].refused["no double quantisation here"] > 0
    assert "times: no double quantisation here" in str(report)
    assert not report.agrees


def test_the_last_line_says_how_many_checks_were_refused_and_a_refusal_after_can_run_had_accepted_is_a_difference():
    R = ReferenceBackend

    class Decodes(Backend):
        name = "decodes"
        dequantize_4bit, dequantize_blockwise = R.dequantize_4bit, R.dequantize_blockwise

    class Promises(Decodes):
        name = "promises"

        def can_run(self, call):
            return None

    refq4.register_backend(Decodes())
    refq4.register_backend(Promises())
    asked = {"depth": "quick", "checks": ("quantize_4bit", "dequantize_4bit"), "progress": False}
    honest, promised = str(verify("decodes", **asked)), str(verify("promises", **asked))
    assert honest.endswith("decodes agrees with reference in 1 of 2 checks; it refused all cases of the others\n")
    assert promised.endswith("promises DIFFERS from reference in 1 of 2 checks\n")
    assert cli.main(["verify", "--backend", "promises", "--quick", "--check", "quantize_4bit"]) == 1
    assert "40 times: it has no quantize_4bit\n" in honest
    reason = "backend 'promises' has no quantize_4bit; its can_run must say so (can_run had accepted the call, so"
    assert reason in promised


def test_the_last_line_counts_the_checks_that_differ_among_those_that_ran():
    class Half(Backend):
        name = "half"
        dequantize_blockwise = ReferenceBackend.dequantize_blockwise

        def dequantize_4bit(self, weight, dtype):
            return ReferenceBackend().dequantize_4bit(weight, dtype) + 1

    refq4.register_backend(Half())
    ran = ("dequantize_4bit", "dequantize_blockwise")
    asked = {"backend": "half", "depth": "quick", "progress": False}
    assert str(verify(checks=ran, **asked)).endswith("half DIFFERS from reference in 1 of 2 checks\n")
    refused = str(verify(checks=(*ran, "quantize_4bit"), **asked))
    assert refused.endswith("half DIFFERS from reference in 1 of the 2 checks that it ran (of 3)\n")


def test_a_backend_that_refuses_everything_does_not_agree():
    class Nothing(ReferenceBackend):
        name = "nothing"

        def can_run(self, call):
            return "not today"

    refq4.register_backend(Nothing())
    assert not verify("nothing", depth="quick", checks=("gemv_4bit",), progress=False).agrees


def test_differences_that_a_backend_names_are_counted_under_their_names():
    class Honest(Buggy):
        def known_difference(self, case):
            return "forgets biases" if case.bias else None

    refq4.register_backend(Honest("bias forgotten"))
    report = verify("buggy", depth="quick", checks=("gemm_4bit",), progress=False)
    assert report.agrees
    assert report.checks[0].known["forgets biases"] > 0
    refq4.register_backend(Honest("nibbles swapped"), replace=True)
    assert not verify("buggy", depth="quick", checks=("gemm_4bit",), progress=False).agrees


def test_backends_are_compared_with_each_other():
    refq4.register_backend(Buggy("nibbles swapped"))
    refq4.register_backend(Loopback())
    report = verify("loopback", against="buggy", depth="quick", checks=("dequantize_4bit",), progress=False)
    assert report.checks[0].differs > 0
    assert "against='buggy'" in report.failures[0].snippet()


def test_the_catalogue_holds_no_case_twice_and_is_the_same_every_time():
    deep = catalogue(tuple(CHECKS), "deep")
    assert len(set(deep)) == len(deep) == len(CHECKS) * DEPTHS["deep"]
    assert len(deep) >= 5000
    assert deep == catalogue(tuple(CHECKS), "deep")
    for case in deep[::97]:
        for mine, again in zip(case.operands(), eval(repr(case)).operands(), strict=True):
            assert mine is again is None or torch.equal(mine.nan_to_num(), again.nan_to_num())


def test_every_recipe_is_told_by_the_docstring_of_a_case():
    weights, activations = (Case.__doc__ or "").split("Recipes of weights:")[1].split("Recipes of activations:")
    assert re.findall(r'^    - "([^"]+)":', weights, re.MULTILINE) == list(WEIGHTS)
    assert re.findall(r'^    - "([^"]+)":', activations, re.MULTILINE) == list(ACTIVATIONS)


def test_shrinking_ends_at_a_case_of_which_nothing_can_be_made_simpler():
    start = Case("gemm_4bit", m=9, n=33, k=130, dtype="float16", nested=True, bias=True, weights="outliers", seed=7)
    smallest = shrink(start, lambda case: case.n * case.k >= 100 and case.nested)
    assert smallest.n * smallest.k >= 100
    assert smallest.nested
    assert not any(c.n * c.k >= 100 and c.nested for c in simpler(smallest))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"depth": "deeper"}, "depth must be one of quick, normal, deep"), ({"checks": ("gem",)}, "unknown check 'gem'")],
    ids=["depth", "check"],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        verify("reference", **arguments)
    with pytest.raises(ValueError, match="unknown check 'gem'"):
        check(Case("gem"), "reference")


# --- the three doors --------------------------------------------------------------------------------------------------


def test_the_command_exits_with_1_on_a_difference_and_0_without_one(capsys):
    refq4.register_backend(Buggy("bias forgotten"))
    command = ["verify", "--quick", "--check", "gemm_4bit"]
    assert cli.main([*command, "--backend", "reference"]) == 0
    assert "reference agrees with reference" in capsys.readouterr().out
    assert cli.main([*command, "--backend", "buggy"]) == 1
    assert "the bias is not added" in capsys.readouterr().out
    assert cli.main([*command, "--backend", "buggy", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["agrees"] is False
    assert report["checks"][0]["cases"] == DEPTHS["quick"]
    assert "check(Case('gemm_4bit'" in report["failures"][0]["snippet"]


IN_A_FILE = """
from beside import BIAS
import refq4
from refq4.reference import ReferenceBackend

class Mine(ReferenceBackend):
    name = "in a file"

    def gemv_4bit(self, x, weight, bias):
        return super().gemv_4bit(x, weight, BIAS)

refq4.register_backend(Mine())
"""


@pytest.mark.parametrize("source", ["backend_in_a_file", "backend_in_a_file.py", "elsewhere/backend_in_a_file.py"])
def test_the_command_imports_a_module_or_a_file_that_registers_a_backend(source, tmp_path):
    folder = (tmp_path / source).parent
    folder.mkdir(exist_ok=True)
    (folder / "backend_in_a_file.py").write_text(IN_A_FILE)
    (folder / "beside.py").write_text("BIAS = None\n")
    # -P, as when the installed command runs: python itself does not put the current directory on the path
    command = [sys.executable, "-P", "-m", "refq4", "verify", "--import", source, "--backend", "in a file", "--quick"]
    done = subprocess.run([*command, "--check", "gemv_4bit"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "the bias is not added" in done.stdout
    assert "# first import or run what calls refq4.register_backend for 'in a file'" in done.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 / 0", "importing it failed: ZeroDivisionError"),
        ("import refq4", r"registers no backend; it must call refq4\.register_backend"),
        (None, "importing it failed: FileNotFoundError"),
    ],
    ids=["an error", "nothing registered", "no file"],
)
def test_an_import_that_brings_no_backend_is_an_error_that_says_so(text, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "brings_nothing.py"
    if text is not None:
        path.write_text(text)
    assert cli.main(["verify", "--import", str(path), "--backend", "reference", "--quick"]) == 1
    for command in (["explain", "4x32"], ["info"]):
        assert cli.main([*command, "--import", str(path)]) == 1
    assert re.search(rf"--import .*brings_nothing\.py: .*{says}", capsys.readouterr().err)


def test_a_snippet_mentions_registering_only_where_python_would_not_find_the_backend_by_itself():
    refq4.register_backend(Buggy("bias forgotten"))
    case = Case("gemm_4bit", bias=True)
    assert Failure(case, case, "", "", "buggy", "reference").snippet().startswith("# first import or run")
    assert Failure(case, case, "", "", "reference", "reference").snippet().startswith("from refq4.testing import")


PLUGIN = """
from refq4.reference import ReferenceBackend

class Mine(ReferenceBackend):
    name = "mine"

    def gemv_4bit(self, x, weight, bias):
        return super().gemv_4bit(x, weight, {bias})

    def can_run(self, call):
        return "no AF4" if call.codebook == "af4" else super().can_run(call)
"""


@pytest.fixture
def installed(tmp_path):
    """A third party's package with a backend, found through its entry point."""

    def install(bias: str) -> dict[str, str]:
        (tmp_path / "mine_backend.py").write_text(PLUGIN.format(bias=bias))
        info = tmp_path / "mine_backend-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-backend\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[refq4.backends]\nmine = mine_backend:Mine\n")
        return os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    return install


def pytest_on(environment, cwd, *arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_an_installed_backend_of_a_third_party_passes_with_its_refusals_skipped(installed, tmp_path):
    run = pytest_on(installed("bias"), tmp_path, "--pyargs", "refq4.testing", "--backend", "mine", "-rs", "-k", "gemv")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no AF4" in run.stdout
    assert "failed" not in run.stdout


def test_an_installed_backend_with_a_bug_fails(installed, tmp_path):
    run = pytest_on(
        installed("None"), tmp_path, "--pyargs", "refq4.testing", "--backend", "mine", "-k", "gemv_4bit", "-x"
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "the bias is not added" in run.stdout


def test_other_projects_see_nothing_of_the_plug_in(tmp_path):
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--backend')\n")
    (tmp_path / "test_theirs.py").write_text(
        "import sys\ndef test_theirs(request):\n"
        "    assert request.config.getoption('--backend') == 'gpu'\n    assert 'refq4' not in sys.modules\n"
    )
    run = pytest_on(os.environ, tmp_path, "--backend", "gpu")
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_unavailable_backend_is_skipped_with_its_remedy_or_required(installed, tmp_path):
    environment = installed("bias")
    source = tmp_path / "mine_backend.py"
    source.write_text(source.read_text() + "    def available(self):\n        return 'no such chip: buy one'\n")
    arguments = ["--pyargs", "refq4.testing", "--backend", "mine", "-rs", "-k", "embedding"]
    run = pytest_on(environment, tmp_path, *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no such chip: buy one" in run.stdout
    assert "passed" not in run.stdout
    required = pytest_on(environment, tmp_path, *arguments, "--require-backends", "mine")
    assert required.returncode == 4
    assert "no such chip: buy one" in required.stderr


def test_layout_helpers_used_in_messages_are_exact():
    """The diagnosis of swapped nibbles rests on this identity."""
    packed = torch.arange(256, dtype=torch.uint8)
    swapped = layout.unpack((packed << 4) | (packed >> 4), 512).view(-1, 2)
    assert torch.equal(swapped.flip(1).reshape(-1), layout.unpack(packed, 512))
