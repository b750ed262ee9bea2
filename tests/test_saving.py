"""A live model saved is the converter's output, and an output loaded is the live model."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8stream import cli
from fp8stream.errors import SchemeError
from fp8stream.online import load_into
from fp8stream.saving import save
from fp8stream.skeleton import stored_tensors
from tests.oracle import same

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: Mapping[str, Any] = {**TINY, "num_experts_per_tok": 2}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": TINY,
    "llama-tied": {**TINY, "tie_word_embeddings": True},
    "qwen2": TINY,
    "opt": {
        **TINY,
        "ffn_dim": 256,
        "word_embed_proj_dim": 128,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 128, "num_experts": 4},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "deepseek_v3": {
        **EXPERTS,
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
    "llama4": {
        "text_config": {
            **EXPERTS,
            "hidden_size": 256,
            "head_dim": 128,
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
    "gpt_oss": {
        **EXPERTS,
        "head_dim": 64,
        "num_local_experts": 4,
        "layer_types": ["full_attention"] * 2,
    },
}
# Those that the converter and `save` both write.
WRITTEN = [kind for kind in CONFIGS if kind != "gpt_oss"]
schemes = pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])


def build(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind.removesuffix("-tied"), **CONFIGS[kind])
    vision = "vision_config" in CONFIGS[kind]
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    return getattr(transformers, auto).from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint of each kind, as transformers saves it."""

    @cache
    def made(kind: str) -> Path:
        torch.manual_seed(0)
        model = build(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
            for module in model.modules():
                if hasattr(module, "e_score_correction_bias"):
                    # As DeepSeek has it, and transformers keeps it.
                    module.e_score_correction_bias.data = torch.randn(4)
        directory = tmp_path_factory.mktemp(kind)
        model.save_pretrained(directory)
        return directory

    return made


def live(kind: str, source: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = build(kind)
    load_into(model, source, **options)
    return model


def contents(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same(one[name], other[name])] == []


@pytest.mark.parametrize("kind", WRITTEN)
@schemes
def test_what_is_saved_is_what_the_converter_writes_and_loads_as_it_was(
    tmp_path: Path, source_of: Callable[[str], Path], kind: str, scheme: str
) -> None:
    source = source_of(kind)
    model = live(kind, source, scheme=scheme)
    save(model, tmp_path / "saved")
    arguments = ["quantize", str(source), str(tmp_path / "converted"), "--scheme", scheme, "-q"]
    assert cli.main(arguments) == 0
    assert_same(contents(tmp_path / "saved"), contents(tmp_path / "converted"))
    again = live(kind, tmp_path / "converted")
    assert_same(stored_tensors(again), stored_tensors(model))


@schemes
def test_experts_one_by_one_are_loaded_as_fused_ones(
    source_of: Callable[[str], Path], scheme: str
) -> None:
    """The form in which engines, and so the converter, have those of Llama-4."""
    fused = contents(source_of("llama4"))
    apart: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        module, _, leaf = name.rpartition(".")
        cut = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
        for expert, matrix in enumerate(tensor.mT if cut else ()):
            for part, one in zip(cut, matrix.chunk(len(cut)), strict=True):
                apart[f"{module}.{expert}.{part}.weight"] = one.contiguous()
        if not cut:
            apart[name] = tensor
    assert len(apart) == len(fused) - 2 * 2 + 2 * 4 * 3
    wanted = stored_tensors(live("llama4", source_of("llama4"), scheme=scheme))
    assert_same(stored_tensors(live("llama4", apart, scheme=scheme)), wanted)


def test_what_is_not_fp8_is_not_saved_as_such(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="nothing of the model is FP8"):
        save(nn.Linear(4, 4), tmp_path / "out")
    assert not (tmp_path / "out").exists()
