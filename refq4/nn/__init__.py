"""The layers: modules that hold a 4-bit weight.

    layer = Linear4bit(4096, 11008, quant_type="nf4")
    layer.load_state_dict(...)            full-precision weights, or a bitsandbytes 4-bit state dict
    layer.to("cpu")                       a full-precision weight is quantised here
    layer(x)                              the seven steps of refq4/pipeline.py

The names, arguments and state-dict keys are those of ``bitsandbytes.nn``. What a layer computes is in the pipeline, how
its weight is quantised in ``refq4/params.py``, how a module with such a weight is moved, saved and loaded in
``refq4/internals/holder.py``; this file says which layers there are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import pipeline
from ..functional import DEFAULT_BLOCKSIZE
from ..internals.checks import warn_caller
from ..internals.holder import Holds4bitWeight
from ..params import Params4bit

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4", "Linear4bit", "LinearFP4", "LinearNF4", "Params4bit"]


class Linear4bit(Holds4bitWeight, nn.Linear):
    """A linear layer with a 4-bit weight. Mirrors ``bitsandbytes.nn.Linear4bit``; QLoRA, section 3.

    Args:
        input_features: K.
        output_features: N.
        bias: add a bias [N]; it keeps its own dtype.
        compute_dtype: dtype of the product; inferred from the first input if None.
        compress_statistics: double quantisation of the scales.
        quant_type: a codebook's name ("nf4", "fp4", ...).
        quant_storage: dtype the packed bytes are stored under.
        device: as in ``nn.Linear``.
        blocksize: elements per block; 64 if None (not in bitsandbytes).
        scales: "absmax", or "search" for a smaller error in the same format; see ``quantize_4bit``.

    Example:
        >>> layer = Linear4bit(64, 8, quant_type="nf4").to("cpu")
        >>> layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        blocksize: int | None = None,
        scales: str = "absmax",
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.awaits_first_input = True
        self._hold(
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            scales=scales,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Linear4bit:
        """Make a quantised layer from a full-precision one, on the same device; the bias is shared, not copied.

        Args:
            linear: left as it is.
            settings: ``quant_type``, ``compress_statistics``, ``compute_dtype``, ``quant_storage``, ``blocksize``,
                ``scales``.

        Example:
            >>> Linear4bit.from_linear(nn.Linear(64, 8), quant_type="nf4").weight.shape
            torch.Size([256, 1])
        """
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", **settings)
        layer.bias = linear.bias
        weight = layer.weight
        assert isinstance(weight, Params4bit)
        layer.weight = weight._like(linear.weight.detach(), None).to(linear.weight.device)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype; see ``refq4.pipeline.linear_4bit``."""
        return pipeline.linear_4bit(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_settings(self.weight)}, compute_dtype={self.compute_dtype}"

    @property
    def weight_shape(self) -> torch.Size:
        """[N, K]."""
        return torch.Size((self.out_features, self.in_features))


class _LinearOfFixedType(Linear4bit):
    """The constructor that :class:`LinearNF4` and :class:`LinearFP4` share: Linear4bit's without ``quant_type``."""

    _quant_type: ClassVar[str]

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        *,
        blocksize: int | None = None,
        scales: str = "absmax",
    ) -> None:
        of_weight = compress_statistics, self._quant_type, quant_storage, device
        super().__init__(
            input_features, output_features, bias, compute_dtype, *of_weight, blocksize=blocksize, scales=scales
        )


class LinearNF4(_LinearOfFixedType):
    """:class:`Linear4bit` with ``quant_type="nf4"``.

    Example:
        >>> LinearNF4(64, 8).weight.quant_type
        'nf4'
    """

    _quant_type = "nf4"


class LinearFP4(_LinearOfFixedType):
    """:class:`Linear4bit` with ``quant_type="fp4"``.

    Example:
        >>> LinearFP4(64, 8).weight.quant_type
        'fp4'
    """

    _quant_type = "fp4"


class Embedding4bit(Holds4bitWeight, nn.Embedding):
    """An embedding with a 4-bit table. Mirrors ``bitsandbytes.nn.Embedding4bit``; unlike there, it can be saved.

    Args:
        num_embeddings: V.
        embedding_dim: D; if it is not a multiple of the blocksize, each call decodes the whole table.
        dtype: of the result.
        quant_type, quant_storage, device: as in :class:`Linear4bit`.

    Warns:
        UserWarning: D is not a multiple of the blocksize.

    Example:
        >>> table = Embedding4bit(100, 64, quant_type="nf4").to("cpu")
        >>> table(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._hold(compress_statistics=False, quant_type=quant_type, quant_storage=quant_storage)
        if embedding_dim % DEFAULT_BLOCKSIZE:
            warn_caller(
                f"embedding_dim {embedding_dim} is not a multiple of the blocksize {DEFAULT_BLOCKSIZE}: each call will "
                f"decode the whole table"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape -> [*ids.shape, D]; see ``refq4.pipeline.embedding_4bit``."""
        return pipeline.embedding_4bit(self, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_settings(self.weight)}"

    @property
    def weight_shape(self) -> torch.Size:
        """[V, D]."""
        return torch.Size((self.num_embeddings, self.embedding_dim))


class _EmbeddingOfFixedType(Embedding4bit):
    """The constructor that EmbeddingNF4 and EmbeddingFP4 share: Embedding4bit's without ``quant_type``."""

    _quant_type: ClassVar[str]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, self._quant_type, quant_storage, device)


class EmbeddingNF4(_EmbeddingOfFixedType):
    """:class:`Embedding4bit` with ``quant_type="nf4"``.

    Example:
        >>> EmbeddingNF4(10, 64).weight.quant_type
        'nf4'
    """

    _quant_type = "nf4"


class EmbeddingFP4(_EmbeddingOfFixedType):
    """:class:`Embedding4bit` with ``quant_type="fp4"``.

    Example:
        >>> EmbeddingFP4(10, 64).weight.quant_type
        'fp4'
    """

    _quant_type = "fp4"


def _settings(weight: nn.Parameter) -> str:
    if not isinstance(weight, Params4bit):
        return "packed"
    nested = ", double quantisation" if weight.compress_statistics else ""
    pending = "" if weight.bnb_quantized else ", not quantised yet"
    return f"{weight.quant_type}, blocksize={weight.blocksize}{nested}{pending}"
