"""The command line: ``python -m refq4 COMMAND``, also installed as ``refq4``. One module a command; here is the frame.

Nothing here imports torch before a command runs: ``--help``, a wrong command line and completion take no second.

tour         real pretrained weights through every step of the 4-bit layer
info         what this machine offers: each backend, and why it is or isn't available
explain      the seven steps of one call, for a shape, a dtype and a backend
quantize     a safetensors model directory in, a 4-bit one out
dequantize   a 4-bit model directory in, a plain safetensors one out
eval         loss, perplexity, KL, and the damage of each layer, on a text
inspect      what a weight file holds, and what is wrong with it
verify       one backend against another: where they differ, on which smallest input, by how much
bench        a backend against what people use today, and against the machine's limits
tune         a backend measures on this machine what it chooses by, and keeps it
run          another program, with refq4 in transformers
complete     a script for the shell
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from .. import __version__
from . import bench, complete, dequantize, evaluate, explain, info, inspect, quantize, run, tour, tune, verify

__all__ = ["begin", "main", "parser"]

EPILOG = """\
examples:
  python -m refq4 tour                        the packaged sentence encoder in NF4, FP4 and double-quantised NF4
  python -m refq4 info --json                 the backends of this machine, for scripts
  python -m refq4 explain 4096x11008          the steps of one call, and the reason for each decision
  python -m refq4 quantize model model-nf4    write a model on disk in 4 bits
  python -m refq4 dequantize model-nf4 plain  decode it into floats, for tools that read plain safetensors
  python -m refq4 eval model-nf4 --text book.txt --against model     how much worse is it in 4 bits?
  python -m refq4 inspect model-nf4           what is in it, and is something wrong with it?
  python -m refq4 verify --backend cpu        does this backend compute the 4-bit layer?
  python -m refq4 bench --quick               how fast is it, compared with bitsandbytes and torch?
  python -m refq4 tune                        up to how many tokens is the GPU's fused kernel faster?
  python -m refq4 run -- lm_eval --help       run a program that does not import refq4 on 4-bit checkpoints

exit codes:
  0    success
  1    the command failed (one line on stderr says why), or it found a difference or a damaged tensor
  2    the command line is wrong
  130  interrupted with Ctrl-C; no incomplete output is left
"""
INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code (the help lists them)."""
    arguments = parser().parse_args(argv)
    from ..backend import BackendError

    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = int(arguments.run(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: refq4 inspect model | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\nrefq4 {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (BackendError, ModuleNotFoundError, OSError, ValueError) as error:
        print(f"refq4 {arguments.command}: {error}", file=sys.stderr)
        return 1
    return code


def begin() -> None:
    """Do what needs no torch: print the help or say what is wrong with the command line, and exit.

    Else return, for the command to be loaded; Ctrl-C ends the process without a word until :func:`main` has begun.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    arguments = parser().parse_args()
    if arguments.command == "complete":
        raise SystemExit(arguments.run(arguments))


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


class _Parser(argparse.ArgumentParser):
    """A parser that keeps lines as they are, and whose error ends with the first example of the help, if it has one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        lines = (self.epilog or "").splitlines()
        self.print_usage(sys.stderr)
        example = f"example: {lines[1].strip()}\n" if lines[:1] == ["examples:"] else ""
        self.exit(2, f"{self.prog}: error: {message}\n{example}")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = _Parser(
        prog="refq4",
        description="The 4-bit linear layer of bitsandbytes, taken apart.",
        epilog=EPILOG,
    )
    whole.add_argument("--version", action="version", version=f"refq4 {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (tour, info, explain, quantize, dequantize, evaluate, inspect, verify, bench, tune, run):
        module.add(commands)
    complete.add(commands, whole)
    return whole
