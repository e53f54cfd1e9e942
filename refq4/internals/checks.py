"""Checks at the boundary: what callers hand over, checked once, with errors that say what to do.

Two boundaries share them. The public functions check what only they know (an output, a storage dtype). The ops
(``refq4/internals/dispatch.py``) check all that reaches a backend, and a backend hands it to C or CUDA as
addresses: there :func:`checked_weight` and :func:`check_product` hold each tensor to the length, dtype and device that
the sizes of the call want. Only a layout of a backend's own is checked elsewhere: by the backend, which alone knows it.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from .. import layout
from ..backend import Nested, PackedWeight, PreparedWeight
from ..trace import show
from .format import BLOCKSIZES, MAX_NUMEL, WEIGHT_DTYPES, describe, dtype_name

ACTIVATION_DTYPES = (*WEIGHT_DTYPES, torch.float64)
PLAIN = (Tensor, torch.nn.Parameter)  # torch's own: no subclass acts on them, and a storage of a size has memory


def check_floats(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """A TypeError unless ``tensor`` is a dense tensor of one of the dtypes."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        packed = isinstance(tensor, Tensor) and tensor.dtype == torch.uint8
        why = " (a packed weight's dtype is that of its bytes; cast to the layer's compute_dtype)" if packed else ""
        raise TypeError(f"{name} must be a tensor of {_names(dtypes)}, got {show(tensor)}; cast it first{why}")
    if tensor.layout != torch.strided:
        layout_name = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got a {layout_name} one; call .to_dense()")


def check_blocksize(blocksize: int) -> int:
    """The blocksize, or a ValueError if it is none of the eight."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {list(BLOCKSIZES)}, got {blocksize!r}")
    return int(blocksize)


def check_input(x: Tensor, n: int, k: int) -> None:
    """The door of a layer of weight [N, K]: x must be a dense float tensor [..., K], or a TypeError or ValueError."""
    if type(x) is not Tensor or x.dtype not in ACTIVATION_DTYPES or x.layout is not torch.strided:
        check_floats("the input of a 4-bit layer", x, ACTIVATION_DTYPES)
    if x.ndim == 0 or x.shape[-1] != k:
        check_operand("A", x, 1, (n, k), x.device)


def check_layers_shape(weight: Tensor, layer: object) -> None:
    """Raise a ValueError if a full-precision weight has another shape than the layer that it is for."""
    wanted = getattr(layer, "weight_shape", weight.shape)
    if weight.shape != wanted:
        raise ValueError(
            f"this {type(layer).__name__} needs a weight of shape {list(wanted)}, got {list(weight.shape)}; packed "
            f"bytes are loaded together with what stands beside them: load_state_dict, refq4.integrations.transformers"
        )


def check_operand(name: str, A: Tensor, side: int, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless A is floats on ``device``, [..., K] (where ``side`` is 0, [..., N]) of a weight of shape [N, K]."""
    if len(shape) != 2:
        raise ValueError(f"a product needs a weight of two dimensions [N, K], this one has shape {list(shape)}")
    check_floats(name, A, ACTIVATION_DTYPES)
    check_device(name, A, device, "the weight")
    if A.ndim == 0 or A.shape[-1] != shape[side]:
        raise ValueError(
            f"{name} has shape {list(A.shape)}, but the weight is [N, K] = {list(shape)}: {name}'s last dimension must "
            f"be {shape[side]}"
        )


def check_device(name: str, tensor: Tensor, device: torch.device, other: str) -> None:
    """Raise a ValueError unless ``tensor`` is where the ``other`` operand is."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, {other} on {device}: move one (layer.to(device), say)")


def check_bias(bias: Tensor, n: int, shape: tuple[int, ...]) -> Tensor:
    """``bias``, or a ValueError unless it is [n], one number for each output of a weight of ``shape``."""
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"bias must be a tensor of floats, got {show(bias)}")
    if bias.shape != (n,):
        raise ValueError(f"bias has shape {list(bias.shape)}, the weight [N, K] = {list(shape)} needs [{n}]")
    return bias


def check_product(A: Tensor, shape: tuple[int, ...], bias: Tensor | None, device: torch.device) -> None:
    """Raise unless A [..., K] and bias [N] fit a weight of ``shape`` [N, K] on ``device``, in dtype and device, too."""
    dtype = A.dtype
    fits = dtype in ACTIVATION_DTYPES and A.layout is torch.strided and A.device == device
    fits = fits and A.ndim > 0 and shape[1:] == (A.shape[-1],)
    if fits and (bias is None or (bias.shape == shape[:1] and bias.dtype == dtype and bias.device == device)):
        return  # all is well, as a rule: what follows says what is not
    check_operand("A", A, 1, shape, device)
    if bias is not None:
        check_bias(bias, shape[0], shape)
        if bias.dtype != A.dtype or bias.device != device:
            raise ValueError(
                f"bias must be {dtype_name(A.dtype)} on {device} as A is, got {show(bias)} on {bias.device}"
            )


def check_memory(name: str, tensor: Tensor) -> Tensor:
    """The operand as it can be read by its address: contiguous, or a ValueError if its memory is not all there.

    FSDP frees the storage of parameters that it has sharded; a wrapper subclass has none of its own.
    """
    tensor = tensor.contiguous()
    size = tensor.nbytes
    end = tensor.storage_offset() * tensor.itemsize + size
    if size and (end > tensor.untyped_storage().nbytes() or (type(tensor) not in PLAIN and tensor.data_ptr() == 0)):
        raise ValueError(f"{name} {show(tensor)} has no memory: its storage was freed, cut or never allocated")
    return tensor


def check_weight_memory(weight: PackedWeight) -> None:
    """:func:`check_memory` for each tensor of a weight."""
    names = ("packed", "absmax", "code", "nested absmax", "nested code", "offset")
    for name, tensor in zip(names, (*weight[:3], *(weight.nested or ())[:3]), strict=False):
        check_memory(name, tensor)


def checked(weight: PackedWeight | PreparedWeight) -> PackedWeight | PreparedWeight:
    """The weight of an op that takes any layout, or a ValueError. A backend's own layout is checked by the backend."""
    if isinstance(weight, PackedWeight):
        return checked_weight(weight)
    check_positive("blocksize", weight.blocksize)
    if not weight.tensors or len(weight.shape) not in (2, 3) or min(weight.shape) < 0:
        raise ValueError(
            f"a prepared weight has tensors and a shape [N, K] or [E, N, K], got {len(weight.tensors)} and "
            f"{list(weight.shape)}"
        )
    return weight


def checked_weight(weight: PackedWeight | PreparedWeight) -> PackedWeight:
    """The weight in the form that a backend reads by address: contiguous, and as long as its sizes say.

    Raises:
        ValueError: a size is no size, or a tensor does not fit it in length, dtype or device; the message names it. Or
            the weight is in a backend's own layout, which this op does not read.
    """
    if isinstance(weight, PreparedWeight):
        raise ValueError(f"this op reads a weight in the canonical layout, got {weight.layout!r}: restore_weight first")
    packed, absmax, code, blocksize, shape, quant_type, nested = weight
    check_positive("blocksize", blocksize)
    if min(shape, default=0) < 0:
        raise ValueError(f"a weight has no shape {list(shape)}")
    numel, device = torch.Size(shape).numel(), packed.device
    blocks = layout.block_count(numel, blocksize)
    packed = _row("the packed weight", packed, torch.uint8, layout.packed_bytes(numel), device)
    absmax = _row("absmax", absmax, torch.float32 if nested is None else torch.uint8, blocks, device)
    code = _row("code", code, torch.float32, 16, device)
    if nested is not None:
        check_positive("the blocksize of the scales", nested.blocksize)
        nested = Nested(
            _row("state2.absmax", nested.absmax, torch.float32, layout.block_count(blocks, nested.blocksize), device),
            _row("state2.code", nested.code, torch.float32, 256, device),
            _row("offset", nested.offset, torch.float32, 1, device),
            nested.blocksize,
        )
    return PackedWeight(packed, absmax, code, blocksize, shape, quant_type, nested)


def _row(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> Tensor:
    dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    if not dense or tensor.numel() != numel or tensor.dtype != dtype:
        raise ValueError(f"this weight needs {numel} {dtype_name(dtype)} elements in {name}, it has {describe(tensor)}")
    check_device(name, tensor, device, "the packed weight")
    return tensor.contiguous()


def check_positive(name: str, size: int) -> None:
    """Raise a ValueError unless ``size`` is a number of elements above 0 that 64 bits hold with room to add."""
    if not isinstance(size, int) or not 1 <= size <= MAX_NUMEL:
        raise ValueError(f"{name} must be an integer from 1 to 2**48, got {size!r}")


def check_storage(dtype: torch.dtype) -> None:
    """A ValueError unless packed bytes can be stored under ``dtype``."""
    if dtype not in layout.STORAGE_DTYPES:
        raise ValueError(f"quant_storage must be one of {_names(layout.STORAGE_DTYPES)}, got {dtype!r}")


def check_quantisable(A: Tensor, blocksize: int) -> None:
    """Raise unless A can be quantised in blocks of ``blocksize``: a TypeError for its dtype, a ValueError for that."""
    check_floats("A", A, WEIGHT_DTYPES)
    check_positive("blocksize", blocksize)


def check_code(code: Tensor, device: torch.device) -> None:
    """Raise a ValueError unless ``code`` is a table of the 8-bit stage: fp32 [2 to 256] on ``device``."""
    if code.dim() != 1 or not 2 <= code.numel() <= 256 or code.dtype != torch.float32:
        raise ValueError(f"code must be fp32 [2 to 256], got {show(code)}")
    check_device("code", code, device, "what it encodes")


def check_blockwise(q: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> None:
    """Raise unless each uint8 code of ``q`` has its entry in ``code``, and each of its blocks a scale in ``absmax``."""
    if q.dtype != torch.uint8:
        raise TypeError(f"dequantize_blockwise decodes uint8 codes, got {show(q)}")
    check_code(code, q.device)
    check_scales(absmax, q.shape, blocksize)
    check_device("absmax", absmax, q.device, "the codes")
    if code.numel() < 256 and q.numel() and not q.is_meta:
        largest = int(q.max())
        if largest >= code.numel():
            raise ValueError(f"code has {code.numel()} entries, and the largest of the codes to decode is {largest}")


def check_scales(absmax: Tensor, shape: torch.Size, blocksize: int) -> None:
    """Raise a ValueError unless ``absmax`` has one fp32 scale for each block of ``shape``."""
    check_positive("blocksize", blocksize)
    blocks = layout.block_count(shape.numel(), blocksize)
    if absmax.numel() != blocks or absmax.dtype != torch.float32:
        raise ValueError(f"shape {list(shape)} at blocksize {blocksize} has {blocks} fp32 scales, got {show(absmax)}")


def check_target(dtype: torch.dtype) -> None:
    """Raise a TypeError unless codes can be decoded to ``dtype``."""
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"codes decode to {_names(ACTIVATION_DTYPES)}, not to {dtype_name(dtype)}")


def write_into(name: str, given: Tensor | None, result: Tensor) -> Tensor:
    """``result``, or ``given`` with the result copied into it."""
    if given is None:
        return result
    if given.shape != result.shape or given.dtype != result.dtype or given.device != result.device:
        raise ValueError(f"{name}= must be {show(result)} on {result.device}, got {show(given)} on {given.device}")
    return given.copy_(result)


def check_packed(stored: Tensor, shape: torch.Size, key: str = "weight") -> None:
    """Raise a ValueError if ``stored`` can't be the packed bytes of ``shape``."""
    if stored.dtype not in layout.STORAGE_DTYPES:
        raise ValueError(f"{key}: a packed weight is stored as {_names(layout.STORAGE_DTYPES)}, got {stored.dtype}")
    wanted = -(-layout.packed_bytes(shape.numel()) // stored.dtype.itemsize)
    if stored.numel() != wanted:
        raise ValueError(
            f"{key}: shape {list(shape)} packs into {wanted} {dtype_name(stored.dtype)} elements "
            f"(two codes a byte), got {stored.numel()} in shape {list(stored.shape)}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(dtype_name, dtypes))


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning that points at the caller's own line: the nearest one outside refq4 and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("refq4", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
