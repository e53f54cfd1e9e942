"""One copy of a weight: while a backend's own layout serves inference, the stored bytes are let go and can come back.

    canonical bytes --- lend(restore) ---> a placeholder of the same shape, dtype and device; one element of memory
                    <-- stored() ---------  a fresh copy of the bytes, for a state dict or one product
                    <-- come home --------  training, or anything else that reads the parameter

Reading shape, dtype or device does not restore the bytes. Any other torch function on the parameter does, before it
runs, and the parameter keeps them from then on: something besides its layer reads it (a tied embedding, say), and
restoring the bytes at each of its calls would cost more than a second copy.

Threads may infer, save and differentiate through one layer at once: those all read ``stored()``. To read the parameter
itself in one thread while another infers for the first time is a race, as any write beside a read is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["LentBytes"]

WORTH_LENDING = 4096  # bytes: below, a placeholder saves less than its own bookkeeping takes


class LentBytes:
    """What ``Params4bit`` inherits, beside ``nn.Parameter``; its constructor sets the two attributes.

    They live on the instance so that compiled code is guarded by them: a graph that reads the parameter is traced
    anew once the bytes have been lent, and tracing brings them home.
    """

    _restore: Callable[[], Tensor] | None = None  # gives the flat bytes in the storage dtype; None: they are here
    _read_by_others: bool = False

    @property
    def lent(self) -> bool:
        """Whether the bytes are with a backend."""
        return self._restore is not None

    def lend(self: Any, restore: Callable[[], Tensor]) -> None:
        """Let the bytes go; ``restore`` gives them back, bit for bit."""
        with _lock, torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
            if self._read_by_others or self.numel() * self.itemsize < WORTH_LENDING:
                return
            self._restore = restore  # first: who sees the placeholder must know what to do
            self.data = torch.empty(1, dtype=self.dtype, device=self.device).expand(self.shape)

    def stored(self: Any) -> Tensor:
        """The bytes as a plain tensor, wherever they are; the loan goes on."""
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
            for _ in range(100):  # twice only if another thread restores them between the two looks
                here: Tensor = self.data
                if here.numel() * here.itemsize <= here.untyped_storage().nbytes():
                    return here
                restore = self._restore
                if restore is not None:
                    with torch._C._DisableFuncTorch():  # the bytes are no function of what torch.func transforms
                        restored: Tensor = restore().view(self.shape)
                    return restored
        raise ValueError("the weight's memory is not there: its storage was freed or cut")

    def readable(self: Any) -> Tensor:
        """What an op may read: :meth:`stored`, or while compiling the parameter itself."""
        if torch.compiler.is_compiling() and not self.lent:
            parameter: Tensor = self
            return parameter
        bytes_: Tensor = self.stored()
        return bytes_

    def come_home(self: Any) -> Tensor:
        """The bytes as a plain tensor; the loan is over."""
        bytes_: Tensor = self.stored()
        with _lock, torch._C.DisableTorchFunctionSubclass():
            if self._restore is not None:
                self.data = bytes_
                self._restore = None
        return bytes_

    @classmethod
    def _prepare_for(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a torch function sees parameters of this class: those that are lent come home, if it reads them."""
        if func in _ABOUT:
            return
        if func is _SET_DATA:
            args[0]._restore = None
            return
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, cls) and tensor.lent:
                tensor.come_home()
                tensor._read_by_others = True


_lock = threading.Lock()
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_PROPERTIES = (
    "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_meta is_cuda is_cpu is_sparse is_quantized "
    "itemsize _backward_hooks"
)
_METHODS = "size dim numel nelement element_size is_floating_point is_complex requires_grad_ is_inference __hash__"
# What a placeholder answers as well as the bytes would.
_ABOUT = {getattr(Tensor, name).__get__ for name in _PROPERTIES.split()} | {
    getattr(Tensor, name) for name in _METHODS.split()
}
