"""Checkpoints on disk: quantised file by file without ever being in memory, and looked into.

    tensors.py       the safetensors format, read and written in pieces
    selection.py     which tensors of a checkpoint become 4-bit weights
    convert.py       quantize_checkpoint: a model directory in, a directory in bitsandbytes' 4-bit format out
    inspection.py    inspect_checkpoint: what a file holds, and what is wrong with it

The command line's ``quantize`` and ``inspect`` are these functions; a model in memory is for ``refq4.quantize_model``.
"""

from .convert import CheckpointReport, quantize_checkpoint

__all__ = ["CheckpointReport", "quantize_checkpoint"]
