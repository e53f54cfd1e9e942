"""LoRA on 4-bit layers that are divided among processes by a transformers plan; ``peft.py`` imports this.

    column    A [r, K] whole        B [N, r] a part of its rows
    row       A [r, K] a part       B [N, r] whole

peft shards an adapter as transformers shards a layer, by sizes that it reads off the base layer: those of the whole
layer, here. What it shards is plain LoRA on linear layers; anything else would train on a part and not know it.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .instead import instead_of
from .parts import is_divided, splits

__all__: list[str] = []  # peft is told

_BESIDES = (  # what makes another adapter of LoRA, or puts it elsewhere
    "alora_invocation_tokens", "arrow_config", "lora_bias", "target_parameters", "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip


@instead_of(BaseTuner, "inject_adapter")
def _divides_plain_lora(
    original: Any, self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """``BaseTuner.inject_adapter``, before anything is changed."""
    if is_divided(model):
        config: Any = self.peft_config[adapter_name]
        besides = [name for name in _BESIDES if getattr(config, name, None)]
        if type(self) is not LoraModel or besides or config.init_lora_weights not in (True, False, "gaussian"):
            what = f"{besides[0]}={getattr(config, besides[0])!r}" if besides else type(self).__name__
            raise ValueError(
                f"the 4-bit layers of this model are divided among processes, and {what} is not made for that: use "
                f"plain LoRA on linear layers, or train on a model that each process has whole"
            )
        if getattr(model, "_device_mesh", None) is None or not hasattr(lora.model, "add_lora_tp_hooks_dtensor"):
            raise ValueError(
                "peft divides LoRA for models that transformers has divided (distributed_config of "
                "from_pretrained), from peft 0.20 on; this model was divided otherwise, or peft is older"
            )
    original(self, model, adapter_name, *args, **kwargs)


if hasattr(lora.model, "add_lora_tp_hooks_dtensor"):

    @instead_of(lora.model, "add_lora_tp_hooks_dtensor")
    def _by_whole_sizes(original: Any, tp_module: nn.Module, *args: Any, base_layer: nn.Module, **kwargs: Any) -> None:
        """It reads the size of the whole adapter off the base layer's weight."""
        if split := splits(base_layer).get("weight"):
            base_layer = nn.Linear(split.shape[1], split.shape[0], bias=False, device="meta")
        original(tp_module, *args, base_layer=base_layer, **kwargs)
