"""--ignore and --include: what a pattern means, what goes along with it, and what it says if wrong.

Plans are made of names and shapes alone: nothing here is on disk but where the command line reads.
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import SchemeError
from fp8stream.header import Shard, TensorSpec
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from tests import readers
from tests.conftest import Run, llama_tensors

Runner = Callable[..., Run]
Shapes = Mapping[str, tuple[int, ...]]

FILE = "model.safetensors"
LAYERS = 12
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def llama_shapes(layers: int = LAYERS, tied: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, 128)}
    for number in range(layers):
        at = f"model.layers.{number}"
        shapes |= {f"{at}.self_attn.{leaf}.weight": (128, 128) for leaf in ATTENTION}
        shapes |= {f"{at}.self_attn.{leaf}.bias": (128,) for leaf in ATTENTION[:3]}
        shapes |= {f"{at}.mlp.{leaf}.weight": (128, 128) for leaf in MLP}
        shapes |= {f"{at}.input_layernorm.weight": (128,)}
    shapes["model.norm.weight"] = (128,)
    if not tied:
        shapes["lm_head.weight"] = (256, 128)
    return shapes


def mixtral_shapes() -> dict[str, tuple[int, ...]]:
    shapes = llama_shapes(2)
    for number in range(2):
        moe = f"model.layers.{number}.block_sparse_moe"
        shapes[f"{moe}.gate.weight"] = (8, 128)
        for expert in range(8):
            leaves = ("w1", "w2", "w3")
            shapes |= {f"{moe}.experts.{expert}.{leaf}.weight": (128, 128) for leaf in leaves}
    return shapes


def checkpoint(shapes: Shapes, layers: int = LAYERS) -> Checkpoint:
    specs, offset = [], 0
    for name, shape in shapes.items():
        spec = TensorSpec(name, "BF16", shape, FILE, offset, 0)
        spec = TensorSpec(name, "BF16", shape, FILE, offset, 2 * spec.numel)
        offset += spec.nbytes
        specs.append(spec)
    config = {"model_type": "llama", "num_hidden_layers": layers}
    return Checkpoint(Path("m"), Path("m"), config, (Shard(FILE, offset, 0, tuple(specs)),))


def plan(
    shapes: Shapes,
    ignore: Iterable[str] = (),
    include: Iterable[str] = (),
    granularity: Granularity = Granularity.CHANNEL,
    layers: int = LAYERS,
) -> Plan:
    scheme = Scheme(granularity, OutputFormat.COMPRESSED_TENSORS)
    patterns = Patterns(tuple(ignore), tuple(include))
    return plan_quantization(
        checkpoint(shapes, layers), scheme, patterns, Resources(1 << 30, 2, 5 * 10**9)
    )


def quantized(planned: Plan) -> set[str]:
    return {tensor.spec.name for tensor in planned.tensors if tensor.granularity}


def reason(planned: Plan, name: str) -> str:
    return next(tensor.reason for tensor in planned.tensors if tensor.spec.name == name)


def left_in_16_bit(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """The weights of `names` whose modules an engine that reads `config` would not quantize."""
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    found = readers.compressed_tensors(config["quantization_config"], modules)
    assert found == readers.vllm(config["quantization_config"], modules)
    return {f"{module}.weight" for module, strategy in found.items() if strategy is None}


def matrices(shapes: Shapes) -> set[str]:
    """What engines may take for linear layers."""
    return {n for n, shape in shapes.items() if len(shape) == 2 and "embed_tokens" not in n}


def newly_kept(shapes: Shapes, *ignore: str) -> set[str]:
    """What `ignore` takes away from the default."""
    return quantized(plan(shapes)) - quantized(plan(shapes, ignore))


def weights(number: int, *leaves: str) -> set[str]:
    parts = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
    return {f"model.layers.{number}.{parts[leaf]}.{leaf}.weight" for leaf in leaves}


LLAMA = llama_shapes()
MIXTRAL = mixtral_shapes()


@pytest.mark.parametrize(
    "pattern",
    ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.weight"],
    ids=["module", "tensor"],
)
def test_an_exact_name_keeps_that_layer_alone(pattern: str) -> None:
    assert newly_kept(LLAMA, pattern) == weights(1, "down_proj")
    planned = plan(LLAMA, [pattern])
    assert reason(planned, "model.layers.1.mlp.down_proj.weight") == f"--ignore {pattern}"
    assert not any("down_proj" in warning for warning in planned.warnings)


def test_the_name_of_a_module_keeps_all_that_is_below_it() -> None:
    assert newly_kept(LLAMA, "model.layers.1.self_attn") == weights(1, *ATTENTION)
    assert newly_kept(LLAMA, "model.layers.1") == weights(1, *ATTENTION, *MLP)
    assert quantized(plan(LLAMA, ["model"])) == set()


def test_a_name_is_not_the_beginning_of_another() -> None:
    assert not any("layers.10." in name for name in newly_kept(LLAMA, "model.layers.1"))
    with pytest.raises(SchemeError, match="matches nothing"):
        plan(LLAMA, ["model.layers.1.mlp.down"])
    with pytest.raises(SchemeError, match="matches nothing"):
        plan(LLAMA, ["model.layers.1."])


def test_a_name_is_no_regular_expression() -> None:
    with pytest.raises(SchemeError, match="matches nothing"):
        plan(LLAMA, ["model.layers.1.mlp.d...._proj"])


def test_a_regular_expression_matches_from_the_start_of_a_name() -> None:
    every = {name for number in range(LAYERS) for name in weights(number, "down_proj")}
    assert newly_kept(LLAMA, r"re:.*down_proj") == every
    assert newly_kept(LLAMA, r"re:model\.layers\.\d+\.mlp\.down_proj$") == every
    with pytest.raises(SchemeError, match=r"must match from the start.*\.\*"):
        plan(LLAMA, ["re:down_proj"])


def test_a_regular_expression_need_not_match_to_the_end() -> None:
    ten = weights(1, *MLP) | weights(10, *MLP) | weights(11, *MLP)
    assert newly_kept(LLAMA, r"re:model\.layers\.1.*mlp") == ten
    assert newly_kept(LLAMA, r"re:model\.layers\.1\..*mlp") == weights(1, *MLP)


def test_a_regular_expression_is_tried_on_the_module_then_on_the_tensor() -> None:
    assert newly_kept(LLAMA, r"re:.*\.3\.mlp\.down_proj$") == weights(3, "down_proj")
    assert newly_kept(LLAMA, r"re:.*\.3\.mlp\.down_proj\.weight$") == weights(3, "down_proj")


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"'re:\(' is not a regular expression"):
        plan(LLAMA, ["re:("])


def test_several_patterns_add_up() -> None:
    kept = newly_kept(LLAMA, "model.layers.0.mlp.down_proj", "re:.*11.*down_proj")
    assert kept == weights(0, "down_proj") | weights(11, "down_proj")


# What matches nothing, and what is kept anyway.


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.3.self_atn.q_proj", "model.layers.3.self_attn.q_proj"),
        ("model.layers.3.mlp.downproj", "model.layers.3.mlp.down_proj"),
        ("model.layer.3.mlp.down_proj", "model.layers.3.mlp.down_proj"),
        ("layers.3.mlp.down_proj", "model.layers.3.mlp.down_proj"),
        ("model.layers.12.mlp.down_proj", "mlp.down_proj"),
        ("lmhead", "lm_head"),
        ("lm_head.wieght", "lm_head.weight"),
        ("down_proj", "mlp.down_proj"),
        ("embed_tokens", "model.embed_tokens"),
    ],
)
@pytest.mark.parametrize("option", ["ignore", "include"])
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(
    pattern: str, near: str, option: str
) -> None:
    ignore = [pattern] if option == "ignore" else []
    include = [pattern] if option == "include" else []
    with pytest.raises(SchemeError) as caught:
        plan(LLAMA, ignore, include)
    message = str(caught.value)
    assert repr(pattern) in message
    assert "matches nothing" in message
    assert near in message.partition("did you mean")[2]


@pytest.mark.parametrize("pattern", ["", "zzzzzzzz", "*", "model.layers.*.mlp", " lm_head", "\0\n"])
def test_a_pattern_like_nothing_else_is_refused_all_the_same(pattern: str) -> None:
    with pytest.raises(SchemeError, match="matches nothing") as caught:
        plan(LLAMA, [pattern])
    assert len(str(caught.value).splitlines()) == 1


def test_the_name_of_a_module_is_suggested_for_a_module() -> None:
    with pytest.raises(SchemeError, match=r"did you mean .*\bmodel\.layers\.3\.self_attn\b(?!\.)"):
        plan(LLAMA, ["model.layers.3.self_atn"])


def test_suggestions_are_quick_among_very_many_names() -> None:
    shapes = {
        f"model.layers.{layer}.mlp.experts.{expert}.{leaf}.weight": (128, 128)
        for layer in range(60)
        for expert in range(300)
        for leaf in MLP
    }
    start = time.process_time()
    with pytest.raises(SchemeError, match=r"model\.layers\.3\.mlp\.experts\.7\.up_proj"):
        plan(shapes, ["model.layers.3.mlp.expert.7.up_proj"], layers=60)
    assert time.process_time() - start < 3


def test_any_name_that_is_shown_may_be_given_back() -> None:
    for shapes in (LLAMA, MIXTRAL):
        planned = plan(shapes)
        for tensor in planned.tensors:
            plan(shapes, [tensor.spec.name])
            plan(shapes, [tensor.spec.module])
        assert planned.fused_with
        shown = {name for others in planned.fused_with.values() for name in others}
        plan(shapes, sorted(shown))


def test_a_pattern_that_matches_what_is_kept_anyway_changes_nothing() -> None:
    kept = ["lm_head", "model.embed_tokens", "model.norm.weight", "re:.*layernorm"]
    kept += ["model.layers.0.self_attn.q_proj.bias", "re:.*bias"]
    planned = plan(LLAMA, kept)
    assert quantized(planned) == quantized(plan(LLAMA))
    assert planned.warnings == plan(LLAMA).warnings
    assert "output head" in reason(planned, "lm_head.weight")


@pytest.mark.parametrize(
    "pattern",
    ["lm_head", "lm_head.weight", "re:lm_head", "re:.*head", r"re:lm_head\.weight", "re:lm_head$"],
)
def test_the_head_of_a_tied_model_may_be_ignored_though_no_file_holds_it(pattern: str) -> None:
    tied = llama_shapes(2, tied=True)
    assert quantized(plan(tied, [pattern])) == quantized(plan(tied))


def test_another_name_is_an_error_in_a_tied_model_too() -> None:
    with pytest.raises(SchemeError, match="matches nothing"):
        plan(llama_shapes(2, tied=True), ["lm_heads"])


# --include, and which of the two wins.


def test_include_quantizes_what_the_defaults_keep() -> None:
    planned = plan(LLAMA, include=["lm_head"])
    assert quantized(planned) - quantized(plan(LLAMA)) == {"lm_head.weight"}
    assert reason(planned, "lm_head.weight") == "--include lm_head"
    assert left_in_16_bit(planned.config, matrices(LLAMA)) == set()


def test_include_of_what_is_quantized_anyway_changes_nothing() -> None:
    planned = plan(LLAMA, include=["model.layers.0.mlp"])
    assert quantized(planned) == quantized(plan(LLAMA))
    assert "--include" not in reason(planned, "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    "pattern", ["model.norm", "model.embed_tokens", "model.layers.0.self_attn.q_proj.bias"]
)
def test_include_of_what_cannot_be_quantized_is_refused(pattern: str) -> None:
    with pytest.raises(SchemeError, match=f"--include {pattern}: matches no weight that can be"):
        plan(LLAMA, include=[pattern])


def test_include_passes_over_what_cannot_be_quantized_beside_what_can() -> None:
    assert quantized(plan(LLAMA, include=["re:.*"])) == quantized(plan(LLAMA)) | {"lm_head.weight"}


@pytest.mark.parametrize("include", ["lm_head", "re:lm_head", "re:.*"])
@pytest.mark.parametrize("ignore", ["lm_head", "lm_head.weight", "re:.*head"])
def test_ignore_wins_over_include(ignore: str, include: str) -> None:
    planned = plan(LLAMA, [ignore], [include])
    assert "lm_head.weight" not in quantized(planned)
    assert reason(planned, "lm_head.weight") == f"--ignore {ignore}"


def test_an_included_member_of_a_fused_set_is_not_undone_in_silence() -> None:
    """Layers past the model's are a prediction head, and kept: here one member is asked for."""
    planned = plan(LLAMA, include=["model.layers.11.self_attn.q_proj"], layers=11)
    members = weights(11, "q_proj", "k_proj", "v_proj")
    together = members <= quantized(planned)
    told = any("model.layers.11.self_attn.q_proj" in warning for warning in planned.warnings)
    assert together or told
    assert together or not members & quantized(planned)


# What goes together.

FUSED = [
    pytest.param("q_proj", ("q_proj", "k_proj", "v_proj"), id="q of q/k/v"),
    pytest.param("k_proj", ("q_proj", "k_proj", "v_proj"), id="k of q/k/v"),
    pytest.param("v_proj", ("q_proj", "k_proj", "v_proj"), id="v of q/k/v"),
    pytest.param("gate_proj", ("gate_proj", "up_proj"), id="gate of gate/up"),
    pytest.param("up_proj", ("gate_proj", "up_proj"), id="up of gate/up"),
]


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize(("leaf", "members"), FUSED)
def test_a_member_of_a_fused_set_takes_the_whole_set_with_it(
    leaf: str, members: tuple[str, ...], granularity: Granularity
) -> None:
    (name,) = weights(5, leaf)
    everything = quantized(plan(LLAMA, granularity=granularity))
    planned = plan(LLAMA, [name], granularity=granularity)
    assert everything - quantized(planned) == weights(5, *members)
    (warning,) = set(planned.warnings) - set(plan(LLAMA, granularity=granularity).warnings)
    assert name in warning
    others = weights(5, *members) - {name}
    assert any(other in warning for other in others)
    for other in others:
        assert name in reason(planned, other)
    kept = left_in_16_bit(planned.config, matrices(LLAMA))
    assert kept == weights(5, *members) | {"lm_head.weight"}


def test_a_whole_fused_set_that_is_ignored_needs_no_warning() -> None:
    planned = plan(LLAMA, [f"model.layers.5.self_attn.{leaf}" for leaf in ATTENTION[:3]])
    assert planned.warnings == plan(LLAMA).warnings
    assert plan(LLAMA, ["model.layers.5"]).warnings == plan(LLAMA).warnings


def test_many_fused_sets_give_one_warning() -> None:
    planned = plan(LLAMA, ["re:.*k_proj"])
    (warning,) = set(planned.warnings) - set(plan(LLAMA).warnings)
    assert "23 more" in warning


def test_a_bias_does_not_take_the_set_with_it() -> None:
    assert newly_kept(LLAMA, "model.layers.5.self_attn.q_proj.bias") == set()


def test_one_expert_takes_the_experts_of_its_layer_with_it() -> None:
    experts = "model.layers.1.block_sparse_moe.experts"
    every = {name for name in MIXTRAL if name.startswith(experts)}
    assert len(every) == 24
    assert newly_kept(MIXTRAL, f"{experts}.3.w2") == every
    planned = plan(MIXTRAL, [f"{experts}.3.w2"])
    (warning,) = set(planned.warnings) - set(plan(MIXTRAL).warnings)
    assert f"{experts}.3.w2.weight" in warning
    assert all(f"{experts}.3.w2.weight" in reason(planned, n) for n in every if ".3.w2" not in n)


def test_one_half_of_an_expert_takes_its_fused_set_and_then_all_experts_with_it() -> None:
    experts = "model.layers.1.block_sparse_moe.experts"
    every = {name for name in MIXTRAL if name.startswith(experts)}
    assert newly_kept(MIXTRAL, f"{experts}.3.w1") == every


def test_the_experts_of_another_layer_are_left_alone() -> None:
    kept = newly_kept(MIXTRAL, "re:.*layers.0.*experts.0")
    assert kept == {name for name in MIXTRAL if "layers.0.block_sparse_moe.experts" in name}


def test_the_config_names_every_module_that_was_ignored() -> None:
    assert left_in_16_bit(plan(LLAMA).config, matrices(LLAMA)) == {"lm_head.weight"}
    planned = plan(LLAMA, ["model.layers.1.mlp.down_proj", "re:.*2.*o_proj"])
    assert left_in_16_bit(planned.config, matrices(LLAMA)) == {
        "lm_head.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    }


@pytest.mark.parametrize("shapes", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
@pytest.mark.parametrize("granularity", list(Granularity))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_ignored_the_config_names_what_is_kept_and_nothing_else(
    shapes: Shapes, granularity: Granularity, data: st.DataObject
) -> None:
    names = sorted(matrices(shapes))
    of_layers = sorted({name.rpartition(".")[0].rpartition(".")[0] for name in names} - {""})
    chosen = st.lists(st.sampled_from(names + of_layers), max_size=6)
    include = data.draw(st.sampled_from([(), ("lm_head",)]))
    planned = plan(shapes, data.draw(chosen), include, granularity)
    kept = matrices(shapes) - quantized(planned)
    assert left_in_16_bit(planned.config, matrices(shapes)) == kept


# The command line.


def kept_by_ignore(result: Run) -> set[str]:
    document: dict[str, Any] = json.loads(result.out)
    return {t["name"] for t in document["tensors"] if "--ignore" in t["reason"]}


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


DOWN = "model.layers.0.mlp.down_proj"
OUT = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{DOWN}\n{OUT}\n", id="a line each"),
        pytest.param(f"{DOWN}\n{OUT}", id="no newline at the end"),
        pytest.param(f"\n\n{DOWN}\n\n{OUT}\n\n", id="empty lines"),
        pytest.param(f"{DOWN}\r\n{OUT}\r\n", id="Windows line ends"),
        pytest.param(f"{DOWN}\nre:.*1\\.self_attn\\.o_proj$\n", id="a regular expression"),
    ],
)
@pytest.mark.parametrize("where", ["file", "stdin"])
def test_patterns_to_ignore_are_read_from_a_file_or_standard_input(
    text: str,
    where: str,
    llama: Path,
    tmp_path: Path,
    run: Runner,
    stdin: Callable[[bytes], None],
) -> None:
    (tmp_path / "patterns").write_bytes(text.encode())
    stdin(text.encode())
    file = "-" if where == "stdin" else tmp_path / "patterns"
    result = run("inspect", llama, "--json", "--ignore-from", file)
    assert result.code == 0, result
    assert kept_by_ignore(result) == {f"{DOWN}.weight", f"{OUT}.weight"}


def test_patterns_from_a_file_add_to_those_given(
    llama: Path, run: Runner, stdin: Callable[[bytes], None]
) -> None:
    stdin(DOWN.encode())
    result = run("inspect", llama, "--json", "--ignore", OUT, "--ignore-from", "-")
    assert kept_by_ignore(result) == {f"{DOWN}.weight", f"{OUT}.weight"}


def test_an_empty_standard_input_ignores_nothing(
    llama: Path, run: Runner, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"")
    assert kept_by_ignore(run("inspect", llama, "--json", "--ignore-from", "-")) == set()


def test_every_name_that_inspect_prints_may_be_piped_back(
    llama: Path, run: Runner, stdin: Callable[[bytes], None]
) -> None:
    lines = run("inspect", llama, "--tensors").out.splitlines()
    stdin("\n".join(line.split("\t")[0] for line in lines).encode())
    result = run("inspect", llama, "--json", "--ignore-from", "-")
    assert result.code == 0
    assert json.loads(result.out)["plan"]["layers_quantized"] == 0


def test_the_output_keeps_what_was_piped_in(
    llama: Path, tmp_path: Path, run: Runner, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"re:.*down_proj\n")
    assert run("quantize", llama, tmp_path / "output", "--ignore-from", "-").code == 0
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    downs = {f"model.layers.{number}.mlp.down_proj.weight" for number in range(2)}
    assert f"{DOWN}.weight" in downs
    names = matrices({name: tensor.shape for name, tensor in llama_tensors().items()})
    assert left_in_16_bit(config, names) == downs | {"lm_head.weight"}


@pytest.mark.parametrize("command", ["quantize", "inspect"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            ["--ignore", "model.layers.0.mlp.down"],
            ["'model.layers.0.mlp.down'", "did you mean", DOWN],
            id="nothing",
        ),
        pytest.param(["--ignore", "re:proj"], ["'re:proj'", "'.*'"], id="not from the start"),
        pytest.param(["--ignore", "re:["], ["'re:['", "regular expression"], id="no regex"),
        pytest.param(["--include", "model.norm"], ["model.norm", "no weight"], id="include a norm"),
        pytest.param(["--include", "nothing"], ["'nothing'"], id="include nothing"),
        pytest.param(["--ignore", "a\nb"], [r"'a\nb'"], id="a pattern of two lines"),
    ],
)
def test_a_bad_pattern_is_refused_before_any_work(
    options: list[str], words: list[str], command: str, llama: Path, tmp_path: Path, run: Runner
) -> None:
    output = [tmp_path / "output"] if command == "quantize" else []
    result = run(command, llama, *output, *options)
    assert result.code == 1
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert all(word in result.err for word in words), result
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_bad_pattern_in_a_file_is_named(
    llama: Path, run: Runner, stdin: Callable[[bytes], None]
) -> None:
    stdin(f"{DOWN}\nmodel.layers.0.mlp.upproj\n".encode())
    result = run("inspect", llama, "--ignore-from", "-")
    assert result.code == 1
    assert "'model.layers.0.mlp.upproj'" in result.err
    assert "model.layers.0.mlp.up_proj" in result.err


def test_patterns_that_are_not_utf_8_are_refused_in_words(
    llama: Path, tmp_path: Path, run: Runner
) -> None:
    (tmp_path / "patterns").write_bytes(b"model.layers.0\n\xff\xfe\n")
    result = run("inspect", llama, "--ignore-from", tmp_path / "patterns")
    assert result.code in (1, 2)
    assert "--ignore-from" in result.err
    assert "FP8STREAM_DEBUG" not in result.err


def test_a_file_of_patterns_that_is_absent_is_wrong_usage(llama: Path, run: Runner) -> None:
    result = run("inspect", llama, "--ignore-from", "/nonexistent/patterns")
    assert result.code == 2
    assert "/nonexistent/patterns" in result.err


def test_a_set_that_follows_its_member_is_told_on_stderr(
    llama: Path, tmp_path: Path, run: Runner
) -> None:
    result = run("quantize", llama, tmp_path / "output", "--ignore", "re:.*1.*q_proj")
    assert result.code == 0
    (line,) = (line for line in result.err.splitlines() if line.startswith("warning: "))
    assert "model.layers.1.self_attn.q_proj.weight" in line
    assert "model.layers.1.self_attn.k_proj.weight and 1 more" in line
