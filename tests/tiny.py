"""Small models of transformers, of every architecture that is laid out in its own way."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
EXPERTS: Mapping[str, Any] = {**TINY, "num_experts_per_tok": 2}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": TINY,
    "llama-tied": {**TINY, "tie_word_embeddings": True},
    "qwen2": TINY,
    "opt": {
        "hidden_size": 128,
        "ffn_dim": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 128,
    },
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 320, "n_positions": 64},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 128},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    "llama4": {
        "text_config": {
            **EXPERTS,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    },
    "deepseek_v3": {
        **EXPERTS,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
}


def automatic(kind: str) -> Any:
    if "vision_config" in CONFIGS[kind]:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has transformers keep q_proj in two halves, each half as large: a conversion that computes,
    which none of its own does."""
    loading: Any = transformers.core_model_loading

    class Doubled(loading.ConversionOps):  # type: ignore[misc]
        def convert(self, tensors: Any, *_: Any, **__: Any) -> Any:
            return {"q_proj": 2 * torch.cat([tensors["left"][0], tensors["right"][0]])}

        @property
        def reverse_op(self) -> Any:
            return Halved()

    class Halved(loading.ConversionOps):  # type: ignore[misc]
        def convert(self, tensors: Any, *_: Any, **__: Any) -> Any:
            return dict(zip(("left", "right"), (tensors["q_proj"][0] / 2).chunk(2), strict=True))

    def theirs(*_: Any, **__: Any) -> list[Any]:
        return [loading.WeightConverter(["left", "right"], ["q_proj"], [Doubled()])]

    monkeypatch.setattr(transformers.conversion_mapping, "get_model_conversion_mapping", theirs)
