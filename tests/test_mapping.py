"""Every element of a checkpoint goes where transformers puts it; what does not come is named."""

import copy
import logging
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8stream.errors import CheckpointError, Fp8StreamError, SchemeError
from fp8stream.mapping import (
    Part,
    Placement,
    Rule,
    checkpoint_names,
    find_places,
    model_tensors,
)
from fp8stream.tracing import traced
from tests.oracle import same
from tests.tiny import computing

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
LLAMA4: Mapping[str, Any] = {
    **EXPERTS,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
}
ROPE: Mapping[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
QWEN_VISION: Mapping[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
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
    "llama4_text": LLAMA4,
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    "granitemoe": {**EXPERTS, "num_local_experts": 4},
    "ernie4_5_moe": {
        **EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "qwen3_vl_moe": {
        "text_config": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, **ROPE},
        "vision_config": QWEN_VISION,
    },
    "llama4": {
        "text_config": LLAMA4,
        "vision_config": {
            **VISION,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "pixel_shuffle_ratio": 0.5,
        },
    },
    "qwen2_vl": {
        "text_config": {**TINY, **ROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    },
    "llava": {
        "text_config": {"model_type": "llama", **TINY},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 1,
    },
}


def auto(kind: str) -> Any:
    if "vision_config" in MODELS[kind]:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind.removesuffix("-tied"), **MODELS[kind])
    model: nn.Module = auto(kind).from_config(config)
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
    model: Any = build(request.param)
    model.save_pretrained(directory)
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
    full = {
        n: torch.full(t.shape, torch.nan, dtype=torch.float32).to(t.dtype) for n, t in own.items()
    }
    for place in found.places:
        place.apply(full[place.target], tensors[place.source])
    for composed in found.composed:
        for name, tensor in composed.convert(tensors).items():
            full[found.ties.get(name, name)].copy_(tensor)
    return {name: full[found.ties.get(name, name)] for name in full}


def complete(found: Placement) -> bool:
    return not (found.missing or found.unexpected or found.stranded or found.optional)


def test_all_is_where_from_pretrained_puts_it(saved: Path) -> None:
    theirs, info = auto(saved.name).from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    model = on_meta(type(theirs), saved)
    tensors = tensors_in(saved)
    found = find_places(model, shapes_of(tensors))
    assert complete(found), found
    ours = filled(model, found, tensors)
    expected = model_tensors(theirs)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(ours[name].to(tensor.dtype), tensor.detach()), name


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


def test_the_order_of_names_does_not_matter(saved: Path) -> None:
    model = on_meta(type(build(saved.name)), saved)
    names = list(shapes_of(tensors_in(saved)))
    first = find_places(model, names)
    for seed in range(3):
        random.Random(seed).shuffle(names)
        again = find_places(model, names)
        assert set(again.places) == set(first.places)
        assert complete(again)


def test_what_was_loaded_is_saved_under_the_names_it_came_by(saved: Path) -> None:
    model = on_meta(type(build(saved.name)), saved)
    names = [name for name, _ in shapes_of(tensors_in(saved))]
    found = find_places(model, shapes_of(tensors_in(saved)))
    model._weight_conversions = list(found.conversions)  # type: ignore[assignment]
    assert sorted(one.name for one in checkpoint_names(model)) == sorted(names)


def tiny(kind: str, head: str = "AutoModelForCausalLM", **more: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, **{**MODELS[kind], **more})
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, head).from_config(config)
    return model


def names_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {one.name: one.shape for one in checkpoint_names(model)}


def test_a_base_model_goes_into_one_with_a_head() -> None:
    names = names_of(tiny("qwen3_moe", "AutoModel"))
    assert "layers.0.mlp.experts.0.gate_proj.weight" in names
    found = find_places(tiny("qwen3_moe"), names.items())
    assert [str(gap) for gap in found.missing] == ["lm_head.weight"]
    assert not found.unexpected
    assert len(found.places) == len(names)


def test_a_model_with_a_head_goes_into_a_base_model() -> None:
    names = names_of(tiny("qwen3_moe"))
    found = find_places(tiny("qwen3_moe", "AutoModel"), names.items())
    assert not found.missing
    assert found.unexpected == ("lm_head.weight",)


def test_what_is_missing_and_what_is_too_much() -> None:
    names = names_of(tiny("llama"))
    del names["model.layers.1.mlp.up_proj.weight"]
    names |= {"model.layers.7.mlp.up_proj.weight": (48, 32), "rotary_emb.inv_freq": (4,)}
    found = find_places(tiny("llama"), names.items())
    assert [str(gap) for gap in found.missing] == ["model.layers.1.mlp.up_proj.weight"]
    assert found.unexpected == ("model.layers.7.mlp.up_proj.weight",)
    assert found.ignored == ("rotary_emb.inv_freq",)


def test_a_shape_that_is_not_the_models() -> None:
    names = names_of(tiny("llama")) | {"lm_head.weight": (63, 32)}
    with pytest.raises(CheckpointError, match=r"lm_head.weight: expected \(64, 32\), found \(63"):
        find_places(tiny("llama"), names.items())
    experts = {
        n: (s[0], 7) if "down_proj" in n else s for n, s in names_of(tiny("mixtral")).items()
    }
    experts = {n: (32, 7) if ".w2." in n else s for n, s in experts.items()}
    with pytest.raises(
        CheckpointError, match=r"for model.layers.0.mlp.experts.down_proj: expected"
    ):
        find_places(tiny("mixtral"), experts.items())


@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        (r"\.1\.mlp\.experts\.2\.up_proj", ["1.mlp.experts.gate_up_proj[2:3, 16:32, 0:32]"]),
        (r"\.1\.mlp\.experts\.3\.down_proj", ["1.mlp.experts.down_proj[3:4, 0:32, 0:16]"]),
        (r"\.1\.mlp\.experts\.[13]\.gate_proj",
         ["1.mlp.experts.gate_up_proj[1:2, 0:16, 0:32]",
          "1.mlp.experts.gate_up_proj[3:4, 0:16, 0:32]"]),
        (r"\.0\.mlp\.experts\.0\.", ["0.mlp.experts.gate_up_proj[0:1, 0:32, 0:32]",
                                     "0.mlp.experts.down_proj[0:1, 0:32, 0:16]"]),
        (r"\.0\.mlp\.experts\.\d\.gate_proj", ["0.mlp.experts.gate_up_proj[0:4, 0:16, 0:32]"]),
        (r"\.0\.mlp\.experts\.\d\.down_proj", ["0.mlp.experts.down_proj"]),
    ],
)  # fmt: skip
def test_an_expert_that_is_missing_is_named_and_the_others_keep_their_places(
    gone: str, missing: list[str]
) -> None:
    model = tiny("qwen3_moe")
    names = names_of(model)
    everything = set(find_places(model, names.items()).places)
    rest = {name: shape for name, shape in names.items() if not re.search(gone, name)}
    found = find_places(model, rest.items())
    assert sorted(map(str, found.missing)) == sorted(f"model.layers.{one}" for one in missing)
    assert set(found.places) == {place for place in everything if place.source in rest}
    assert not found.unexpected
    assert not found.stranded


# How the experts of models lie whose own checkpoints are fused: transposed, and in turns.
FUSED = {
    "llama4_text": (True, False),
    "llama4": (True, False),
    "qwen3_vl_moe": (False, False),
    "granitemoe": (False, False),
    "gpt_oss": (True, True),
}


def apart(tensors: Mapping[str, Tensor], transposed: bool, turns: bool) -> dict[str, Tensor]:
    """A model's `tensors` with those of experts as engines have them, matrix by matrix."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor.mT if transposed else tensor):
            half = len(matrix) // 2
            cut = (matrix[::2], matrix[1::2]) if turns else (matrix[:half], matrix[half:])
            named = {"gate_proj": cut[0], "up_proj": cut[1]}
            for part, one in ({leaf: matrix} if leaf == "down_proj" else named).items():
                found[f"{module}.{expert}.{part}.weight"] = one.contiguous()
    return found


@pytest.mark.parametrize("kind", list(FUSED))
def test_experts_one_by_one_go_into_the_tensor_that_the_model_has(kind: str) -> None:
    """As the converter writes them for engines: transformers knows of fused ones alone."""
    model = build(kind)
    expected = {name: tensor.detach() for name, tensor in model_tensors(model).items()}
    tensors = apart(expected, *FUSED[kind])
    assert any(".experts.3.up_proj.weight" in name for name in tensors)
    found = find_places(model, shapes_of(tensors))
    assert complete(found), found
    ours = filled(model, found, tensors)
    for name, tensor in expected.items():
        assert same(ours[name], tensor), name
    part = {name: tensor for name, tensor in tensors.items() if ".experts.2.up_" not in name}
    gaps = find_places(model, shapes_of(part)).missing
    assert {gap.target.rpartition(".")[2] for gap in gaps} == {"gate_up_proj"}
    assert {gap.region[0] for gap in gaps} == {range(2, 3)}


def test_experts_one_by_one_are_not_taken_for_a_dense_layer() -> None:
    """MiniMax-M3's own conversion makes `gate_up_proj` of every `gate_proj` and `up_proj`."""
    text = {**EXPERTS, "num_local_experts": 4}
    config = transformers.AutoConfig.for_model("minimax_m3_vl", text_config=text)
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    saved = {name: shape for name, shape in names_of(model).items() if ".experts." not in name}
    at = "language_model.model.layers.0.block_sparse_moe.experts"
    halves = [
        (f"{at}.{n}.{part}.weight", (48, 32)) for n in range(4) for part in ("gate_proj", "up_proj")
    ]
    found = find_places(model, [*saved.items(), *halves])
    assert not found.unexpected
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in found.by_target
    assert all("layers.0.mlp.experts.gate_up" not in gap.target for gap in found.missing)


def test_experts_one_by_one_where_there_are_none_such() -> None:
    model = tiny("llama4_text")
    names = {n: tuple(t.shape) for n, t in apart(model_tensors(model), True, False).items()}
    at = "model.layers.0.feed_forward"
    more = {f"{at}.experts.4.up_proj.weight": (48, 32), f"{at}.others.0.up_proj.weight": (48, 32)}
    found = find_places(model, {**names, **more}.items())
    assert sorted(found.unexpected) == sorted(more)
    assert not found.missing
    wrong = {f"{at}.experts.1.down_proj.weight": (48, 32)}
    with pytest.raises(
        CheckpointError, match=r"1.down_proj.* for .*down_proj: expected \(48, 32\)"
    ):
        find_places(model, {**names, **wrong}.items())
    # Not by one name each and fused as well.
    with pytest.raises(
        CheckpointError, match=r"both fill model.layers.0.feed_forward.experts.down"
    ):
        find_places(model, {**names, f"{at}.experts.down_proj": (4, 48, 32)}.items())
    assert find_places(tiny("llama"), more.items()).unexpected == tuple(more)


def test_experts_one_by_one_of_a_base_model_and_into_one() -> None:
    model, base = tiny("granitemoe"), tiny("granitemoe", "AutoModel")
    of_base = {n: tuple(t.shape) for n, t in apart(model_tensors(base), False, False).items()}
    assert "layers.0.block_sparse_moe.experts.0.gate_proj.weight" in of_base
    found = find_places(model, of_base.items())
    assert [str(gap) for gap in found.missing] == ["lm_head.weight"]
    of_all = {n: tuple(t.shape) for n, t in apart(model_tensors(model), False, False).items()}
    found = find_places(base, of_all.items())
    assert found.unexpected == ("lm_head.weight",)
    assert not found.missing


def test_experts_one_by_one_in_any_module_that_has_them_in_one() -> None:
    llama4 = transformers.models.llama4.modeling_llama4
    config = transformers.Llama4TextConfig(**LLAMA4)
    for model, at in (
        (nn.ModuleDict({"it": llama4.Llama4TextExperts(config)}), "it."),
        (llama4.Llama4TextExperts(config), ""),
    ):
        names = [f"{at}{n}.gate_proj.weight" for n in range(4)]
        found = find_places(model, [(name, (48, 32)) for name in names])
        assert not found.unexpected
        gap = f"{at}gate_up_proj[0:4, 0:32, 48:96]"
        assert [str(one) for one in found.missing] == [gap, f"{at}down_proj"]


def test_an_expert_too_many_does_not_take_the_place_of_another() -> None:
    names = names_of(tiny("mixtral"))
    other = {name.replace("experts.3.", "experts.4."): shape for name, shape in names.items()}
    found = find_places(tiny("mixtral"), other.items())
    assert {gap.target.rpartition(".")[2] for gap in found.missing} == {"gate_up_proj", "down_proj"}
    assert all("experts" in name for name in found.stranded)
    assert len(found.stranded) == 2 * 4 * 3


def test_two_tensors_for_one_place() -> None:
    names = names_of(tiny("llama"))
    names |= {"layers.0.mlp.up_proj.weight": (48, 32)}
    with pytest.raises(
        CheckpointError, match=r"layers.0.mlp.up_proj.weight and model.layers.0.mlp"
    ):
        find_places(tiny("llama"), names.items())
    with pytest.raises(CheckpointError, match="comes twice"):
        find_places(tiny("llama"), [("a", (1,)), ("a", (1,))])
    experts = names_of(tiny("mixtral"))
    experts |= {"layers.0.block_sparse_moe.experts.2.w1.weight": (48, 32)}
    with pytest.raises(
        CheckpointError, match=r"layers.0.block_sparse_moe.experts.2.w1.* same place"
    ):
        find_places(tiny("mixtral"), experts.items())


def test_what_is_tied_comes_once_under_either_name_or_twice() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    names = names_of(model)
    assert "lm_head.weight" not in names
    embedding = "model.embed_tokens.weight"
    found = find_places(model, names.items())
    assert complete(found)
    assert found.ties == {"lm_head.weight": embedding}
    head = {n.replace(embedding, "lm_head.weight"): shape for n, shape in names.items()}
    found = find_places(model, head.items())
    assert complete(found)
    assert [place.source for place in found.by_target[embedding]] == ["lm_head.weight"]
    both = find_places(model, {**names, "lm_head.weight": (64, 32)}.items())
    assert complete(both)
    assert [(place.source, place.target) for place in both.duplicates] == [
        ("lm_head.weight", embedding)
    ]
    gone = find_places(model, [(n, s) for n, s in names.items() if n != embedding])
    assert [str(gap) for gap in gone.missing] == [embedding]


def test_ties_whose_tensors_are_two_objects_are_still_ties() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.empty(64, 32, device="meta"))  # type: ignore[union-attr]
    assert complete(find_places(model, names_of(model).items()))
    assert "lm_head.weight" not in names_of(model)


class Plain(nn.Module):
    """Everything that a module may hold, and nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 4)
        self.again = self.one
        self.tied = nn.Linear(8, 4, bias=False)
        self.tied.weight = self.one.weight
        self.register_buffer("kept", torch.zeros(()))
        self.register_buffer("none", None)
        self.register_buffer("made", torch.zeros(3), persistent=False)
        self.empty = nn.Parameter(torch.zeros(0, 4))


def test_any_module_by_equal_names() -> None:
    model = Plain()
    names = {"one.weight": (4, 8), "one.bias": (4,), "kept": (), "empty": (0, 4)}
    assert names_of(model) == names
    found = find_places(model, names.items())
    assert complete(found)
    tensors = {name: torch.rand(shape) for name, shape in names.items()}
    ours = filled(model, found, tensors)
    for name in ("one.weight", "again.weight", "tied.weight"):
        assert same(ours[name], tensors["one.weight"])
    assert same(ours["kept"], tensors["kept"])
    found = find_places(model, [("tied.weight", (4, 8)), ("made", (3,))])
    assert sorted(map(str, found.missing)) == ["kept", "one.bias"]
    assert found.unexpected == ("made",)


def holder(**shapes: tuple[int, ...]) -> nn.Module:
    """A module whose parameters have these names, `__` for a dot, and shapes."""
    model = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split("__")
        at = model
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
    return model


APART = {"a.q.weight": (6, 4), "a.k.weight": (2, 4), "a.v.weight": (2, 4)}
FUSE = {
    r"re:(.+)\.q\.weight": Part(r"\1.qkv", slice(0, 6)),
    r"re:(.+)\.k\.weight": Part(r"\1.qkv", slice(6, 8)),
    r"re:(.+)\.v\.weight": Part(r"\1.qkv", slice(8, 10)),
}
SPLIT = {
    r"re:(.+)\.qkv": [
        Part(r"\1.q.weight", source_index=slice(0, 6)),
        Part(r"\1.k.weight", source_index=slice(6, 8)),
        Part(r"\1.v.weight", source_index=slice(8, 10)),
    ]
}


def test_a_fused_projection_both_ways() -> None:
    tensors = {name: torch.rand(shape) for name, shape in APART.items()}
    fused = holder(a__qkv=(10, 4))
    found = find_places(fused, APART.items(), FUSE)
    assert complete(found)
    assert not found.unused
    whole = filled(fused, found, tensors)
    assert torch.equal(whole["a.qkv"], torch.cat(list(tensors.values())))
    split = holder(a__q__weight=(6, 4), a__k__weight=(2, 4), a__v__weight=(2, 4))
    found = find_places(split, [("a.qkv", (10, 4))], SPLIT)
    assert complete(found)
    back = filled(split, found, whole)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_rows_that_a_mapping_sends_nowhere_are_told() -> None:
    rules: dict[str, Rule] = {"a": [Part("b", source_index=(slice(1, 3), slice(0, 4)))]}
    found = find_places(holder(b=(2, 4)), [("a", (5, 4))], rules)
    assert [str(gap) for gap in found.leftover] == ["a[0:1, 0:4]", "a[3:5, 0:4]"]
    twice: dict[str, Rule] = {"a": [Part("b"), Part("c", source_index=0)]}
    found = find_places(holder(b=(2, 4), c=(4,)), [("a", (2, 4))], twice)
    assert complete(found)
    assert not found.leftover


@pytest.mark.parametrize("rows", [(slice(0, 3), slice(3, 6)), (slice(0, 6, 2), slice(1, 6, 2))])
@pytest.mark.parametrize("transpose", [False, True])
def test_experts_both_ways_in_halves_or_alternating_and_transposed(
    rows: tuple[slice, slice], transpose: bool
) -> None:
    parts = dict(zip(("gate", "up"), rows, strict=True))
    shape = (4, 3) if transpose else (3, 4)
    names = {f"m.{n}.{part}.weight": shape for n in range(2) for part in parts}
    tensors = {name: torch.rand(shape) for name in names}
    fuse = {
        rf"re:(.+)\.(\d+)\.{part}\.weight": Part(r"\1.gate_up", (r"\2", at), transpose=transpose)
        for part, at in parts.items()
    }
    fused = holder(m__gate_up=(2, 6, 4))
    found = find_places(fused, names.items(), fuse)
    assert complete(found)
    whole = filled(fused, found, tensors)["m.gate_up"]
    for n in range(2):
        for part, at in parts.items():
            one = tensors[f"m.{n}.{part}.weight"]
            assert torch.equal(whole[n, at], one.T if transpose else one)
    split = {
        r"re:(.+)\.gate_up": [
            Part(rf"\1.{n}.{part}.weight", source_index=(n, at), transpose=transpose)
            for n in range(2)
            for part, at in parts.items()
        ]
    }
    apart = holder(**{name.replace(".", "__"): shape for name in names})
    found = find_places(apart, [("m.gate_up", (2, 6, 4))], split)
    assert complete(found)
    back = filled(apart, found, {"m.gate_up": whole})
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_the_rest_goes_by_name_and_none_leaves_out() -> None:
    model = holder(a__qkv=(10, 4), b=(2,))
    names = {**APART, "b": (2,), "mtp.x": (3,), "other": (1,)}
    rules = {**FUSE, r"re:mtp\..*": None, "never": "b"}
    found = find_places(model, names.items(), rules)
    assert found.ignored == ("mtp.x",)
    assert found.unexpected == ("other",)
    assert found.unused == ("never",)
    assert not found.missing
    found = find_places(model, {k: v for k, v in names.items() if ".k." not in k}.items(), rules)
    assert [str(gap) for gap in found.missing] == ["a.qkv[6:8, 0:4]"]


def test_a_mapping_may_add_to_what_transformers_knows() -> None:
    names = names_of(tiny("qwen3_moe"))
    odd = {name.replace("lm_head.weight", "output.w"): shape for name, shape in names.items()}
    assert find_places(tiny("qwen3_moe"), odd.items()).unexpected == ("output.w",)
    assert complete(find_places(tiny("qwen3_moe"), odd.items(), {"output.w": "lm_head.weight"}))


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"a": "c"}, SchemeError, "the model has no c"),
        ({"a": Part("b", slice(0, 11))}, SchemeError, "0:11 is no part of an axis of 10"),
        ({"a": Part("b", 10)}, SchemeError, "10 is no index of an axis of 10"),
        ({"a": Part("b", slice(0, 5))}, SchemeError, r"expected \(5, 4\), found \(6, 4\)"),
        ({"a": Part("b", (0, 0, 0))}, SchemeError, "3 indices, but 2 axes"),
        ({"re:(a": "b"}, SchemeError, "not a regular expression"),
        ({"re:(a)": Part("b", r"\2")}, SchemeError, "invalid group reference"),
        ({"re:(a)": Part("b", r"\1")}, SchemeError, "invalid literal"),
        ({"a": [Part("b", slice(0, 6)), Part("b", slice(4, 10))]}, CheckpointError,
         r"a and a both fill b\[4:6, 0:4\]"),
    ],
)  # fmt: skip
def test_a_mapping_that_cannot_be_followed(
    rules: dict[str, Rule], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_places(holder(b=(10, 4)), [("a", (6, 4))], rules)


# Shapes for transformers' converters: sources of so many axes, and the sides of what is asked for.
SOURCES = {1: (12,), 2: (12, 8), 3: (6, 12, 8)}
TARGETS = [(3, 8), (4, 8), (12, 8), (8, 12), (6, 8, 12), (6, 12, 8)]


class Known(SimpleNamespace):
    """As much of a model and its config as converters ask for."""

    num_attention_heads = 2
    split_ngram_parts = 3

    @property
    def vision_config(self) -> "Known":
        return self

    def get_text_config(self) -> "Known":
        return self

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shape, device="meta")


def every_converter() -> Iterator[Any]:
    mapping = transformers.conversion_mapping._build_checkpoint_conversion_mapping()
    for kind, transforms in mapping.items():
        for one in transforms:
            if isinstance(one, transformers.core_model_loading.WeightConverter):
                yield pytest.param(one, id=f"{kind}-{one.target_patterns[0]}")
                yield pytest.param(one.reverse_transform(), id=f"{kind}-{one.target_patterns[0]}-r")


def converted(
    converter: Any, model: Known, tensors: Mapping[str, Sequence[Tensor]]
) -> dict[str, Any]:
    fresh = copy.deepcopy(converter)
    key = "x." + converter.target_patterns[0].replace("*", "0") + ".y"
    for pattern, of_pattern in tensors.items():
        for tensor in of_pattern:
            fresh.add_tensor(key, key, pattern, tensor)
    made = fresh.convert(key, model=model, config=model)
    return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}


@pytest.mark.parametrize("converter", list(every_converter()))
def test_every_conversion_of_transformers_is_geometry(converter: Any) -> None:
    """Run on numbers, each gives what its pieces say, whatever the shapes that it can take."""
    ran = 0
    for shape in SOURCES.values():
        counts = {p: 4 if "*." in p else 1 for p in converter.source_patterns}
        names = {p: [f"{p} {n}" for n in range(count)] for p, count in counts.items()}
        every = [name for of_pattern in names.values() for name in of_pattern]
        size = torch.Size(shape).numel()
        sources = {
            name: torch.arange(size).reshape(shape) + size * n for n, name in enumerate(every)
        }
        ghosts = {p: [traced(n, shape) for n in of_pattern] for p, of_pattern in names.items()}
        numbers = {p: [sources[n].clone() for n in found] for p, found in names.items()}
        for target in TARGETS:
            try:
                real = converted(converter, Known(shape=target), numbers)
            except (ValueError, RuntimeError, IndexError):
                continue
            made = converted(converter, Known(shape=target), ghosts)
            assert made.keys() == real.keys()
            for name, tensor in real.items():
                full = torch.full(tensor.shape, -1)
                for piece in made[name].pieces:
                    piece.place(name, made[name].sides).apply(full, sources[piece.source])
                assert torch.equal(full, tensor), (name, shape)
            ran += 1
    assert ran


def test_what_transformers_computes_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    computing(monkeypatch)
    model = tiny("llama")
    names = names_of(model)
    at = "model.layers.0.self_attn"
    assert (names[f"{at}.left.weight"], names[f"{at}.right.weight"]) == ((16, 32), (16, 32))
    found = find_places(model, names.items())
    assert complete(found)
    assert [one.sources for one in found.composed] == [
        (f"model.layers.{n}.self_attn.left.weight", f"model.layers.{n}.self_attn.right.weight")
        for n in range(2)
    ]
    halves = {name: torch.rand(16, 32) for name in found.composed[0].sources}
    whole = found.composed[0].convert(halves)
    assert list(whole) == [f"{at}.q_proj.weight"]
    assert torch.equal(whole[f"{at}.q_proj.weight"], 2 * torch.cat(list(halves.values())))
    back = next(one for one in checkpoint_names(model) if one.name == f"{at}.left.weight")
    assert back.composed is not None
    again = back.composed.convert(whole)
    assert torch.equal(again[back.name], halves[back.name])
    del names[f"{at}.left.weight"]
    found = find_places(model, names.items())
    assert [str(gap) for gap in found.missing] == [f"{at}.q_proj.weight"]
    assert found.stranded == (f"{at}.right.weight",)


def test_another_transformers_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.delattr(transformers.core_model_loading, "rename_source_key")
    with pytest.raises(Fp8StreamError, match=r"cannot tell how LlamaForCausalLM is stored"):
        find_places(model, [])


def test_transformers_is_not_imported_for_any_other_module() -> None:
    code = (
        "import sys; from torch import nn; from fp8stream.mapping import *; "
        "find_places(nn.Linear(2, 2), [('weight', (2, 2))]); checkpoint_names(nn.Linear(2, 2)); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_very_many_experts_take_seconds() -> None:
    more: dict[str, Any] = {"num_hidden_layers": 8, "num_experts": 512}
    model = tiny("qwen3_moe", **more)
    names = names_of(model)
    assert len(names) > 12_000
    start = time.process_time()
    found = find_places(model, names.items())
    assert time.process_time() - start < 5
    assert complete(found)


def test_very_much_that_is_missing_takes_seconds() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({str(number): nn.Linear(2, 2) for number in range(20_000)})
    model._keys_to_ignore_on_load_missing = [r"9\.bias"]  # type: ignore[assignment]
    start = time.process_time()
    found = find_places(model, [])
    assert time.process_time() - start < 5
    assert (len(found.missing), len(found.optional)) == (38_000, 2_000)
