"""The functions of the 4-bit layer, under the names and signatures they have in ``bitsandbytes.functional``.

    quantise  refq4/quantization.py    quantize_4bit, quantize_nf4, quantize_fp4, quantize_blockwise
    and back                           dequantize_4bit, dequantize_nf4, dequantize_fp4, dequantize_blockwise
    multiply  refq4/matmul.py          matmul_4bit, gemv_4bit, choose_path
    tables    refq4/codebooks.py       get_4bit_type, create_normal_map, create_fp4_map, create_dynamic_map
    state     refq4/state.py           QuantState

Each keeps the parameters, defaults and errors that it has there.
"""

from .codebooks import create_dynamic_map, create_fp4_map, create_normal_map
from .matmul import choose_path, gemv_4bit, matmul_4bit
from .quantization import (
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    get_4bit_type,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
)
from .state import QuantState

__all__ = [
    "QuantState",
    "choose_path",
    "create_dynamic_map",
    "create_fp4_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "matmul_4bit",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]
