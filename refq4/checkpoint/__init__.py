"""Checkpoints on disk: quantised file by file without ever being in memory, and looked into.

    tensors.py       the safetensors format, read and written in pieces
    ahead.py         the next piece, read while the last one is worked on
    architecture.py  what transformers would do with each module
    selection.py     which tensors of a checkpoint become 4-bit weights
    weights.py       one file, converted
    places.py        directories: what a model is made of; an output that appears whole or not at all
    convert.py       quantize_checkpoint: a model directory in, a directory in bitsandbytes' 4-bit format out
    dequantize.py    dequantize_checkpoint: and back, to a plain safetensors directory
    sources.py       tensors of files in either format
    inspection.py    inspect_checkpoint: what a file holds, and what is wrong with it

The command line's ``quantize``, ``dequantize`` and ``inspect`` are these functions; a model in memory is for
``refq4.quantize_model``.
"""

from .convert import CheckpointReport, quantize_checkpoint
from .dequantize import DequantizationReport, dequantize_checkpoint
from .inspection import CheckpointContents, inspect_checkpoint

__all__ = [
    "CheckpointContents",
    "CheckpointReport",
    "DequantizationReport",
    "dequantize_checkpoint",
    "inspect_checkpoint",
    "quantize_checkpoint",
]
