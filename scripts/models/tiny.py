"""Models of every type that the installed transformers has, small, with random weights, and inputs for them.

config     the type's default, with hidden_size, num_layers, vocab_size and their kin made small, sub-configs too
class      the first of transformers' auto classes that knows the type: with a head where there is one
inputs     made from the config and the signature of forward: tokens, pixels, sound
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["LIMIT", "TooLargeError", "inputs", "model_class", "model_types", "output", "tiny_config", "tiny_model"]

LIMIT = 5_000_000  # parameters of a model that the sweep takes
TOKENS = 8
VOCABULARY = 128
FIRST_SPECIAL = 120  # tokens from here on stand for images, sounds and ends

_LAYERS = r"(num|n)_?(hidden|decoder|encoder|text|vision)?_?(layers|layer|blocks)|depth|layers|.*_layers"
# The first rule whose pattern matches the whole name of a field says how large its integers may be.
_RULES = [
    (r"depths", 1),
    (r"((num|n)_)?(local_|routed_)?experts|(moe_)?num_experts|n_routed_experts|num_local_experts", 4),
    (r".*(top_?k|experts_per_tok|topk_group|n_group|shared_experts).*", 1),
    (r".*vocab.*size|.*_size_vocab|codebook_size|num_embeddings", VOCABULARY),
    (r".*max_position_embeddings|n_positions|max_.*(len|length|positions|seqlen)|n_ctx|max_seq_len.*", 64),
    (_LAYERS, 2),
    (r".*(key_value|kv)_heads|multi_query_group_num", 2),
    (r".*_heads?|n_heads?", 4),
    (r".*head_dim|d_kv|.*head_size", 16),
    (r".*rank", 32),
    (r".*(intermediate|ffn|feed_?forward|d_ff|n_inner|mlp_dim|ff_dim|inner_dim|dim_feedforward).*", 128),
    (r".*hidden_sizes?|d_model|n_embd|d_embed|embedding_size|hidden|width|.*_dims?|dims?|.*channels.*", 64),
    (r"image_size|img_size", 32),
    (r"num_(mel_bins|queries|frames)|n_mels", 16),
]
_KEPT = re.compile(r".*(num_channels|in_channels|input_channels|in_chans|_index|rotary_dim|chunk_size|groups).*")
_STAGES = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names")
_KINDS = {
    "SEQ_TO_SEQ_CAUSAL_LM": "encoder-decoder",
    "CAUSAL_LM": "text",
    "IMAGE_TEXT_TO_TEXT": "vision and text",
    "MULTIMODAL_LM": "vision and text",
    "SPEECH_SEQ_2_SEQ": "speech",
    "MASKED_LM": "text",
    "CTC": "speech",
    "IMAGE_CLASSIFICATION": "vision",
    "AUDIO_CLASSIFICATION": "speech",
    "VIDEO_CLASSIFICATION": "vision",
    "OBJECT_DETECTION": "vision",
    "SEMANTIC_SEGMENTATION": "vision",
    "DEPTH_ESTIMATION": "vision",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "vision and text",
    "TEXT_TO_WAVEFORM": "speech",
    "TEXT_TO_SPECTROGRAM": "speech",
    "PRETRAINING": "other",
    "SEQUENCE_CLASSIFICATION": "text",
}


class TooLargeError(ValueError):
    """A model that stays above the limit though its config was made small."""


def model_types() -> list[str]:
    """Every model type of the installed transformers."""
    return sorted(CONFIG_MAPPING.keys())


def tiny_config(model_type: str) -> Any:
    """The default config of a type with its sizes made small."""
    return _shrunk(CONFIG_MAPPING[model_type]())


def model_class(model_type: str) -> tuple[type, str]:
    """The class of a whole model with a head, or the base model, and its kind; KeyError where no auto class has it."""
    tables = [(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"), kind) for task, kind in _KINDS.items()]
    for table, kind in (*tables, (modeling_auto.MODEL_MAPPING_NAMES, "other")):
        name = table.get(model_type)
        name = name[0] if isinstance(name, list | tuple) else name
        if name is not None and hasattr(transformers, name):
            return getattr(transformers, name), kind
    raise KeyError(f"no auto class makes a {model_type}")


def tiny_model(model_type: str, seed: int = 0) -> Any:
    """A model with random weights in fp32, in evaluation mode."""
    (kind, _), config = model_class(model_type), tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LIMIT:
        raise TooLargeError(f"{size / 1e6:.1f} M parameters")
    torch.manual_seed(seed)
    return kind(config).eval()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What its forward takes: tokens, pixels or sound."""
    generator = torch.Generator().manual_seed(1)
    taken, main, config = inspect.signature(model.forward).parameters, model.main_input_name, model.config
    vocabulary = min(getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY, FIRST_SPECIAL)
    made: dict[str, torch.Tensor] = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in taken:
            made[name] = torch.randint(min(5, vocabulary - 1), vocabulary, (1, TOKENS), generator=generator)
    both = "pixel_values" in taken and "input_ids" in taken and hasattr(config, "projection_dim")
    if main in ("pixel_values", "pixel_values_videos") or both:
        side, channels = _field(config, 32, "image_size", "img_size"), _field(config, 3, "num_channels", "in_channels")
        video = "video" in main or getattr(config, "num_frames", None) is not None
        shape = [1, *([_field(config, 4, "num_frames")] if video else []), channels, side, side]
        made[main if main.startswith("pixel") else "pixel_values"] = torch.randn(shape, generator=generator)
    mels = _field(config, 16, "num_mel_bins", "feature_projection_input_dim", "n_mels")
    if main == "input_values":
        spectrum = hasattr(config, "num_mel_bins") and hasattr(config, "max_length")
        shape = [1, config.max_length, mels] if spectrum else [1, 4000]
        made[main] = torch.randn(shape, generator=generator)
    if main == "input_features":
        frames = 2 * _field(config, 64, "max_source_positions")
        by_convolution = hasattr(config, "max_source_positions") and not hasattr(config, "conv_channels")
        shape = [1, mels, frames] if by_convolution else [1, frames, mels]
        made[main] = torch.randn(shape, generator=generator)
    return made


@torch.no_grad()
def output(model: Any) -> torch.Tensor:
    """What the model makes of its inputs, as one vector: logits, or the last hidden state."""
    found = model(**inputs(model))
    for name in ("logits", "last_hidden_state", "logits_per_image", "prediction_logits", "predicted_depth"):
        value = getattr(found, name, None)
        if isinstance(value, torch.Tensor):
            return value.float().flatten()
    tensors = [value for value in found.to_tuple() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return torch.cat([tensor.float().flatten() for tensor in tensors])


def _field(config: Any, default: int, *names: str) -> int:
    """The first of these fields that the config has, or one of its parts."""
    parts = [config, *(getattr(config, f"{part}_config", None) for part in ("vision", "audio", "backbone", "encoder"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return int(value if isinstance(value, int) else value[0])
    return default


# --- smaller ----------------------------------------------------------------------------------------------------------


def _shrunk(config: Any) -> Any:
    old = config.to_dict()
    subs = getattr(type(config), "sub_configs", {}) or {}
    fields: dict[str, Any] = {}
    for name, value in old.items():
        sub = getattr(config, name, None)
        if isinstance(sub, transformers.PreTrainedConfig):
            fields[name] = _shrunk(sub).to_dict()
        elif name not in _STAGES and (name not in subs or value is not None):
            fields[name] = _small(name, value)
    layers = [
        (old[name], fields[name])
        for name, value in fields.items()
        if type(value) is int and type(old[name]) is int and re.fullmatch(_LAYERS, name)
    ]
    for name, value in fields.items():  # a list with something for each layer
        if isinstance(value, list):
            fields[name] = next((value[:now] for was, now in layers if len(value) == was > now), value)
    if fields.get("head_dim") and {"num_attention_heads", "hidden_size"} <= fields.keys():
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention has one of each for each head
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return type(config).from_dict(fields)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _small(key, item) for key, item in value.items()}
    if name == "mrope_section":
        return [2, 3, 3]
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [_small(name, item) for item in value]
    if type(value) is not int or value <= 0 or _KEPT.fullmatch(name):
        return value
    if name.endswith("token_id"):
        return value if value < VOCABULARY else FIRST_SPECIAL + value % (VOCABULARY - FIRST_SPECIAL)
    return next((min(value, most) for pattern, most in _RULES if re.fullmatch(pattern, name)), value)
