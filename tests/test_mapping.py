"""Every element of a checkpoint goes where transformers puts it, and what does not come is named."""

import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8stream.mapping import Placement, checkpoint_names, find_places, model_tensors
from tests.oracle import same

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore")]

TINY: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
EXPERTS: Mapping[str, Any] = {**TINY, "num_experts_per_tok": 2}
VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": TINY,
    "llama-tied": {**TINY, "tie_word_embeddings": True},
    "qwen2": TINY,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 32,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
    "phi3": TINY,
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "deepseek_v3": {
        **EXPERTS,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama4_text": {
        **EXPERTS,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    "granitemoe": {**EXPERTS, "num_local_experts": 4},
    "ernie4_5_moe": {
        **EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TINY},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 1,
    },
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind.removesuffix("-tied"), **MODELS[kind])
    auto = transformers.AutoModelForCausalLM
    if kind == "llava":
        auto = transformers.AutoModelForImageTextToText
    model: nn.Module = auto.from_config(config)
    with torch.no_grad():
        for tensor in model_tensors(model).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of each kind, as transformers saves it."""
    logging.disable(logging.WARNING)
    directory = tmp_path_factory.mktemp("models") / str(request.param)
    build(request.param).save_pretrained(directory)
    return directory


def on_meta(kind: type, directory: Path) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model: nn.Module = kind(config).to(torch.bfloat16)
    return model


def tensors_in(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def shapes_of(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, tuple(tensor.shape)) for name, tensor in tensors.items())


def filled(model: nn.Module, found: Placement, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model's tensors hold once all is in its place; NaN where nothing came."""
    own = model_tensors(model)
    full = {n: torch.full(t.shape, torch.nan, dtype=torch.float32).to(t.dtype) for n, t in own.items()}
    for place in found.places:
        place.apply(full[place.target], tensors[place.source])
    for composed in found.composed:
        for name, tensor in composed.convert(tensors).items():
            full[found.ties.get(name, name)].copy_(tensor)
    return {name: full[found.ties.get(name, name)] for name in full}


def complete(found: Placement) -> bool:
    return not (found.missing or found.unexpected or found.stranded or found.optional)


def test_all_is_where_from_pretrained_puts_it(saved: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    if saved.name == "llava":
        auto = transformers.AutoModelForImageTextToText
    theirs, info = auto.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    model = on_meta(type(theirs), saved)
    tensors = tensors_in(saved)
    found = find_places(model, shapes_of(tensors))
    assert complete(found), found
    ours = filled(model, found, tensors)
    expected = model_tensors(theirs)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(ours[name], tensor.detach()), name


def test_names_and_shapes_are_those_that_are_saved(saved: Path) -> None:
    kind = type(build(saved.name))
    listed = checkpoint_names(on_meta(kind, saved))
    tensors = tensors_in(saved)
    assert len({one.name for one in listed}) == len(listed)
    assert {one.name: (one.shape, one.dtype) for one in listed} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    own = model_tensors(build(saved.name))
    for one in listed:
        made = torch.full(one.shape, torch.nan, dtype=torch.float32).to(one.dtype)
        for place in one.places:
            place.apply(made, own[place.source])
        assert same(made, tensors[one.name]), one.name
