"""Can somebody who has not seen the code learn from two files what the forward pass decides, and find what is wrong?

    python scripts/checks/reader_trial.py ask                the questions, for a reader of one_page.py and pipeline.py
    python scripts/checks/reader_trial.py plant FOLDER       those two files with seven faults, one in each step
    python scripts/checks/reader_trial.py key                the answers, and where each fault is

A reader gets the folder and the questions, nothing else, and answers by file and line. What they stumble over is a
fault of the two files. The trial counts as passed with every question answered and six faults found.
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).parents[2] / "refq4"
FILES = ("one_page.py", "pipeline.py")

# (question, answer)
QUESTIONS = [
    ("Say the seven steps in order: what does each decide, and in which function?", "the functions of linear_4bit"),
    (
        "Which step asks the backend, and what may make it not be asked there?",
        "2, choose_layout; a call that is traced or transformed, or that has nothing to multiply",
    ),
    ("What does a forward write, and where?", "remember_first_input; Preparable.prepare and restore"),
    (
        "When does a weight stay in the stored layout although the backend has one of its own?",
        "_must_stay: training, a wanted gradient, rebuilt, offloaded, restored too often; and in a traced call",
    ),
    (
        "A layer without a compute dtype gets a float16 input first, then bfloat16. In which dtype does each compute?",
        "float16, then bfloat16: after a float16 input nothing is inferred, each input's own dtype counts",
    ),
    (
        "Input bfloat16, compute dtype float32, bias float32: how often is the bias rounded, and where?",
        "once, in step 3, to bfloat16; step 5 brings it back to float32 exactly",
    ),
    (
        "Under autocast, in which dtype does the product run, and in which does the result come?",
        "autocast's; the input's",
    ),
    ("Where is decided whether gemv_4bit or gemm_4bit runs?", "refq4.matmul.route, asked in step 2 by describe"),
    ("How many bits does a weight take with double quantisation, and why?", "4 + 8/64 + 32/(64*256) = 4.127"),
]

# step: (file, the text, what it becomes, what is wrong)
FAULTS = {
    1: (
        "pipeline.py",
        "    if state is not None:\n        return state, STATE_ON_WEIGHT\n",
        "    if state is not None:\n        return layer.quant_state or state, STATE_ON_WEIGHT\n",
        "the module's copy is taken though the weight carries its own state: a weight that was swapped decodes wrongly",
    ),
    2: (
        "pipeline.py",
        "(form is None or form.backend is not resolved.backend)",
        "form is None",
        "a form that another backend made is handed to the backend that was resolved",
    ),
    3: (
        "pipeline.py",
        "    return bias.to(dtype), BIAS_CAST\n",
        "    bias.data = bias.data.to(dtype)\n    return bias, BIAS_CAST\n",
        "the parameter is rewritten",
    ),
    4: (
        "pipeline.py",
        "    if not layer.compute_type_is_set and x.dtype in INFERRED:\n        layer.compute_dtype = x.dtype\n",
        "    if x.dtype in INFERRED:\n        layer.compute_dtype = x.dtype\n",
        "the first input overrides the compute dtype that the user set",
    ),
    5: (
        "pipeline.py",
        "    return (x.to(dtype), None if bias is None else bias.to(dtype)), CAST_INPUT\n",
        "    return (x.to(dtype), bias), CAST_INPUT\n",
        "the bias keeps its dtype",
    ),
    6: (
        "pipeline.py",
        "*multiply(A, weight, bias)",
        "*multiply(x, weight, bias)",
        "the input that was not cast is multiplied",
    ),
    7: (
        "pipeline.py",
        "*cast_back(y, x.dtype)",
        "*cast_back(y, A.dtype)",
        "the result stays in the dtype of the product",
    ),
}


def planted(name: str) -> str:
    """The text of a file with its faults; a ValueError if a fault no longer fits."""
    text = (ROOT / name).read_text()
    for step, (file, old, new, _) in FAULTS.items():
        if file == name:
            if text.count(old) != 1:
                raise ValueError(f"the fault of step {step} fits {text.count(old)} places of {name}, it needs one")
            text = text.replace(old, new)
    return text


def main() -> int:
    """Ask, plant, or tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    todo = parser.add_subparsers(dest="todo", required=True)
    todo.add_parser("ask", help="print the questions")
    todo.add_parser("plant", help="write the two files with the faults").add_argument("folder", type=Path)
    todo.add_parser("key", help="print answers and faults")
    options = parser.parse_args()
    if options.todo == "ask":
        print("\n".join(f"{i}. {question}" for i, (question, _) in enumerate(QUESTIONS, 1)))
        print(f"{len(QUESTIONS) + 1}. pipeline.py has seven faults, one in each step. Give the line of each, and why.")
    elif options.todo == "plant":
        options.folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (options.folder / name).write_text(planted(name))
    else:
        print("\n".join(f"{i}. {answer}" for i, (_, answer) in enumerate(QUESTIONS, 1)))
        for step, (file, _, new, why) in FAULTS.items():
            text = planted(file)
            line = text[: text.index(new)].count("\n") + 1
            print(f"step {step}: {file}:{line}: {why}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
