"""Mixture-of-experts models of transformers with random weights, small enough to be made on the spot.

A family stands here for what is special about its experts; ``made`` gives one of its models.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from refq4.models.experts import expert_weights, routers
from refq4.nn import Linear4bit
from refq4.nn.parametrize import PackedParameter

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # experts w1, w2, w3 in files
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},  # biases, stored [E, K, N]
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {  # a first layer without experts, shared experts
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # fused in files, too, under other names
    "Qwen2Moe": {  # a shared expert with a gate of its own
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4": {  # a forward of its own, which reads decoded weights; stored [E, K, N]
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 192,
        "interleave_moe_layer_step": 1,
        "head_dim": 32,
    },
    "JetMoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "kv_channels": 32,
    },  # in attention, too; another forward
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 32},  # the router is a linear layer within "gate"
    "Jamba": {  # beside state-space layers
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
}


def made(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A causal language model of the family, in evaluation mode."""
    torch.manual_seed(seed)
    name = "Llama4TextConfig" if family == "Llama4" else f"{family}Config"
    config = getattr(transformers, name)(**{**_SIZES, **FAMILIES[family], **settings})
    model: PreTrainedModel = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def share_in_4_bits(model: nn.Module) -> float:
    """Of the weights of linear layers and experts; not counted are embeddings, the head, and the choice of experts."""
    in_4_bits = sum(module.quant_state.shape.numel() for module in model.modules() if isinstance(module, Linear4bit))
    in_4_bits += sum(
        module.quant_state.shape.numel() for module in model.modules() if isinstance(module, PackedParameter)
    )
    choosing, head = routers(model), model.get_output_embeddings()
    left = sum(getattr(owner, name).numel() for _, owner, name in expert_weights(model))
    for name, module in model.named_modules():
        full = isinstance(module, nn.Linear) and not isinstance(module, Linear4bit)
        if full and module is not head and name not in choosing:
            left += module.weight.numel()
    return in_4_bits / (in_4_bits + left)
