"""What a backend is: the contract between the core, which decides, and the backend, which computes.

A backend gets tensors and numbers. It never sees a module or a QuantState, never chooses a path, never casts an
output back: those are steps of the pipeline, written once for all backends. The docstring of each method below says
what it must return, and ``refq4.reference`` has the same methods with plain bodies: read the two side by side.

    the core                                    a backend
    ------------------------------------        ---------------------------------------------
    which backend?  -> Call (no tensors)  --->  can_run(call): None, or the reason why not
    checked, contiguous tensors           --->  quantize_4bit, dequantize_4bit, gemv_4bit, ...
    may the weight be rearranged?         --->  prepare_weight / restore_weight   (optional)

To write a backend, subclass :class:`Backend`, write the ops that you have, say in ``can_run`` which calls you can't
run, and register it (``refq4.register_backend`` or an entry point in the group ``refq4.backends``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codebooks import Code

__all__ = [
    "OPS",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "BackendUnsupportedError",
    "Call",
    "Nested",
    "PackedWeight",
    "PreparedWeight",
    "UnknownBackendError",
]

OPS = ("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise", "gemv_4bit", "gemm_4bit")
"""The ops that a backend may have.

Example:
    >>> [op for op in OPS if op.endswith("blockwise")]
    ['quantize_blockwise', 'dequantize_blockwise']
"""

OPTIONAL = {"grouped_gemm_4bit": "gemm_4bit", "grad_input_4bit": "dequantize_4bit"}  # with the op that stands in


class BackendError(RuntimeError):
    """The family of the three errors below.

    Example:
        >>> issubclass(BackendUnsupportedError, BackendError)
        True
    """


class UnknownBackendError(BackendError, ValueError):
    """No backend of that name is registered; the message lists the nearest names.

    Example:
        >>> import refq4
        >>> refq4.set_backend("referense")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        refq4.backend.UnknownBackendError: unknown backend 'referense'. Did you mean 'reference'? ...
    """


class BackendUnavailableError(BackendError):
    """The backend exists but can't work on this machine; the message says why and what to do.

    Example:
        >>> print(BackendUnavailableError("backend 'elsewhere' is not available: no driver: install one"))
        backend 'elsewhere' is not available: no driver: install one
    """


class BackendUnsupportedError(BackendError):
    """The backend works here but can't run this call; the message says which call and what would work.

    Example:
        >>> import torch, refq4
        >>> _ = refq4.register_backend(type("Empty", (Backend,), {"name": "empty"})())
        >>> refq4.functional.quantize_nf4(torch.ones(64), backend="empty")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        refq4.backend.BackendUnsupportedError: backend 'empty' can't run quantize_4bit(...): ...
        >>> refq4.unregister_backend("empty")
    """


class Call(NamedTuple):
    """Describe a call without its tensors, so that a backend can say whether it can run it.

    ``m`` tokens, ``n`` out_features, ``k`` in_features (for an op without a product, ``n`` is 1 and ``k`` the number
    of elements). ``dtype`` is the input's for quantising, the output's for dequantising, the activations' for products.
    ``codebook`` is its name (in the contract of 0.1.0 ``code``, which still reads it); ``layout`` is "canonical" or the
    name of a prepared layout; ``grad`` says that the gradient of a product's input is wanted, for which the same
    backend will have to decode the weight; ``experts`` is E, and ``transposed`` says that they are stored as
    [E, K, N].

    Example:
        >>> print(Call("gemv_4bit", "cpu", torch.bfloat16, m=1, n=8, k=64, blocksize=64, codebook="nf4"))
        gemv_4bit(M=1, N=8, K=64, bfloat16 on cpu, nf4, blocksize 64)
    """

    op: str
    device: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    blocksize: int
    codebook: str
    nested: bool = False
    layout: str = "canonical"
    grad: bool = False
    experts: int = 1
    transposed: bool = False

    @property
    def code(self) -> str:
        """The old name of ``codebook``."""
        return self.codebook

    def __str__(self) -> str:
        extras = ", nested absmax" * self.nested + f", layout {self.layout}" * (self.layout != "canonical")
        extras += ", with a gradient" * self.grad + f", {self.experts} experts" * (self.experts > 1)
        extras += ", transposed" * self.transposed
        return (
            f"{self.op}(M={self.m}, N={self.n}, K={self.k}, {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"{self.codebook}, blocksize {self.blocksize}{extras})"
        )


class Nested(NamedTuple):
    """Double quantisation's second level: absmax[i] = code[q[i]] * absmax[i // blocksize] + offset, in fp32.

    ``absmax`` fp32 [ceil(blocks / blocksize)]; ``code`` fp32 [256]; ``offset`` fp32 []; ``blocksize`` usually 256.

    Example:
        >>> from refq4.functional import quantize_nf4
        >>> packed, state = quantize_nf4(torch.ones(512, 64), compress_statistics=True)
        >>> nested = state.packed_weight(packed).nested
        >>> nested.absmax.shape, nested.blocksize, float(nested.offset)
        (torch.Size([2]), 256, 1.0)
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int


class PackedWeight(NamedTuple):
    """A quantised tensor in the canonical layout (``refq4/layout.py``): what the state dict holds, flattened.

    ``packed`` uint8 [ceil(numel/2)]; ``absmax`` fp32 [blocks], or uint8 if ``nested`` is given; ``code`` fp32 [16];
    ``shape`` of what it decodes to; ``quant_type``, the codebook's name, is for messages: ``code`` decides.

    Example:
        >>> from refq4.functional import quantize_nf4
        >>> packed, state = quantize_nf4(torch.ones(2, 64))
        >>> weight = state.packed_weight(packed)
        >>> weight.packed.shape, weight.absmax.tolist(), weight.shape, weight.nested
        (torch.Size([64]), [1.0, 1.0], (2, 64), None)
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, ...]
    quant_type: str
    nested: Nested | None = None


class PreparedWeight(NamedTuple):
    """The same weight in a backend's own layout: opaque tensors, and enough to name and check them.

    ``backend`` and ``layout`` say who can read ``tensors``; ``shape`` is [N, K], or [E, N, K] for experts.

    Example:
        >>> PreparedWeight("mine", "rows", (torch.zeros(4, 8),), (4, 8), 64, "nf4").layout
        'rows'
    """

    backend: str
    layout: str
    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    blocksize: int
    quant_type: str


class Backend:
    """The base class: a subclass sets the attributes and writes ops; :meth:`can_run` refuses those it has not written.

    Attributes:
        name: what users pass to ``set_backend``.
        priority: "auto" tries the largest first; the reference has 0. "auto" never uses a negative one.
        devices, dtypes: what it computes on, and in; without fp64, the reference takes what is fp64.
        description: one line for ``info``.

    Example:
        >>> class Mine(Backend):
        ...     def gemv_4bit(self, x, weight, bias):
        ...         return x.new_zeros(1, weight.shape[0])
        >>> call = Call("gemm_4bit", "cpu", torch.float32, m=2, n=8, k=64, blocksize=64, codebook="nf4")
        >>> Mine().can_run(call)
        'it has no gemm_4bit'
    """

    name: str = ""
    priority: int = 1
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    description: str = ""

    def available(self) -> str | None:
        """Return None if the backend can work on this machine, else one sentence: the reason and the remedy."""
        return None

    def can_run(self, call: Call) -> str | None:
        """Return None if the backend can run this call, else the reason. It is called often and must be cheap."""
        wrong = None if call.dtype in self.dtypes else f"it does not compute in {call.dtype}"
        return self.missing_op(call) or self.wrong_device(call) or wrong

    def kernel(self, call: Call) -> str:
        """Return the name of the kernel that would run this call, for the trace."""
        return f"{self.name}.{call.op}"

    def info(self) -> dict[str, Any]:
        """Return details for ``backend_info`` (tiers, versions, cache)."""
        return {}

    # --- ops: all tensors contiguous and on one device; outputs freshly allocated -----------------------------------

    def quantize_4bit(
        self, A: Tensor, code: Code, blocksize: int, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A [any shape, empty ones too], fp32/fp16/bf16 -> packed uint8 [ceil(numel/2)], absmax fp32 [blocks].

        ``code`` is a Code here, with thresholds and order; decoding needs its values only, and gets them as a tensor.
        Per block: absmax is the largest magnitude (NaN if there is one); a value's code is the rule of
        ``refq4.codebooks`` applied to clamp(x * (1/absmax), -1, 1) in fp32; where 1/absmax is not finite, to 0 * x.
        If absmax is given, it is used instead. A backend may omit this argument: then the reference computes.
        """
        raise self._has_no("quantize_4bit")

    def dequantize_4bit(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """-> ``dtype`` [weight.shape]: code[i] * absmax in fp32, rounded once to ``dtype``."""
        raise self._has_no("dequantize_4bit")

    def quantize_blockwise(self, A: Tensor, code: Code, blocksize: int) -> tuple[Tensor, Tensor]:
        """A fp32/fp16/bf16 [any shape] -> codes uint8 [same shape], absmax fp32 [blocks]; all as in quantize_4bit."""
        raise self._has_no("quantize_blockwise")

    def dequantize_blockwise(
        self, q: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        """q uint8 [any shape], absmax fp32 [blocks], code fp32 [C <= 256] -> ``dtype`` [same shape]."""
        raise self._has_no("dequantize_blockwise")

    def gemv_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        """x [1, K] times the transpose of weight [N, K], plus bias [N] in x's dtype -> [1, N] in x's dtype."""
        raise self._has_no("gemv_4bit")

    def gemm_4bit(self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None) -> Tensor:
        """x [M, K], M >= 1, the same -> [M, N]. x may be fp64: a backend that doesn't offer it says so in can_run."""
        raise self._has_no("gemm_4bit")

    def grouped_gemm_4bit(
        self, x: Tensor, weight: PackedWeight | PreparedWeight, bias: Tensor | None, offsets: Tensor, transposed: bool
    ) -> Tensor:
        """Optional, else the core calls gemm_4bit for each expert: all of them in one call, -> [T, N].

        Rows offsets[e] to offsets[e + 1] of x [T, K] times the transpose of weight[e], plus bias[e].
        ``weight`` is [E, N, K] (if ``transposed``, stored as [E, K, N]), ``bias`` [E, N], ``offsets`` int64 [E + 1] on
        the CPU, from 0 to T.
        """
        raise self._has_no("grouped_gemm_4bit")

    def grad_input_4bit(self, grad: Tensor, weight: PackedWeight) -> Tensor:
        """Optional, else the core decodes and multiplies: grad [M, N] times weight [N, K] -> [M, K] in grad's dtype."""
        raise self._has_no("grad_input_4bit")

    # --- own layout (optional) --------------------------------------------------------------------------------------

    def prepare_weight(self, weight: PackedWeight) -> PreparedWeight | None:
        """Return the weight in this backend's layout, or None to use the canonical one. Exact: see restore_weight."""
        return None

    def restore_weight(self, prepared: PreparedWeight) -> PackedWeight:
        """Return the canonical weight, with the same bits that prepare_weight was given."""
        raise self._has_no("restore_weight")

    # --- helpers for can_run ----------------------------------------------------------------------------------------

    def missing_op(self, call: Call) -> str | None:
        """The reason if a subclass has not written ``call.op``, or can't decode the weight for a wanted gradient."""
        op = OPTIONAL[call.op] if call.op in OPTIONAL and not self.has(call.op) else call.op
        if not self.has(op):
            return f"it has no {op}"
        if call.grad and not self.has("dequantize_4bit"):
            return "it has no dequantize_4bit, which the gradient needs"
        return None

    def has(self, op: str) -> bool:
        """Whether a subclass has written ``op``."""
        return getattr(type(self), op, None) is not getattr(Backend, op, None)

    def wrong_device(self, call: Call) -> str | None:
        """The reason if the tensors live where this backend does not compute."""
        if call.device in self.devices:
            return None
        return f"it computes on {' and '.join(self.devices)}, and the tensors are on {call.device}"

    def _has_no(self, op: str) -> BackendUnsupportedError:
        return BackendUnsupportedError(f"backend {self.name!r} has no {op}" + "; its can_run must say so" * (op in OPS))
