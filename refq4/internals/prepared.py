"""The prepared form of a weight: its bytes in a backend's own layout, in place of the stored ones.

    stored bytes --- prepare() ---> a placeholder of the same shape, dtype and device, with one element of memory;
                                    the backend's form is beside it, on the parameter
                 <-- restore() ---  the stored bytes are back, and the form is dropped
                 <-- stored() ----  a copy of the stored bytes for a state dict, say; the form stays

The form belongs to the parameter's bytes. Whatever reads or writes the parameter restores them first, so new bytes have
no old form; an alias of the old memory that somebody took before (``weight.data``) no longer reaches the weight once it
has been prepared. Reading shape, dtype or device restores nothing.

There is one copy of the codes at a time. Parameters that something else owns (a rebuilt one, a DTensor, an offload
hook's) are never prepared; neither is one that has been restored :data:`MOST_RESTORES` times: it is in use by others.

Threads may infer, save and differentiate through one layer at once: those all read :meth:`Preparable.stored`.
Reading the parameter itself in one thread while another infers for the first time is a race, as is any write beside a
read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import layout
from ..backend import Backend, PreparedWeight
from .schemas import flatten

if TYPE_CHECKING:
    from ..state import QuantState

__all__ = ["MOST_RESTORES", "Form", "Preparable", "as_stored"]

MOST_RESTORES = 3  # then the parameter stays as stored: to prepare it takes as long as many products


class Form(NamedTuple):
    """What a backend made of a parameter's bytes and the tensors of its quant state.

    Args:
        prepared: the weight in the backend's layout; None where the backend reads the stored one.
        backend: who made it.
        choice: of backend, in effect at that time.
        geometry: shape and blocksize of the state.
        scales: the state's tensors that went in: absmax, code, offset, and absmax and code of the scales' own state.
        versions: those of them that count their edits, each with its count.
    """

    prepared: PreparedWeight | None
    backend: Backend
    choice: str
    geometry: tuple[Any, Any]
    scales: tuple[Tensor | None, ...]
    versions: tuple[tuple[Tensor, int], ...]


class Preparable(Tensor):
    """What ``Params4bit`` inherits, beside ``nn.Parameter``; its constructor sets the two attributes.

    They live on the instance so that compiled code is guarded by them: a graph traced before a weight was prepared or
    restored is traced anew.
    """

    quant_state: QuantState | None
    _form: Form | None = None
    _restores: int = 0

    @property
    def prepared(self) -> bool:
        """Whether the bytes are in a backend's own layout."""
        return self._form is not None and self._form.prepared is not None

    def form(self, state: QuantState, deferred: bool = False) -> Form | None:
        """The form that was made of these bytes and of ``state`` as it is now; None if there is none.

        A call that is ``deferred`` (traced, say) takes no notice of edits of the scales in place.
        """
        form = self._form
        if form is None or (state.shape, state.blocksize) != form.geometry:
            return None
        second = state.state2
        absmax, code, offset, absmax2, code2 = form.scales
        if state.absmax is not absmax or state.code is not code or state.offset is not offset:
            return None
        if absmax2 is not None if second is None else (second.absmax is not absmax2 or second.code is not code2):
            return None
        if not deferred:
            for tensor, version in form.versions:
                if tensor._version != version:
                    return None
        return form

    def prepare(self, state: QuantState, backend: Backend, choice: str) -> Form:
        """Let ``backend`` lay the weight out, and the stored bytes go if it does."""
        with _lock:
            form = self.form(state)
            if form is not None and form.backend is backend:
                return form  # another thread was quicker
            self.restore()
            second = state.state2
            nested = (None, None) if second is None else (second.absmax, second.code)
            scales = (state.absmax, state.code, state.offset, *nested)
            versions = tuple((t, t._version) for t in scales if t is not None and not t.is_inference())
            prepared = backend.prepare_weight(state.packed_weight(self))
            form = Form(prepared, backend, choice, (state.shape, state.blocksize), scales, versions)
            with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
                self._form = form  # first: who sees the placeholder must know what to do
                if form.prepared is not None:
                    self.data = torch.empty(1, dtype=self.dtype, device=self.device).expand(self.shape)
            return form

    def restore(self) -> Tensor:
        """The stored bytes as a plain tensor; the parameter holds them again, and has no form any more."""
        with _lock, torch._C.DisableTorchFunctionSubclass():
            bytes_ = self.stored()
            if self.prepared:
                self.data = bytes_
                self._restores += 1
            self._form = None  # last: until then a thread that meets the placeholder finds the way back
        return bytes_

    def stored(self) -> Tensor:
        """The stored bytes as a plain tensor, wherever they are; the form stays."""
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch._C._DisableFuncTorch():
            with _lock:  # for a moment: the backend may wait for other threads, and a fork keeps what they hold locked
                here, form = self.data, self._form
            if form is not None and form.prepared is not None:  # no function of what torch.func transforms
                packed = form.backend.restore_weight(form.prepared).packed
                return layout.to_storage(packed, here.dtype).view(here.shape)
            if here.nbytes > here.untyped_storage().nbytes():
                raise ValueError("the weight's memory is not there: its storage was freed or cut")
            return here

    def readable(self) -> Tensor:
        """What an op may read: :meth:`stored`, or while compiling the parameter itself.

        A graph for the stored bytes that is traced while the weight is prepared restores them each time it runs.
        """
        if not torch.compiler.is_compiling():
            return self.stored()
        form = self._form
        if form is None or form.prepared is None:
            return self
        restored: Tensor = torch.ops.refq4.restore_weight.default(*flatten(form.prepared), form.prepared.backend)
        return restored

    @classmethod
    def _before(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a torch function sees prepared parameters of this class: restore them, if it reads them."""
        if func in _ABOUT:
            return
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, cls) and tensor.prepared and not _dynamo_asks():
                tensor.restore()


def as_stored(weight: Tensor, looked_up: bool = False) -> Tensor:
    """The weight with its stored bytes: restored first, if it is prepared.

    From one that is ``looked_up``, as a table is, a product that shares it makes no form any more.
    """
    if isinstance(weight, Preparable) and not torch.compiler.is_compiling():
        if looked_up:
            weight._restores = MOST_RESTORES
        return weight.restore() if weight.prepared else weight
    return weight


def _dynamo_asks() -> bool:
    """Whether it is torch.compile that looks at the parameter, to describe it: it reads no bytes.

    Export keeps the parameters that it sees, so for that they are restored.
    """
    return torch._guards.TracingContext.try_get() is not None and not torch.compiler.is_exporting()


_lock = threading.RLock()
_PROPERTIES = (
    "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_meta is_cuda is_cpu is_sparse is_quantized "
    "itemsize nbytes _backward_hooks"
)
_METHODS = "size dim numel nelement element_size is_floating_point is_complex requires_grad_ is_inference __hash__"
# What a placeholder answers as well as the bytes would. A dict, because Dynamo of torch 2.8 traces no `in` for a set of
# functions.
_ABOUT = {getattr(Tensor, name).__get__: None for name in _PROPERTIES.split()} | {
    getattr(Tensor, name): None for name in _METHODS.split()
}
