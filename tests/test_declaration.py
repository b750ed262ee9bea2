"""What config.json says is quantized is what the files hold, for every engine that reads it.

Small models of many kinds are quantized; the matching of compressed-tensors and of transformers,
and vLLM's rules, then read the written config and must name exactly the modules that carry FP8
weights, in the group that their scales show. Engines rename modules as they load, so the same must
hold with a prefix added or dropped. What cannot be declared truly must be refused.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fp8stream.checkpoint import open_checkpoint
from fp8stream.declaration import Modules, declare
from fp8stream.errors import SchemeError
from fp8stream.plan import Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from tests import readers
from tests.conftest import Run, write_checkpoint

Runner = Callable[..., Run]
Shapes = dict[str, tuple[int, ...]]

H, INNER, V, EXPERTS = 256, 384, 96, 2
FP8 = OutputFormat.FP8
SCHEMES = [
    Scheme(Granularity.CHANNEL),
    Scheme(Granularity.BLOCK),
    Scheme(Granularity.TENSOR),
    Scheme(Granularity.BLOCK, FP8),
    Scheme(Granularity.TENSOR, FP8),
]
schemes = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.granularity.value}-{s.format.value}"
)
STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv": ("query", "key", "value"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


@dataclass
class Arch:
    """A kind of model: its config, the shape of every tensor, and which modules are linear layers.

    `leaves` are the names by which vLLM asks for its experts.
    """

    config: dict[str, Any]
    shapes: Shapes = field(default_factory=dict)
    linear: set[str] = field(default_factory=set)
    leaves: Sequence[str] = readers.EXPERT_LEAVES

    def matrices(self, at: str, **sides: tuple[int, int]) -> None:
        """Linear layers in the module `at`; `__` in a name stands for a point."""
        for name, shape in sides.items():
            module = f"{at}.{name.replace('__', '.')}" if at else name.replace("__", ".")
            self.linear.add(module)
            self.shapes[f"{module}.weight"] = shape

    def other(self, at: str, **shapes: tuple[int, ...]) -> None:
        """Tensors that belong to no linear layer."""
        for name, shape in shapes.items():
            self.shapes[f"{at}.{name.replace('__', '.')}"] = shape

    def attention(self, at: str, width: int = H, kv: int = H) -> None:
        self.matrices(at, q_proj=(width, width), k_proj=(kv, width), v_proj=(kv, width))
        self.matrices(at, o_proj=(width, width))

    def mlp(self, at: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> None:
        *inner, down = names
        self.matrices(at, **dict.fromkeys(inner, (INNER, H)), **{down: (H, INNER)})

    def experts(
        self, at: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
    ) -> None:
        for number in range(EXPERTS):
            self.mlp(f"{at}.{number}", names)

    def outer(self, at: str = "model", head: str = "lm_head", layers: int = 2) -> Iterator[str]:
        """Embedding, norms and head; the layers' names to fill."""
        self.other(at, embed_tokens__weight=(V, H), norm__weight=(H,))
        if head:
            self.matrices("", **{head.replace(".", "__"): (V, H)})
        for number in range(layers):
            layer = f"{at}.layers.{number}"
            self.other(layer, input_layernorm__weight=(H,), post_attention_layernorm__weight=(H,))
            yield layer

    @property
    def lookups(self) -> set[str]:
        return {n.removesuffix(".weight") for n in self.shapes if "embed" in n} - self.linear

    @property
    def expert_modules(self) -> set[str]:
        within = (name.partition(".experts.") for name in (*self.shapes, *self.linear))
        return {f"{before}.experts" for before, found, _ in within if found}


def config(model_type: str, layers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": ["X"],
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "vocab_size": V,
        **more,
    }


def llama(tied: bool = False) -> Arch:
    arch = Arch(config("llama", tie_word_embeddings=tied))
    for layer in arch.outer(head="" if tied else "lm_head"):
        arch.attention(f"{layer}.self_attn", kv=128)
        arch.mlp(f"{layer}.mlp")
    if tied:
        arch.linear.add("lm_head")
    return arch


def llama_ragged() -> Arch:
    """Block scales fit half of it: k and v of 192 rows, and gate of an odd width in one layer."""
    arch = Arch(config("llama"))
    for number, layer in enumerate(arch.outer()):
        arch.attention(f"{layer}.self_attn", kv=192 if number else 128)
        arch.mlp(f"{layer}.mlp")
    return arch


def qwen3_moe() -> Arch:
    arch = Arch(config("qwen3_moe", num_experts=EXPERTS, moe_intermediate_size=INNER))
    for layer in arch.outer():
        arch.attention(f"{layer}.self_attn")
        arch.matrices(f"{layer}.mlp", gate=(EXPERTS, H), shared_expert_gate=(1, H))
        arch.mlp(f"{layer}.mlp.shared_expert")
        arch.experts(f"{layer}.mlp.experts")
    return arch


def mixtral() -> Arch:
    arch = Arch(config("mixtral", num_local_experts=EXPERTS), leaves=readers.MIXTRAL_LEAVES)
    for layer in arch.outer():
        arch.attention(f"{layer}.self_attn")
        arch.matrices(f"{layer}.block_sparse_moe", gate=(EXPERTS, H))
        arch.experts(f"{layer}.block_sparse_moe.experts", ("w1", "w3", "w2"))
    return arch


def gpt_oss() -> Arch:
    arch = Arch(config("gpt_oss", num_local_experts=EXPERTS))
    for layer in arch.outer():
        arch.attention(f"{layer}.self_attn")
        arch.other(layer, self_attn__sinks=(4,), self_attn__q_proj__bias=(H,))
        arch.matrices(f"{layer}.mlp", router=(EXPERTS, H))
        arch.other(
            f"{layer}.mlp.experts",
            gate_up_proj=(EXPERTS, H, 2 * INNER),
            down_proj=(EXPERTS, INNER, H),
        )
        arch.other(f"{layer}.mlp.experts", gate_up_proj_bias=(EXPERTS, 2 * INNER))
        arch.other(f"{layer}.mlp.experts", down_proj_bias=(EXPERTS, H))
    return arch


def llama4() -> Arch:
    text = config("llama4_text", num_local_experts=EXPERTS, intermediate_size_mlp=INNER)
    vision = {"model_type": "llama4_vision_model", "hidden_size": 128, "num_hidden_layers": 2}
    arch = Arch(
        {
            "model_type": "llama4",
            "architectures": ["X"],
            "text_config": text,
            "vision_config": vision,
        }
    )
    for number, layer in enumerate(arch.outer("language_model.model", "language_model.lm_head")):
        arch.attention(f"{layer}.self_attn")
        if number == 0:
            arch.mlp(f"{layer}.feed_forward")
            continue
        arch.matrices(f"{layer}.feed_forward", router=(EXPERTS, H))
        arch.mlp(f"{layer}.feed_forward.shared_expert")
        at = f"{layer}.feed_forward.experts"
        arch.other(at, gate_up_proj=(EXPERTS, H, 2 * INNER), down_proj=(EXPERTS, INNER, H))
    for number in range(2):
        at = f"vision_model.model.layers.{number}"
        arch.attention(f"{at}.self_attn", 128, 128)
        arch.matrices(f"{at}.mlp", fc1=(512, 128), fc2=(128, 512))
    arch.matrices("vision_model", patch_embedding__linear=(128, 588))
    arch.matrices("vision_model.vision_adapter.mlp", fc1=(128, 512), fc2=(128, 128))
    arch.matrices("multi_modal_projector", linear_1=(H, 128))
    arch.other("vision_model", class_embedding=(128,), positional_embedding_vlm=(17, 128))
    return arch


def deepseek_v3() -> Arch:
    """With a layer past the last that predicts further tokens."""
    sizes = {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER, "n_shared_experts": 1}
    arch = Arch(config("deepseek_v3", num_nextn_predict_layers=1, **sizes))
    for number, layer in enumerate(arch.outer(layers=3)):
        at = f"{layer}.self_attn"
        arch.matrices(at, q_a_proj=(128, H), q_b_proj=(H, 128), kv_a_proj_with_mqa=(192, H))
        arch.matrices(at, kv_b_proj=(H, 128), o_proj=(H, H))
        arch.other(at, q_a_layernorm__weight=(128,), kv_a_layernorm__weight=(128,))
        if number == 0:
            arch.mlp(f"{layer}.mlp")
            continue
        arch.matrices(f"{layer}.mlp", gate=(EXPERTS, H))
        arch.other(f"{layer}.mlp", gate__e_score_correction_bias=(EXPERTS,))
        arch.mlp(f"{layer}.mlp.shared_experts")
        arch.experts(f"{layer}.mlp.experts")
    layer = "model.layers.2"
    arch.matrices(layer, eh_proj=(H, 2 * H), shared_head__head=(V, H))
    arch.other(layer, enorm__weight=(H,), hnorm__weight=(H,), embed_tokens__weight=(V, H))
    return arch


def hybrid() -> Arch:
    """Layers of state spaces, of attention and of experts without a gate, all called `mixer`."""
    arch = Arch(
        config("nemotron_h", 4, n_routed_experts=EXPERTS, moe_intermediate_size=INNER),
        leaves=readers.UNGATED_LEAVES,
    )
    layers = list(arch.outer("backbone", layers=4))
    for layer in layers[::3]:
        arch.matrices(f"{layer}.mixer", in_proj=(2 * H + 64, H), out_proj=(H, H))
        arch.other(f"{layer}.mixer", A_log=(4,), D=(4,), dt_bias=(4,), conv1d__weight=(H, 1, 4))
    arch.attention(f"{layers[1]}.mixer")
    arch.matrices(f"{layers[2]}.mixer", gate=(EXPERTS, H))
    arch.experts(f"{layers[2]}.mixer.experts", ("up_proj", "down_proj"))
    return arch


def qwen2_vl() -> Arch:
    vision = {"embed_dim": 128, "depth": 2, "hidden_size": H}
    arch = Arch(config("qwen2_vl", tie_word_embeddings=True, vision_config=vision))
    for layer in arch.outer(head=""):
        arch.attention(f"{layer}.self_attn", kv=128)
        arch.mlp(f"{layer}.mlp")
    for number in range(2):
        at = f"visual.blocks.{number}"
        arch.matrices(at, attn__qkv=(384, 128), attn__proj=(128, 128))
        arch.matrices(at, mlp__fc1=(512, 128), mlp__fc2=(128, 512))
        arch.other(at, norm1__weight=(128,), norm1__bias=(128,))
    arch.matrices("visual.merger.mlp", **{"0": (512, 512), "2": (H, 512)})
    arch.other("visual", patch_embed__proj__weight=(128, 3, 2, 14, 14), merger__ln_q__weight=(128,))
    arch.linear.add("lm_head")
    return arch


def qwen3_5_moe() -> Arch:
    """Experts in one tensor, and beside them layers under `mtp.` that predict further tokens."""
    arch = Arch(config("qwen3_5_moe", num_experts=EXPERTS, moe_intermediate_size=INNER))
    for layer in (*arch.outer(), "mtp.layers.0"):
        arch.attention(f"{layer}.self_attn")
        arch.matrices(f"{layer}.mlp", gate=(EXPERTS, H))
        at = f"{layer}.mlp.experts"
        arch.other(at, gate_up_proj=(EXPERTS, 2 * INNER, H), down_proj=(EXPERTS, H, INNER))
    arch.matrices("mtp", fc=(H, 2 * H))
    return arch


def qwen3_next() -> Arch:
    """The same with matrices of each expert."""
    arch = Arch(config("qwen3_next", num_experts=EXPERTS, moe_intermediate_size=INNER))
    for layer in (*arch.outer(), "mtp.layers.0"):
        arch.attention(f"{layer}.self_attn")
        arch.matrices(f"{layer}.mlp", gate=(EXPERTS, H))
        arch.experts(f"{layer}.mlp.experts")
    arch.matrices("mtp", fc=(H, 2 * H))
    return arch


def singular() -> Arch:
    """Experts in a list that is not called `experts`."""
    arch = Arch(config("somebody", num_experts=EXPERTS, moe_intermediate_size=INNER))
    for layer in arch.outer():
        arch.attention(f"{layer}.self_attn")
        arch.matrices(f"{layer}.mlp", gate=(EXPERTS, H))
        for number in range(EXPERTS):
            arch.mlp(f"{layer}.mlp.expert.{number}", ("w1", "w3", "w2"))
    return arch


def bert() -> Arch:
    arch = Arch(config("bert"))
    for number in range(2):
        at = f"bert.encoder.layer.{number}"
        arch.matrices(f"{at}.attention.self", query=(H, H), key=(H, H), value=(H, H))
        arch.matrices(at, attention__output__dense=(H, H))
        arch.matrices(at, intermediate__dense=(INNER, H), output__dense=(H, INNER))
        arch.other(at, output__LayerNorm__weight=(H,), output__LayerNorm__bias=(H,))
    arch.other("bert.embeddings", word_embeddings__weight=(V, H), LayerNorm__weight=(H,))
    arch.other("bert.embeddings", position_embeddings__weight=(64, H))
    arch.other("bert.embeddings", token_type_embeddings__weight=(2, H))
    arch.matrices("bert.pooler", dense=(H, H))
    arch.matrices("cls.predictions", transform__dense=(H, H), decoder=(V, H))
    arch.other("cls.predictions", transform__LayerNorm__weight=(H,), bias=(V,))
    return arch


ARCHS: Mapping[str, Arch] = {
    "llama": llama(),
    "llama-tied": llama(tied=True),
    "llama-ragged": llama_ragged(),
    "qwen3_moe": qwen3_moe(),
    "mixtral": mixtral(),
    "gpt_oss": gpt_oss(),
    "llama4": llama4(),
    "deepseek_v3": deepseek_v3(),
    "hybrid": hybrid(),
    "qwen2_vl": qwen2_vl(),
    "bert": bert(),
    "qwen3_5_moe": qwen3_5_moe(),
    "qwen3_next": qwen3_next(),
    "singular": singular(),
}
archs = pytest.mark.parametrize("name", ARCHS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A checkpoint of each kind."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, arch in ARCHS.items():
        tensors = {
            key: torch.randn(shape, generator=generator).bfloat16()
            for key, shape in arch.shapes.items()
        }
        made[name] = write_checkpoint(tmp_path_factory.mktemp(name), tensors, 1, arch.config)
    return made


# What the files hold: of each module with FP8 codes, what its scales are.


def strategies(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> readers.Strategies:
    """The strategy of every module with FP8 weights; `tensors` are dtypes and shapes by name."""
    found: readers.Strategies = {}
    for name, (dtype, shape) in tensors.items():
        if dtype == "F8_E4M3":
            module = name.removesuffix(".weight")
            beside = [f"{module}{joint}scale{end}" for joint in "._" for end in ("", "_inv")]
            beside += [f"{module}.weight_scale", f"{module}.weight_scale_inv"]
            (scale,) = (tensors[other] for other in beside if other in tensors)
            assert scale[0] == "F32"
            found[module] = _strategy(shape[-2:], scale[1][len(shape) - 2 :])
    return found


def _strategy(shape: tuple[int, ...], scale: tuple[int, ...]) -> str:
    rows, columns = shape
    known = {(1,): "tensor", (rows, 1): "channel", (-(-rows // 128), -(-columns // 128)): "block"}
    return known[scale]


def written(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                found[name] = view.get_dtype(), tuple(view.get_shape())
    return found


# What engines may make of a name.
RENAMINGS: Mapping[str, Callable[[str], str]] = {
    "as it is": lambda name: name,
    "prefix added": lambda name: f"language_model.{name}",
    "deep prefix added": lambda name: f"model.thinker.{name}",
    "model. dropped": lambda name: name.removeprefix("model."),
    "backbone is model": lambda name: name.replace("backbone.", "model.", 1),
}


def agree(arch: Arch, config: readers.Config, held: readers.Strategies) -> None:
    """Every engine takes for quantized what the files hold so, and nothing else."""
    truth = dict.fromkeys(arch.linear) | held
    if config["quant_method"] == "fp8":
        _agree_fp8(arch, config, truth)
        return
    for one, rename in itertools.product((config, readers.turned(config)), RENAMINGS.values()):
        renamed = {rename(name): strategy for name, strategy in truth.items()}
        assert readers.compressed_tensors(one, renamed) == renamed
        assert readers.vllm(one, renamed) == renamed
        for parent, stacked, members in _stacks(renamed):
            found = readers.vllm_stacked(one, parent, stacked, members)
            assert found == renamed[f"{parent}.{members[0]}"], (parent, stacked)
        for module in arch.expert_modules:
            found = readers.vllm_experts(one, rename(module), arch.leaves)
            assert found == expert_strategy(truth, module), module


def _stacks(names: Iterable[str]) -> Iterator[tuple[str, str, Sequence[str]]]:
    parents: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if ".experts." not in name:
            parents.setdefault(parent, set()).add(leaf)
    for parent, leaves in parents.items():
        for stacked, members in STACKED.items():
            if leaves.issuperset(members):
                yield parent, stacked, members


def expert_strategy(truth: readers.Strategies, module: str) -> str | None:
    """The one strategy of all in the module; none where its experts are not FP8."""
    found = {strategy for name, strategy in truth.items() if name.startswith(f"{module}.")}
    assert len(found) <= 1, (module, found)
    return found.pop() if found else None


def _agree_fp8(arch: Arch, config: readers.Config, truth: readers.Strategies) -> None:
    asked = {n: s for n, s in truth.items() if ".experts." not in n}
    asked |= {module: expert_strategy(truth, module) for module in arch.expert_modules}
    wanted = {name: strategy is not None for name, strategy in asked.items()}
    assert {name: readers.vllm_fp8(config, name) for name in asked} == wanted
    assert {name: readers.transformers_fp8(config, name) for name in asked} == wanted
    # Lookups are no linear layers; naming them does no harm.
    entries = set(config["modules_to_not_convert"]) - arch.lookups
    assert entries == {name for name, quantized in wanted.items() if not quantized}
    strategy = "block" if "weight_block_size" in config else "tensor"
    assert set(truth.values()) <= {None, strategy}


@schemes
@archs
def test_engines_read_the_config_as_the_files_are(
    run: Runner, tmp_path: Path, sources: Mapping[str, Path], name: str, scheme: Scheme
) -> None:
    options = ("--scheme", scheme.granularity.value, "--format", scheme.format.value)
    done = run("quantize", sources[name], tmp_path / "out", *options, "--threads", 1)
    assert done.code == 0, done
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    held = strategies(written(tmp_path / "out"))
    assert held
    agree(ARCHS[name], document["quantization_config"], held)


def planned(
    source: Path, scheme: Scheme, ignore: Iterable[str] = (), include: Iterable[str] = ()
) -> tuple[readers.Config, readers.Strategies]:
    """What the config would say, and what the files would hold."""
    resources = Resources(10**8, 1, 10**9)
    patterns = Patterns(tuple(ignore), tuple(include))
    plan = plan_quantization(open_checkpoint(source), scheme, patterns, resources)
    tensors = {t.name: (t.dtype, tuple(t.shape)) for file in plan.files for t in file.tensors}
    declared: readers.Config = plan.config["quantization_config"]
    return declared, strategies(tensors)


USER = {
    "a layer": ["re:.*layers?\\.1\\."],
    "a projection of a layer": ["re:.*\\.1\\.(self_attn|mixer|attention\\.self)\\.(o_proj|query)$"],
    "a projection of all": ["re:.*\\.(down_proj|w2|output\\.dense)$"],
    "a member of a fused set": ["re:.*\\.0\\..*\\.(q_proj|gate_proj|key|q_a_proj)$"],
    "an expert": ["re:.*\\.experts\\.1\\."],
    "all experts of a layer": ["re:.*\\.1\\..*\\.experts"],
    "all attention": ["re:.*\\.(self_attn|mixer|attention)\\."],
}


@schemes
@archs
@pytest.mark.parametrize("patterns", USER.values(), ids=USER)
def test_what_a_user_keeps_is_declared(
    sources: Mapping[str, Path], name: str, scheme: Scheme, patterns: list[str]
) -> None:
    try:
        declared, held = planned(sources[name], scheme, patterns)
    except SchemeError as error:
        assert "matches nothing" in str(error)
        return
    if held:  # a run refuses to quantize nothing
        agree(ARCHS[name], declared, held)


def quantizable(arch: Arch) -> list[str]:
    return sorted(f"{module}.weight" for module in arch.linear if f"{module}.weight" in arch.shapes)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_choice_of_layers_is_declared(sources: Mapping[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ARCHS)))
    scheme = data.draw(st.sampled_from(SCHEMES))
    arch = ARCHS[name]
    choices = st.sampled_from(quantizable(arch))
    ignore = data.draw(st.lists(choices, max_size=8, unique=True))
    # What only a prefix tells apart, no entry can under prefixes that engines drop.
    inside = [n for n in quantizable(arch) if not n.startswith("mtp.")]
    include = data.draw(st.lists(st.sampled_from(inside), max_size=4, unique=True))
    try:
        declared, held = planned(sources[name], scheme, ignore, include)
    except SchemeError as error:
        # A router has too few rows for some; what cannot be said must be said so.
        assert "--include" in str(error) or "cannot say" in str(error)
        assert include
        return
    if held:
        agree(arch, declared, held)


@schemes
@archs
def test_every_entry_names_something(
    sources: Mapping[str, Path], name: str, scheme: Scheme
) -> None:
    declared, held = planned(sources[name], scheme)
    kept = {n for n in ARCHS[name].shapes if n.removesuffix(".weight") not in held}
    kept = {n.removesuffix(".weight") for n in kept} | ARCHS[name].expert_modules | {"lm_head"}
    if scheme.format is FP8:
        assert set(declared["modules_to_not_convert"]) <= kept
        return
    # Routers are listed in every spelling that an engine has for them.
    entries = [e for e in declared["ignore"] if "router" not in e and "shared_expert_gate" not in e]
    for entry in entries:
        alone = {**declared, "ignore": [entry]}
        assert None in readers.vllm(alone, kept).values(), entry
    assert all(entry.startswith("re:") for entry in declared["ignore"])


def test_a_second_group_is_there_only_where_it_is_used(sources: Mapping[str, Path]) -> None:
    for name, scheme in itertools.product(ARCHS, SCHEMES[:3]):
        declared, held = planned(sources[name], scheme)
        groups = declared["config_groups"].values()
        assert {g["weights"]["strategy"] for g in groups} == set(held.values()), (name, scheme)


def test_what_is_kept_is_named_from_its_layers_on(sources: Mapping[str, Path]) -> None:
    """All but the head is kept: `model` is the first thing that engines rename."""
    declared, held = planned(sources["llama"], SCHEMES[0], ["model"], ["lm_head"])
    assert held == {"lm_head": "channel"}
    agree(ARCHS["llama"], declared, held)


# Declarations that cannot be true.

CHANNEL, BLOCK = Granularity.CHANNEL, Granularity.BLOCK
CT = Scheme(CHANNEL)
FP8_BLOCK = Scheme(BLOCK, FP8)
UNTRUE = {
    "transformers takes an entry for a module and all in it": (
        FP8_BLOCK,
        Modules({"model.layers.0.mlp": None, "model.layers.0.mlp.up_proj": BLOCK}),
    ),
    "transformers takes an entry for the end of a name": (
        FP8_BLOCK,
        Modules({"head": None, "model.layers.0.proj_head": BLOCK}),
    ),
    "transformers takes a point for any character": (
        FP8_BLOCK,
        Modules({"layers.0.expert.gate": None, "layers.0.expert_gate": BLOCK}),
    ),
    "vLLM takes experts within any entry": (
        FP8_BLOCK,
        Modules(experts={"mtp.layers.0.mlp.experts": None, "layers.0.mlp.experts": BLOCK}),
    ),
    "vLLM takes any layer of experts within any entry": (
        FP8_BLOCK,
        Modules(
            {
                "mtp.layers.0.mlp.shared_experts.down_proj": None,
                "layers.0.mlp.shared_experts.down_proj": BLOCK,
            }
        ),
    ),
    "fp8 has one scheme": (
        FP8_BLOCK,
        Modules({"layers.0.up_proj": BLOCK, "layers.0.down_proj": CHANNEL}),
    ),
    "experts are asked for as one": (
        CT,
        Modules({"layers.0.experts.0.w1": CHANNEL}, {"layers.0.experts": None}),
    ),
}


@pytest.mark.parametrize(("scheme", "modules"), UNTRUE.values(), ids=UNTRUE)
def test_a_declaration_that_cannot_be_true_is_refused(scheme: Scheme, modules: Modules) -> None:
    with pytest.raises(SchemeError, match=r"config\.json cannot say"):
        declare(scheme, modules)


TRUE = {
    "a module and what is in it": Modules({"a.b": None, "a.b.c": CHANNEL, "a.b.c.d": None}),
    "names within names": Modules({"x.gate": CHANNEL, "x.gate_proj": None, "x.up_gate": CHANNEL}),
    "numbers within numbers": Modules(
        {"layers.1.q": None, "layers.11.q": CHANNEL, "layers.111.q": None, "11.q": CHANNEL}
    ),
    "the same end": Modules({"a.layers.0.q": None, "b.layers.0.q": CHANNEL, "layers.0.q": None}),
    "signs of regular expressions": Modules({"a.b+c": None, "a.bbc": CHANNEL, "a.(b)": None}),
    "the names of routers": Modules({"a.gate": CHANNEL}, {"a.experts": None, "b.experts": CHANNEL}),
    "like experts": Modules({"a.shared_experts.w1": CHANNEL}, {"a.experts": None}),
    "nothing quantized": Modules({"a": None}, {"b.experts": None}),
}


@pytest.mark.parametrize("modules", TRUE.values(), ids=TRUE)
def test_awkward_names_are_declared_truly(modules: Modules) -> None:
    declared = declare(CT, modules)
    wanted = {name: g.value if g else None for name, g in modules.linear.items()}
    assert readers.compressed_tensors(declared, wanted) == wanted
    assert readers.vllm(declared, wanted) == wanted
    for module, granularity in modules.experts.items():
        found = readers.vllm_experts(declared, module)
        assert found == (granularity.value if granularity else None)


PARTS = st.sampled_from(["a", "layers", "experts", "mlp", "q_proj", "gate", "0", "1", "10"])


@settings(max_examples=200, deadline=None)
@given(
    modules=st.dictionaries(
        st.lists(PARTS, min_size=1, max_size=5).map(".".join),
        st.sampled_from([None, CHANNEL, BLOCK]),
        min_size=1,
        max_size=8,
    ),
    block=st.booleans(),
)
def test_any_names_are_declared_truly_or_refused(
    modules: dict[str, Granularity | None], block: bool
) -> None:
    try:
        declared = declare(Scheme(BLOCK if block else CHANNEL), Modules(modules))
    except SchemeError:
        return
    wanted = {name: g.value if g else None for name, g in modules.items()}
    for one in (declared, readers.turned(declared)):
        assert readers.compressed_tensors(one, wanted) == wanted
        assert readers.vllm(one, wanted) == wanted


@settings(max_examples=200, deadline=None)
@given(
    modules=st.dictionaries(
        st.lists(PARTS, min_size=1, max_size=5).map(".".join),
        st.sampled_from([None, BLOCK]),
        min_size=1,
        max_size=8,
    )
)
def test_any_names_are_declared_truly_or_refused_in_fp8(
    modules: dict[str, Granularity | None],
) -> None:
    try:
        declared = declare(FP8_BLOCK, Modules(modules))
    except SchemeError:
        return
    wanted = {name: granularity is not None for name, granularity in modules.items()}
    assert {name: readers.vllm_fp8(declared, name) for name in modules} == wanted
    assert {name: readers.transformers_fp8(declared, name) for name in modules} == wanted
