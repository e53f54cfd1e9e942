"""peft's methods besides LoRA that need to know what a 4-bit weight of refq4 is; ``peft.py`` imports this.

OFT, BOFT, VeRA, MiSS, SHiRA    read and write the weight through a Refq4Backend, so they merge, too
HiRA                            multiplies its delta by the weight: HiraLinear4bit
"""

from __future__ import annotations

from typing import Any

from peft.tuners.hira import HiraModel
from peft.tuners.hira.layer import Linear as HiraLinear
from peft.utils import quantization_utils
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import dequantize_4bit
from ..nn import Linear4bit
from ..params import Params4bit
from .instead import instead_of
from .peft import adapts_refq4, requantise

__all__: list[str] = []  # peft makes these


class Refq4Backend(quantization_utils.QuantizationBackend):
    """How peft's methods that merge into any quantised weight read and write one of refq4.

    Example:
        >>> layer = Linear4bit(64, 8, quant_type="nf4").to("cpu")
        >>> Refq4Backend().get_base_weight(layer).shape
        torch.Size([8, 64])
    """

    supports_merge = True
    layer_type = "linear"
    backend_name = "refq4 4bit"

    def __init__(self) -> None:
        self.merge_error: float | None = None
        self._unmerged: Params4bit | None = None

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """The decoded weight [N, K]."""
        weight: Any = base_layer.weight
        return dequantize_4bit(weight.stored(), weight.quant_state)

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Quantise ``weight_data`` [N, K]; once nothing is merged any more, put the very bytes back instead."""
        layer = peft_layer.get_base_layer()
        if self._unmerged is not None and not peft_layer.merged_adapters:
            layer.weight = self._unmerged.to(layer.weight.device)
            layer.quant_state = layer.weight.quant_state
            self._unmerged, self.merge_error = None, None
            return
        before = self._unmerged or layer.weight
        self.merge_error = requantise(layer, before, weight_data.detach().float())
        self._unmerged = before


class HiraLinear4bit(HiraLinear):
    """A HiRA adapter around a :class:`refq4.nn.Linear4bit`, which peft makes: its delta is a multiple of the weight.

    Example:
        >>> from peft import HiraConfig, get_peft_model
        >>> layer = Linear4bit(64, 64, quant_type="nf4").to("cpu")
        >>> type(get_peft_model(nn.Sequential(layer), HiraConfig(target_modules=["0"])).base_model.model[0])
        <class 'refq4.integrations.peft_others.HiraLinear4bit'>
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, hira_config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, hira_config, **kwargs)
        self.fan_in_fan_out = False  # GPT-2's layers are turned round when they are quantised

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> [..., N]."""
        layer: Any = self.get_base_layer()
        if not isinstance(layer, Linear4bit):  # model.dequantize() has been here
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        weight = dequantize_4bit(layer.weight, layer.quant_state)
        for name in self.active_adapters:
            if name in self.hira_A:
                factor = self.hira_B[name] @ self.hira_A[name]
                hidden = self.hira_dropout[name](self._cast_input_dtype(x, factor.dtype))
                result = result + F.linear(hidden, weight.to(factor.dtype) * factor).to(result.dtype)
        return result


@instead_of(quantization_utils, "resolve_quantization_backend", "peft")
def _resolves_refq4(original: Any, base_layer: nn.Module, **kwargs: Any) -> Any:
    """How a weight is read and written."""
    return Refq4Backend() if isinstance(base_layer, Linear4bit) else original(base_layer, **kwargs)


adapts_refq4(HiraModel, HiraLinear4bit)
