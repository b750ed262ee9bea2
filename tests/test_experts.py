"""Experts, row by row of the table of layouts that engines load.

Tiny models of every kind are written, quantized by the command line, and read back by code that
shares nothing with fp8stream: the matrices of every expert are made first, laid into tensors as the
kind of model lays them, and compared with what the output holds at their place. Experts,
projections and rows differ in magnitude, so that a scale at another's place shows like a weight.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import readers
from tests.conftest import Run, Tensors, write_checkpoint
from tests.oracle import same

Runner = Callable[..., Run]
Matrices = dict[tuple[int, str], torch.Tensor]

BLOCK = 128
EXPERTS = 3
HIDDEN = 256
INTER = 384
LAYERS = 2
FP8 = torch.float8_e4m3fn

CHANNEL = ("channel", "compressed-tensors")
CT_BLOCK = ("block", "compressed-tensors")
CT_TENSOR = ("tensor", "compressed-tensors")
FP8_BLOCK = ("block", "fp8")
FP8_TENSOR = ("tensor", "fp8")
SCHEMES = (CHANNEL, CT_BLOCK, CT_TENSOR, FP8_BLOCK, FP8_TENSOR)
Scheme = tuple[str, str]
LAYOUTS = ("out-in", "in-out", "out-in-interleaved", "in-out-interleaved")
GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)


def named(scheme: Scheme) -> str:
    return {"compressed-tensors": "ct", "fp8": "fp8"}[scheme[1]] + f"-{scheme[0]}"


@dataclass(frozen=True)
class Moe:
    """A kind of model: its config, what its modules are called, how its experts lie.

    `tensors` are the names of the tensors of experts below a layer, with what lies in each.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("mlp.experts.gate_up_proj", GATE_UP),
        ("mlp.experts.down_proj", DOWN),
    )
    layout: str = "out-in"
    prefix: str = "model."
    router: str = "mlp.gate"
    nested: str = ""
    inter: int = INTER
    hidden: int = HIDDEN
    biased: bool = False

    @property
    def document(self) -> dict[str, Any]:
        """The config.json."""
        sizes = {
            "hidden_size": self.hidden,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "vocab_size": 96,
            "num_local_experts": EXPERTS,
            "moe_intermediate_size": self.inter,
            "tie_word_embeddings": False,
            **self.config,
        }
        top = {"model_type": self.model_type, "architectures": ["X"]}
        if self.nested:
            return {**top, "text_config": {**sizes, "model_type": self.nested}}
        return {**top, **sizes}

    def layer(self, number: int) -> str:
        return f"{self.prefix}layers.{number}"

    def module(self, number: int) -> str:
        """The module of a layer's experts, as engines call it."""
        first = self.tensors[0][0].removesuffix(".weight")
        holder = first.rpartition(".")[0]
        inside = holder if holder.endswith("experts") else f"{holder}.experts"
        return f"{self.layer(number)}.{inside}"


def matrices(moe: Moe, layer: int) -> Matrices:
    """Every expert's matrices [out, in], of magnitudes that tell them apart."""
    return _matrices(moe.inter, moe.hidden, layer)


@cache
def _matrices(inter: int, hidden: int, layer: int) -> Matrices:
    generator = torch.Generator().manual_seed(layer)
    made: Matrices = {}
    for expert in range(EXPERTS):
        for number, projection in enumerate((*GATE_UP, *DOWN)):
            rows, columns = (hidden, inter) if projection == "down_proj" else (inter, hidden)
            matrix = torch.randn(rows, columns, generator=generator)
            matrix *= 0.003 * 5.0**expert * 2.0**number * (1 + torch.arange(rows) % 7)[:, None]
            made[expert, projection] = matrix.bfloat16()
    return made


def fuse(parts: Sequence[torch.Tensor], layout: str) -> torch.Tensor:
    """Matrices [out, in] as one, as `layout` says."""
    whole = torch.stack(list(parts), 1).flatten(0, 1) if "interleaved" in layout else None
    whole = torch.cat(list(parts)) if whole is None else whole
    return whole.T if layout.startswith("in-out") else whole


def part(whole: torch.Tensor, layout: str, count: int) -> Sequence[torch.Tensor]:
    """The `count` matrices in `whole`, or their scales: what `fuse` undoes."""
    whole = whole.T if layout.startswith("in-out") else whole
    if "interleaved" in layout:
        return [whole[first::count] for first in range(count)]
    return whole.chunk(count) if whole.shape[0] > 1 else [whole] * count


def skeleton(moe: Moe) -> Tensors:
    """All but the experts."""
    generator = torch.Generator().manual_seed(9)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    hidden = moe.hidden
    head = moe.prefix.removesuffix("model.") if moe.prefix.endswith("model.") else ""
    tensors = {
        f"{moe.prefix}embed_tokens.weight": matrix(96, hidden),
        f"{moe.prefix}norm.weight": torch.ones(hidden).bfloat16(),
        f"{head}lm_head.weight": matrix(96, hidden),
    }
    for number in range(LAYERS):
        at = moe.layer(number)
        for name in "qkvo":
            tensors[f"{at}.self_attn.{name}_proj.weight"] = matrix(hidden, hidden)
        tensors[f"{at}.input_layernorm.weight"] = torch.ones(hidden).bfloat16()
        tensors[f"{at}.{moe.router}.weight"] = matrix(EXPERTS, hidden)
    return tensors


def source_tensors(moe: Moe) -> Tensors:
    tensors = skeleton(moe)
    for number in range(LAYERS):
        made = matrices(moe, number)
        for name, projections in moe.tensors:
            fused = [fuse([made[e, p] for p in projections], moe.layout) for e in range(EXPERTS)]
            tensors[f"{moe.layer(number)}.{name}"] = torch.stack(fused).contiguous()
            if moe.biased:
                width = fused[0].shape[1]
                tensors[f"{moe.layer(number)}.{name}_bias"] = torch.ones(EXPERTS, width).bfloat16()
    return tensors


def write(moe: Moe, directory: Path) -> Path:
    return write_checkpoint(directory / "in", source_tensors(moe), 2, moe.document)


@dataclass(frozen=True)
class Output:
    """What a run wrote."""

    tensors: Tensors
    config: Mapping[str, Any]
    err: str

    @property
    def ignored(self) -> Sequence[str]:
        found: Sequence[str] = self.config.get("ignore", self.config.get("modules_to_not_convert"))
        return found


def quantize(run: Runner, source: Path, scheme: Scheme, *options: str) -> Output:
    output = source.parent / "out"
    granularity, form = scheme
    done = run(
        "quantize",
        source,
        output,
        "--scheme",
        granularity,
        "--format",
        form,
        "--device",
        "cpu",
        "--threads",
        "1",
        *options,
    )
    assert done.code == 0, done
    stated = options.index("--expert-layout") if "--expert-layout" in options else len(options)
    verified(run, source, output, *options[stated : stated + 2])
    tensors: Tensors = {}
    for file in output.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((output / "config.json").read_text())
    return Output(tensors, config["quantization_config"], done.err)


def verified(run: Runner, source: Path, output: Path, *options: str) -> None:
    """Every form passes, as our own and as what another tool might have written."""
    done = run("verify", output, "--against", source, "-q", *options)
    assert (done.code, "to the bit" in done.out) == (0, True), done
    for file in output.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt"})
    done = run("verify", output, "--against", source, "-q", *options)
    assert (done.code, "within the bound" in done.out) == (0, True), done


def refused(run: Runner, source: Path, scheme: Scheme, *options: str) -> str:
    """The message of a run that must fail and write nothing."""
    output = source.parent / "out"
    granularity, form = scheme
    done = run("quantize", source, output, "--scheme", granularity, "--format", form, *options)
    assert done.code == 1, done
    assert not output.exists()
    assert "Traceback" not in done.err
    return done.err


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    assert (codes.dtype, scale.dtype) == (FP8, torch.float32)
    rows, columns = codes.shape
    if scale.numel() > 1 and scale.shape != (rows, 1):
        assert scale.shape == (-(-rows // BLOCK), -(-columns // BLOCK))
        scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return codes.float() * scale


def assert_close(found: torch.Tensor, wanted: torch.Tensor, what: object) -> None:
    """Row by row: a row at another's place, or with its scale, is far off."""
    assert found.shape == wanted.shape, what
    error = (found - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)
    assert error.max() <= 0.04, (what, error.max())


def suffix(scheme: Scheme) -> str:
    return "weight_scale_inv" if scheme == FP8_BLOCK else "weight_scale"


def expert_strategy(scheme: Scheme) -> str:
    """vLLM refuses tensor scales of compressed-tensors on experts."""
    return "channel" if scheme == CT_TENSOR else scheme[0]


def scale_shape(strategy: str, rows: int, columns: int) -> tuple[int, ...]:
    blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    return {"channel": (rows, 1), "block": blocks, "tensor": (1,)}[strategy]


def check_split(moe: Moe, output: Output, scheme: Scheme, strategy: str) -> set[str]:
    """Every expert's matrices in tensors of their own. Returns their names."""
    names: set[str] = set()
    for number in range(LAYERS):
        scales = {}
        for (expert, projection), wanted in matrices(moe, number).items():
            at = f"{moe.module(number)}.{expert}.{projection}"
            codes, scale = output.tensors[f"{at}.weight"], output.tensors[f"{at}.{suffix(scheme)}"]
            assert scale.shape == scale_shape(strategy, *wanted.shape), at
            assert_close(dequantize(codes, scale), wanted, at)
            names |= {f"{at}.weight", f"{at}.{suffix(scheme)}"}
            scales[expert, projection] = scale
        if strategy == "tensor":
            for expert in range(EXPERTS):
                assert torch.equal(scales[expert, "gate_proj"], scales[expert, "up_proj"])
    return names


def check_fused(
    moe: Moe, output: Output, strategy: str, names: Mapping[str, tuple[str, str]]
) -> set[str]:
    """The experts in tensors as they lay; `names` gives each its name and that of its scales."""
    written: set[str] = set()
    for number in range(LAYERS):
        made = matrices(moe, number)
        for tensor, projections in moe.tensors:
            weight, scales = (f"{moe.layer(number)}.{name}" for name in names[tensor])
            written |= {weight, scales}
            found, grid = output.tensors[weight], output.tensors[scales]
            _check_grid(found, grid, strategy)
            for expert in range(EXPERTS):
                codes = part(found[expert], moe.layout, len(projections))
                own = part(grid[expert], moe.layout, len(projections))
                for projection, one, scale in zip(projections, codes, own, strict=True):
                    at = (weight, expert, projection)
                    assert_close(dequantize(one, scale), made[expert, projection], at)
    return written


def check_shared(moe: Moe, output: Output, names: Mapping[str, tuple[str, str]]) -> None:
    """Gate and up of an expert, tensors of their own, have one tensor scale."""
    for number in range(LAYERS):
        gate, up = (
            output.tensors[f"{moe.layer(number)}.{names[tensor][1]}"]
            for tensor, projections in moe.tensors
            if projections != DOWN
        )
        assert torch.equal(gate, up)
        assert len(set(gate.flatten().tolist())) == EXPERTS


def _check_grid(codes: torch.Tensor, grid: torch.Tensor, strategy: str) -> None:
    assert codes.dtype == FP8
    experts, rows, columns = codes.shape
    assert tuple(grid.shape) == (experts, *scale_shape(strategy, rows, columns))


def check_kept(moe: Moe, output: Output) -> set[str]:
    """The tensors of experts, and their biases, byte for byte."""
    sources = source_tensors(moe)
    names = {name for name in sources if name not in skeleton(moe)}
    for name in names:
        assert same(output.tensors[name], sources[name]), name
    return names


def check_rest(moe: Moe, output: Output, scheme: Scheme, experts: set[str]) -> None:
    """Nothing is written beside the experts but the skeleton, with attention in FP8 and named."""
    others: set[str] = set()
    for name, wanted in skeleton(moe).items():
        others.add(name)
        if ".self_attn." not in name or output.tensors[name].dtype != FP8:
            assert same(output.tensors[name], wanted), name
            continue
        scale = name.removesuffix("weight") + suffix(scheme)
        assert_close(dequantize(output.tensors[name], output.tensors[scale]), wanted, name)
        others.add(scale)
    assert output.tensors.keys() == experts | others


def declared(moe: Moe, output: Output, scheme: Scheme, expected: str | None) -> None:
    """Engines are told of the experts what they find, under each name that they ask by."""
    for number in range(LAYERS):
        module = moe.module(number)
        if scheme[1] == "fp8":
            assert (module in output.ignored) == (expected is None), module
            assert readers.vllm_fp8(output.config, module) == (expected is not None), module
            assert readers.transformers_fp8(output.config, module) == (expected is not None)
            continue
        for leaves in (readers.EXPERT_LEAVES, readers.UNGATED_LEAVES, readers.MIXTRAL_LEAVES):
            assert readers.vllm_experts(output.config, module, leaves) == expected, module
        asked = [f"{module}.{e}.{leaf}" for e in range(EXPERTS) for leaf in readers.EXPERT_LEAVES]
        found = readers.compressed_tensors(output.config, asked)
        assert set(found.values()) == {expected}
        assert all(entry.startswith("re:") for entry in output.ignored if "experts" in entry)
    router = f"{moe.layer(0)}.{moe.router}"
    if scheme[1] == "fp8":
        assert router in output.ignored
    else:
        assert readers.vllm(output.config, [router]) == {router: None}


# Written as one tensor: the name of each and of its scales.
def in_place(moe: Moe, scale: str) -> dict[str, tuple[str, str]]:
    def scale_of(name: str) -> str:
        return scale.format(name=name, module=name.removesuffix(".weight"))

    return {name: (name, scale_of(name)) for name, _ in moe.tensors}


LLAMA4_TENSORS = (
    ("feed_forward.experts.gate_up_proj", GATE_UP),
    ("feed_forward.experts.down_proj", DOWN),
)
LLAMA4_SIZES = {"intermediate_size": INTER, "intermediate_size_mlp": 512}
GRANITE_TENSORS = (
    ("block_sparse_moe.input_linear.weight", GATE_UP),
    ("block_sparse_moe.output_linear.weight", DOWN),
)
GRANITE_FUSED = {
    "block_sparse_moe.input_linear.weight": (
        "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.experts.gate_up_proj_scale_inv",
    ),
    "block_sparse_moe.output_linear.weight": (
        "block_sparse_moe.experts.down_proj",
        "block_sparse_moe.experts.down_proj_scale_inv",
    ),
}
INKLING_TENSORS = (("mlp.experts.w13_weight", GATE_UP), ("mlp.experts.w2_weight", DOWN))


def granite(model_type: str) -> Moe:
    return Moe(
        model_type,
        {"moe_intermediate_size": None, "intermediate_size": INTER},
        GRANITE_TENSORS,
        router="block_sparse_moe.router.layer",
    )


LLAMA4_TEXT = Moe(
    "llama4_text",
    {**LLAMA4_SIZES, "moe_intermediate_size": None},
    LLAMA4_TENSORS,
    layout="in-out",
    router="feed_forward.router",
)
LLAMA4 = replace(
    LLAMA4_TEXT, model_type="llama4", prefix="language_model.model.", nested="llama4_text"
)


def qwen3_vl(layout: str, inter: int = INTER) -> Moe:
    """As on the hub, transposed, or as transformers saves it."""
    prefix, nested = "model.language_model.", "qwen3_vl_moe_text"
    return Moe("qwen3_vl_moe", layout=layout, inter=inter, prefix=prefix, nested=nested)


QWEN_HUB = qwen3_vl("in-out")
QWEN_SAVED = qwen3_vl("out-in")
QWEN_SQUARE = qwen3_vl("in-out", inter=128)
MISTRAL4 = Moe(
    "mistral4", {"intermediate_size": 1024, "num_local_experts": None, "n_routed_experts": EXPERTS}
)
MISTRAL4_SQUARE = Moe("mistral4", inter=128)
STEP = Moe(
    "step3p5",
    tensors=(
        ("moe.gate_proj.weight", ("gate_proj",)),
        ("moe.up_proj.weight", ("up_proj",)),
        ("moe.down_proj.weight", DOWN),
    ),
    router="moe.gate",
)
ARIA = Moe(
    "aria",
    {
        "moe_num_experts": EXPERTS,
        "num_local_experts": None,
        "intermediate_size": HIDDEN,
        "moe_intermediate_size": None,
    },
    (("mlp.experts.fc1.weight", GATE_UP), ("mlp.experts.fc2.weight", DOWN)),
    layout="in-out",
    prefix="language_model.model.",
    router="mlp.router",
    nested="aria_text",
    inter=HIDDEN,
)
INKLING = Moe(
    "inkling_mm_model",
    tensors=INKLING_TENSORS,
    layout="out-in-interleaved",
    prefix="model.llm.",
    nested="inkling_text",
)
INKLING_SQUARE = replace(INKLING, inter=128)
GPT_OSS = Moe("gpt_oss", layout="in-out-interleaved", router="mlp.router", biased=True)
JETMOE = Moe(
    "jetmoe",
    tensors=(("mlp.input_linear.weight", GATE_UP), ("mlp.output_linear.weight", DOWN)),
    router="mlp.router.layer",
)
INKLING2 = replace(INKLING, model_type="inkling2", nested="inkling2_text")
UNKNOWN = Moe("somebody_moe")

GENERIC = [
    MISTRAL4,
    MISTRAL4_SQUARE,
    Moe("minimax_m3_vl_text"),
    Moe("gemma4"),
    Moe("qwen3_5_moe"),
    Moe("hy_v4"),
]
ALWAYS_SPLIT = [LLAMA4_TEXT, LLAMA4, QWEN_HUB, QWEN_SAVED, QWEN_SQUARE]
NEVER = [GPT_OSS, JETMOE, INKLING2, UNKNOWN, granite("granitemoehybrid")]

SPLIT = [(moe, scheme) for moe in ALWAYS_SPLIT for scheme in SCHEMES]
SPLIT += [(moe, scheme) for moe in GENERIC for scheme in SCHEMES if scheme != FP8_BLOCK]
KEPT = [(moe, scheme) for moe in NEVER for scheme in SCHEMES]
KEPT += [
    (granite(name), scheme)
    for name in ("granitemoe", "granitemoeshared")
    for scheme in SCHEMES
    if scheme != FP8_BLOCK
]
KEPT += [(ARIA, CHANNEL), (ARIA, CT_BLOCK), (ARIA, CT_TENSOR), (INKLING, FP8_TENSOR)]
FUSED = [(moe, FP8_BLOCK, in_place(moe, "{name}_scale_inv")) for moe in GENERIC]
FUSED += [(granite(name), FP8_BLOCK, GRANITE_FUSED) for name in ("granitemoe", "granitemoeshared")]
FUSED += [(STEP, scheme, in_place(STEP, "{module}." + suffix(scheme))) for scheme in SCHEMES]
FUSED += [(ARIA, FP8_BLOCK, in_place(ARIA, "{module}_scale_inv"))]
FUSED += [
    (moe, scheme, in_place(moe, "{name}_scale" + ("_inv" if scheme == FP8_BLOCK else "")))
    for moe in (INKLING, INKLING_SQUARE)
    for scheme in SCHEMES
    if scheme != FP8_TENSOR
]


def label(value: object) -> str | None:
    """An id for pytest."""
    if isinstance(value, Moe):
        square = "-square" if value.inter * 2 == value.hidden else ""
        return f"{value.model_type}-{value.layout}{square}"
    if isinstance(value, tuple) and value in SCHEMES:
        return named(value)
    return "names" if isinstance(value, dict) else None


@pytest.mark.parametrize(("moe", "scheme"), SPLIT, ids=label)
def test_split_into_matrices_of_each_expert(
    run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme
) -> None:
    output = quantize(run, write(moe, tmp_path), scheme)
    strategy = expert_strategy(scheme)
    check_rest(moe, output, scheme, check_split(moe, output, scheme, strategy))
    declared(moe, output, scheme, strategy)


@pytest.mark.parametrize(("moe", "scheme", "names"), FUSED, ids=label)
def test_left_in_one_tensor_with_scales_beside_it(
    run: Runner,
    tmp_path: Path,
    moe: Moe,
    scheme: Scheme,
    names: Mapping[str, tuple[str, str]],
) -> None:
    output = quantize(run, write(moe, tmp_path), scheme)
    strategy = expert_strategy(scheme)
    check_rest(moe, output, scheme, check_fused(moe, output, strategy, names))
    declared(moe, output, scheme, strategy)
    if strategy == "tensor":
        check_shared(moe, output, names)


@pytest.mark.parametrize(("moe", "scheme"), KEPT, ids=label)
def test_kept_in_16_bit(run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme) -> None:
    output = quantize(run, write(moe, tmp_path), scheme)
    check_rest(moe, output, scheme, check_kept(moe, output))
    declared(moe, output, scheme, None)


@pytest.mark.parametrize("moe", [LLAMA4_TEXT, LLAMA4], ids=label)
@pytest.mark.parametrize("scheme", [CT_BLOCK, FP8_BLOCK], ids=label)
def test_rows_that_engines_permute_have_no_block_scales(
    run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme
) -> None:
    output = quantize(run, write(moe, tmp_path), scheme)
    at = f"{moe.layer(1)}.self_attn."
    if scheme == FP8_BLOCK:
        for name in "qkv":
            assert output.tensors[f"{at}{name}_proj.weight"].dtype == torch.bfloat16
            assert f"{at}{name}_proj" in output.ignored
    else:
        for name in "qkv":
            assert output.tensors[f"{at}{name}_proj.weight_scale"].shape == (HIDDEN, 1)
        asked = [f"{at}{name}_proj" for name in "qkvo"]
        wanted = dict(zip(asked, ["channel"] * 3 + ["block"], strict=True))
        for config in (output.config, readers.turned(output.config)):
            assert readers.compressed_tensors(config, asked) == wanted
            assert readers.vllm(config, asked) == wanted
    scale = output.tensors[f"{at}o_proj.{suffix(scheme)}"]
    assert scale.shape == (HIDDEN // BLOCK, HIDDEN // BLOCK)
    assert "permute" in output.err


OPT_IN = [
    (granite(name), scheme)
    for name in ("granitemoe", "granitemoeshared", "granitemoehybrid")
    for scheme in SCHEMES
]
OPT_IN += [(STEP, scheme) for scheme in SCHEMES] + [(MISTRAL4, FP8_BLOCK)]


@pytest.mark.parametrize(("moe", "scheme"), OPT_IN, ids=label)
def test_split_where_it_is_asked_for(run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme) -> None:
    output = quantize(run, write(moe, tmp_path), scheme, "--experts", "per-expert")
    strategy = expert_strategy(scheme)
    check_rest(moe, output, scheme, check_split(moe, output, scheme, strategy))
    declared(moe, output, scheme, strategy)


FUSED_NAMES = in_place(MISTRAL4, "{name}_scale")
ASKED_FUSED = [(MISTRAL4, scheme, FUSED_NAMES) for scheme in (CHANNEL, CT_BLOCK, CT_TENSOR)]
ASKED_FUSED += [
    (
        granite("granitemoe"),
        scheme,
        {name: (new, scale.removesuffix("_inv")) for name, (new, scale) in GRANITE_FUSED.items()},
    )
    for scheme in (CHANNEL, CT_BLOCK, CT_TENSOR)
]
ASKED_FUSED += [
    (QWEN_HUB, CT_BLOCK, FUSED_NAMES),
    (QWEN_HUB, FP8_BLOCK, in_place(QWEN_HUB, "{name}_scale_inv")),
]


@pytest.mark.parametrize(("moe", "scheme", "names"), ASKED_FUSED, ids=label)
def test_left_in_one_tensor_where_it_is_asked_for(
    run: Runner,
    tmp_path: Path,
    moe: Moe,
    scheme: Scheme,
    names: Mapping[str, tuple[str, str]],
) -> None:
    output = quantize(run, write(moe, tmp_path), scheme, "--experts", "fused")
    strategy = expert_strategy(scheme)
    check_rest(moe, output, scheme, check_fused(moe, output, strategy, names))
    declared(moe, output, scheme, strategy)


@pytest.mark.parametrize(
    ("moe", "scheme", "form", "message"),
    [
        (GPT_OSS, CHANNEL, "per-expert", "biases"),
        (GPT_OSS, FP8_BLOCK, "fused", "biases"),
        (LLAMA4_TEXT, CHANNEL, "fused", "transposed"),
        (LLAMA4_TEXT, FP8_TENSOR, "fused", "tensor scales"),
        (QWEN_HUB, CHANNEL, "fused", "transposed"),
        (QWEN_HUB, CT_TENSOR, "fused", "transposed"),
        (MISTRAL4, FP8_TENSOR, "fused", "tensor scales"),
        (ARIA, FP8_TENSOR, "auto", "--experts keep"),
        (UNKNOWN, CHANNEL, "per-expert", "--expert-layout"),
        (UNKNOWN, FP8_BLOCK, "fused", "--expert-layout"),
    ],
    ids=label,
)
def test_forms_that_nothing_would_read_are_refused(
    run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme, form: str, message: str
) -> None:
    error = refused(run, write(moe, tmp_path), scheme, "--experts", form)
    assert message in error
    assert "experts" in error


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize(
    "moe", [LLAMA4_TEXT, QWEN_SAVED, MISTRAL4, STEP, ARIA, INKLING, UNKNOWN], ids=label
)
def test_kept_where_it_is_asked_for(run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme) -> None:
    output = quantize(run, write(moe, tmp_path), scheme, "--experts", "keep")
    check_rest(moe, output, scheme, check_kept(moe, output))
    declared(moe, output, scheme, None)


def reasons(run: Runner, source: Path, *options: str) -> dict[str, str]:
    done = run("inspect", source, "--json", *options)
    assert done.code == 0, done
    return {t["name"]: t["reason"] for t in json.loads(done.out)["tensors"]}


def test_the_reason_for_an_unknown_model_type_names_the_way_out(
    run: Runner, tmp_path: Path
) -> None:
    found = reasons(run, write(UNKNOWN, tmp_path))
    why = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert "not known" in why
    assert "--expert-layout" in why


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inter", [INTER, 128], ids=["oblong", "square"])
@pytest.mark.parametrize("options", [(), ("--experts", "per-expert")], ids=["auto", "asked"])
def test_a_stated_layout_splits_an_unknown_model_type(
    run: Runner, tmp_path: Path, layout: str, inter: int, options: tuple[str, ...]
) -> None:
    moe = Moe("somebody_moe", layout=layout, inter=inter)
    output = quantize(run, write(moe, tmp_path), CHANNEL, "--expert-layout", layout, *options)
    check_rest(moe, output, CHANNEL, check_split(moe, output, CHANNEL, "channel"))
    declared(moe, output, CHANNEL, "channel")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stated_layout_that_the_shapes_forbid_is_refused(
    run: Runner, tmp_path: Path, layout: str
) -> None:
    moe = Moe("somebody_moe", layout="in-out" if layout.startswith("out-in") else "out-in")
    error = refused(run, write(moe, tmp_path), CHANNEL, "--expert-layout", layout)
    assert layout in error


CONTRADICTED = [
    # What config.json says, what it is called in the message, and the number in the shape.
    ({"moe_intermediate_size": 256}, "intermediate size is 384, expected 256"),
    ({"hidden_size": 512}, "hidden size is 256, expected"),
    ({"num_local_experts": 4}, "experts is 3, expected 4"),
]


@pytest.mark.parametrize(("config", "message"), CONTRADICTED, ids=["inter", "hidden", "experts"])
def test_a_config_that_contradicts_the_shapes_is_refused(
    run: Runner, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    moe = Moe("mistral4", config)
    source = write(moe, tmp_path)
    error = refused(run, source, CHANNEL)
    assert message in error
    assert ".safetensors: tensor 'model.layers.0.mlp.experts." in error
    assert "[3, 256, 384]" in error or "[3, 768, 256]" in error
    output = quantize(run, source, CHANNEL, "--expert-layout", "out-in")
    assert check_split(moe, output, CHANNEL, "channel")


def test_a_layout_that_neither_config_nor_table_allows_is_refused(
    run: Runner, tmp_path: Path
) -> None:
    """llama4 as if transformers had saved it the other way round: shapes tell, not names."""
    moe = replace(LLAMA4_TEXT, layout="out-in")
    source = write(moe, tmp_path)
    error = refused(run, source, CHANNEL)
    assert "contradicts config.json" in error
    assert "--expert-layout" in error
    output = quantize(run, source, CHANNEL, "--expert-layout", "out-in")
    assert check_split(moe, output, CHANNEL, "channel")


def test_where_one_tensor_fits_both_ways_the_other_decides(run: Runner, tmp_path: Path) -> None:
    """2I = H: [E, 256, 256] is either form; down_proj [E, 256, 128] is only the saved one."""
    moe = qwen3_vl("out-in", inter=128)
    output = quantize(run, write(moe, tmp_path), CHANNEL)
    assert check_split(moe, output, CHANNEL, "channel")


# Experts that are matrices of their own already: the module of the experts and the three names.
OWN = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "minimax_m2": ("block_sparse_moe", ("w1", "w3", "w2")),
}


def own_experts(model_type: str, inter: int = INTER) -> tuple[Moe, Tensors, Tensors]:
    """A model of such a kind, its tensors, and those of its experts."""
    holder, names = OWN[model_type]
    moe = Moe(
        model_type,
        tensors=((f"{holder}.experts.x", DOWN),),
        router=f"{holder}.gate",
        inter=inter,
    )
    experts = {
        f"{moe.module(layer)}.{expert}.{names[(*GATE_UP, *DOWN).index(projection)]}.weight": matrix
        for layer in range(LAYERS)
        for (expert, projection), matrix in matrices(moe, layer).items()
    }
    return moe, skeleton(moe) | experts, experts


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize("model_type", OWN)
def test_matrices_of_each_expert_keep_their_names(
    run: Runner, tmp_path: Path, model_type: str, scheme: Scheme
) -> None:
    moe, tensors, experts = own_experts(model_type)
    output = quantize(run, write_checkpoint(tmp_path / "in", tensors, 2, moe.document), scheme)
    strategy = expert_strategy(scheme)
    check_rest(moe, output, scheme, check_own(output, experts, scheme, strategy))
    declared(moe, output, scheme, strategy)


def check_own(output: Output, experts: Tensors, scheme: Scheme, strategy: str) -> set[str]:
    written: set[str] = set()
    for name, wanted in experts.items():
        scale = name.removesuffix("weight") + suffix(scheme)
        assert output.tensors[scale].shape == scale_shape(strategy, *wanted.shape)
        assert_close(dequantize(output.tensors[name], output.tensors[scale]), wanted, name)
        written |= {name, scale}
    return written


def test_fused_is_refused_where_nothing_is(run: Runner, tmp_path: Path) -> None:
    moe, tensors, _ = own_experts("qwen3_moe")
    source = write_checkpoint(tmp_path / "in", tensors, 2, moe.document)
    assert "no experts that lie in one tensor" in refused(
        run, source, CHANNEL, "--experts", "fused"
    )


def test_matrices_of_each_expert_are_kept_where_it_is_asked_for(
    run: Runner, tmp_path: Path
) -> None:
    moe, tensors, experts = own_experts("mixtral")
    source = write_checkpoint(tmp_path / "in", tensors, 2, moe.document)
    output = quantize(run, source, CHANNEL, "--experts", "keep")
    check_rest(moe, output, CHANNEL, set(experts))
    declared(moe, output, CHANNEL, None)


RAGGED = [
    (moe, inter) for moe in (LLAMA4_TEXT, MISTRAL4, QWEN_HUB, INKLING) for inter in (192, 160)
]


@pytest.mark.parametrize(("moe", "inter"), RAGGED, ids=label)
@pytest.mark.parametrize("scheme", [CT_BLOCK, FP8_BLOCK], ids=label)
def test_experts_that_blocks_do_not_fit_fall_back_as_a_whole(
    run: Runner, tmp_path: Path, moe: Moe, inter: int, scheme: Scheme
) -> None:
    sizes = {k: inter for k, v in moe.config.items() if v == INTER}
    moe = replace(moe, config={**moe.config, **sizes}, inter=inter)
    output = quantize(run, write(moe, tmp_path), scheme)
    assert "no multiple of 128" in output.err
    if scheme == FP8_BLOCK:
        check_rest(moe, output, scheme, check_kept(moe, output))
        declared(moe, output, scheme, None)
        return
    if moe.model_type == INKLING.model_type:
        written = check_fused(moe, output, "channel", in_place(moe, "{name}_scale"))
    else:
        written = check_split(moe, output, scheme, "channel")
    check_rest(moe, output, scheme, written)
    for config in (output.config, readers.turned(output.config)):
        declared(moe, Output(output.tensors, config, ""), scheme, "channel")
        attention = f"{moe.layer(0)}.self_attn.o_proj"
        assert readers.vllm(config, [attention]) == {attention: "block"}


@pytest.mark.parametrize("scheme", [CT_BLOCK, FP8_BLOCK], ids=label)
def test_matrices_of_each_expert_fall_back_as_a_whole(
    run: Runner, tmp_path: Path, scheme: Scheme
) -> None:
    moe, tensors, experts = own_experts("mixtral", 192)
    output = quantize(run, write_checkpoint(tmp_path / "in", tensors, 1, moe.document), scheme)
    fallen = scheme == CT_BLOCK
    written = check_own(output, experts, scheme, "channel") if fallen else set(experts)
    check_rest(moe, output, scheme, written)
    declared(moe, output, scheme, "channel" if fallen else None)


def with_prediction(moe: Moe, tensors: Tensors) -> tuple[Tensors, dict[str, Any], set[str]]:
    """The model with its last layer as one that predicts further tokens; the tensors it has."""
    at = f"{moe.layer(LAYERS - 1)}."
    added = {
        f"{at}eh_proj.weight": torch.ones(moe.hidden, 2 * moe.hidden).bfloat16(),
        f"{at}enorm.weight": torch.ones(moe.hidden).bfloat16(),
        f"{at}hnorm.weight": torch.ones(moe.hidden).bfloat16(),
    }
    document = moe.document
    (document.get("text_config") or document)["num_hidden_layers"] = LAYERS - 1
    tensors = tensors | added
    return tensors, document, {name for name in tensors if name.startswith(at)}


def parent(module: str) -> str:
    return module.rpartition(".")[0]


PREDICTING: dict[str, Callable[[], tuple[Moe, Tensors]]] = {
    "own": lambda: own_experts("deepseek_v3")[:2],
    "mistral4": lambda: (MISTRAL4, source_tensors(MISTRAL4)),
    "llama4": lambda: (LLAMA4, source_tensors(LLAMA4)),
    "step3p5": lambda: (STEP, source_tensors(STEP)),
}


@pytest.mark.parametrize("scheme", [CHANNEL, CT_BLOCK, CT_TENSOR, FP8_BLOCK], ids=label)
@pytest.mark.parametrize("kind", PREDICTING)
def test_layers_that_predict_further_tokens_stay_in_16_bit_and_are_named(
    run: Runner, tmp_path: Path, kind: str, scheme: Scheme
) -> None:
    moe, tensors = PREDICTING[kind]()
    tensors, document, kept = with_prediction(moe, tensors)
    output = quantize(run, write_checkpoint(tmp_path / "in", tensors, 2, document), scheme)
    for name in kept:
        assert same(output.tensors[name], tensors[name]), name
    first, last = moe.module(0), moe.module(LAYERS - 1)
    dense = [f"{moe.layer(LAYERS - 1)}.{leaf}" for leaf in ("eh_proj", "self_attn.o_proj")]
    before = [t for name, t in output.tensors.items() if name.startswith(parent(first))]
    assert any(tensor.dtype == FP8 for tensor in before)
    if scheme[1] == "fp8":
        assert {last, *dense} <= set(output.ignored)
        assert first not in output.ignored
        return
    assert readers.vllm_experts(output.config, last) is None
    assert readers.vllm_experts(output.config, first) == expert_strategy(scheme)
    assert set(readers.vllm(output.config, dense).values()) == {None}


BESIDE = {"mtp.layers.0.": "predicts", "model.visual.blocks.0.": "tower"}


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize("own", [False, True], ids=["fused", "own"])
@pytest.mark.parametrize("at", BESIDE, ids=BESIDE.values())
def test_experts_beside_the_language_model_stay_in_16_bit_and_are_named(
    run: Runner, tmp_path: Path, at: str, own: bool, scheme: Scheme
) -> None:
    moe = Moe("qwen3_5_moe")
    tensors = source_tensors(moe)
    extra = own_experts("qwen3_moe")[2] if own else tensors
    beside = {
        name.replace("model.layers.0.", at): tensor.clone()
        for name, tensor in extra.items()
        if name.startswith(moe.module(0))
    }
    source = write_checkpoint(tmp_path / "in", tensors | beside, 1, moe.document)
    output = quantize(run, source, scheme)
    for name, tensor in beside.items():
        assert same(output.tensors[name], tensor), name
    module = f"{at}mlp.experts"
    declared(moe, output, scheme, expert_strategy(scheme))
    if scheme[1] == "fp8":
        assert not readers.vllm_fp8(output.config, module)
        assert not readers.transformers_fp8(output.config, module)
    else:
        for leaves in (readers.EXPERT_LEAVES, readers.UNGATED_LEAVES):
            assert readers.vllm_experts(output.config, module, leaves) is None


def test_what_is_odd_in_one_layer_decides_that_layer_alone(run: Runner, tmp_path: Path) -> None:
    tensors = source_tensors(MISTRAL4)
    odd = [name for name in tensors if name.startswith(MISTRAL4.module(1))]
    tensors |= {name: tensors[name].double() for name in odd}
    source = write_checkpoint(tmp_path / "in", tensors, 1, MISTRAL4.document)
    output = quantize(run, source, CHANNEL)
    assert f"{MISTRAL4.module(0)}.0.gate_proj.weight" in output.tensors
    assert readers.vllm_experts(output.config, MISTRAL4.module(0)) == "channel"
    assert readers.vllm_experts(output.config, MISTRAL4.module(1)) is None


def test_layers_may_have_experts_of_different_sizes(run: Runner, tmp_path: Path) -> None:
    config = {"moe_intermediate_size": None, "moe_layer_sizes": [INTER, 256]}
    narrow = Moe("mistral4", config, inter=256)
    wide = Moe("mistral4", config)
    tensors = source_tensors(wide) | {
        name: tensor for name, tensor in source_tensors(narrow).items() if ".layers.1." in name
    }
    output = quantize(run, write_checkpoint(tmp_path / "in", tensors, 1, wide.document), CHANNEL)
    assert output.tensors[f"{wide.module(0)}.2.up_proj.weight"].shape == (INTER, HIDDEN)
    assert output.tensors[f"{wide.module(1)}.2.up_proj.weight"].shape == (256, HIDDEN)


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize("model_type", ["dbrx", "somebody"])
def test_experts_stacked_into_one_matrix_stay_in_16_bit(
    run: Runner, tmp_path: Path, scheme: Scheme, model_type: str
) -> None:
    moe = Moe(
        model_type,
        {"d_model": HIDDEN, "ffn_config": {"moe_num_experts": EXPERTS, "ffn_hidden_size": INTER}},
        tensors=(("ffn.experts.mlp.w1", GATE_UP),),
        prefix="transformer.",
        router="ffn.router.layer",
    )
    tensors = skeleton(moe)
    stacked = {
        f"{moe.layer(number)}.ffn.experts.mlp.{name}": torch.ones(
            EXPERTS * INTER, HIDDEN
        ).bfloat16()
        for number in range(LAYERS)
        for name in ("w1", "v1", "w2")
    }
    source = write_checkpoint(tmp_path / "in", tensors | stacked, 1, moe.document)
    output = quantize(run, source, scheme)
    check_rest(moe, output, scheme, set(stacked))
    if scheme[1] == "fp8":
        assert {f"{moe.layer(n)}.ffn.experts" for n in range(LAYERS)} <= set(output.ignored)
    else:
        assert readers.vllm_experts(output.config, f"{moe.layer(1)}.ffn.experts") is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_attention_made_of_experts_stays_in_16_bit(
    run: Runner, tmp_path: Path, scheme: Scheme
) -> None:
    """jetmoe: transformers takes any module called `experts` for FP8 unless it is named."""
    at = "self_attention.experts."
    tensors = source_tensors(JETMOE) | {
        f"{JETMOE.layer(number)}.{at}{name}.weight": torch.ones(EXPERTS, HIDDEN, HIDDEN).bfloat16()
        for number in range(LAYERS)
        for name in ("input_linear", "output_linear")
    }
    source = write_checkpoint(tmp_path / "in", tensors, 1, JETMOE.document)
    output = quantize(run, source, scheme)
    kept = {name for name in tensors if name not in skeleton(JETMOE)}
    check_rest(JETMOE, output, scheme, kept)
    module = f"{JETMOE.layer(1)}.self_attention.experts"
    if scheme[1] == "fp8":
        assert module in output.ignored
    else:
        assert readers.vllm_experts(output.config, module) is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_shared_experts_in_one_tensor_stay_in_16_bit(
    run: Runner, tmp_path: Path, scheme: Scheme
) -> None:
    """inkling's: vLLM builds them without quantization, unlike the experts beside them."""
    shared = {
        f"{INKLING.layer(number)}.mlp.shared_experts.shared_{name}": torch.ones(
            2, *shape
        ).bfloat16()
        for number in range(LAYERS)
        for name, shape in (("w13_weight", (2 * INTER, HIDDEN)), ("w2_weight", (HIDDEN, INTER)))
    }
    tensors = source_tensors(INKLING) | shared
    source = write_checkpoint(tmp_path / "in", tensors, 1, INKLING.document)
    output = quantize(run, source, scheme)
    for name, tensor in shared.items():
        assert same(output.tensors[name], tensor)
    module = f"{INKLING.layer(0)}.mlp.shared_experts"
    quantized = None if scheme == FP8_TENSOR else expert_strategy(scheme)
    declared(INKLING, output, scheme, quantized)
    if scheme[1] == "fp8":
        assert module in output.ignored
    else:
        assert readers.vllm_experts(output.config, module) is None


@pytest.mark.parametrize("scheme", [CHANNEL, CT_BLOCK, FP8_BLOCK], ids=label)
def test_a_dense_layer_of_alternating_rows_has_no_block_scales(
    run: Runner, tmp_path: Path, scheme: Scheme
) -> None:
    dense = {
        f"{INKLING.layer(0)}.mlp.w13_dn.weight": torch.randn(2 * INTER, HIDDEN).bfloat16(),
        f"{INKLING.layer(0)}.mlp.w2_md.weight": torch.randn(HIDDEN, INTER).bfloat16(),
    }
    tensors = source_tensors(INKLING) | dense
    source = write_checkpoint(tmp_path / "in", tensors, 1, INKLING.document)
    output = quantize(run, source, scheme)
    module = f"{INKLING.layer(0)}.mlp.w13_dn"
    if scheme == FP8_BLOCK:
        assert output.tensors[f"{module}.weight"].dtype == torch.bfloat16
        assert module in output.ignored
        return
    assert output.tensors[f"{module}.weight_scale"].shape == (2 * INTER, 1)
    assert readers.vllm(output.config, [module]) == {module: "channel"}


@pytest.mark.parametrize("options", [(), ("--experts", "per-expert")], ids=["auto", "asked"])
@pytest.mark.parametrize(
    "pattern", ["model.layers.0.mlp.experts.down_proj", "re:.*layers\\.0\\.mlp\\.experts"]
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_one_tensor_ignored_keeps_the_whole_set_of_its_layer_alone(
    run: Runner, tmp_path: Path, scheme: Scheme, pattern: str, options: tuple[str, ...]
) -> None:
    source = write(MISTRAL4, tmp_path)
    output = quantize(run, source, scheme, "--ignore", pattern, *options)
    first, second = MISTRAL4.module(0), MISTRAL4.module(1)
    for name in ("gate_up_proj", "down_proj"):
        assert output.tensors[f"{first}.{name}"].dtype == torch.bfloat16
        assert f"{first}.{name}_scale_inv" not in output.tensors
    assert any(t.dtype == FP8 for name, t in output.tensors.items() if name.startswith(second))
    if scheme[1] == "fp8":
        assert first in output.ignored
        assert second not in output.ignored
        return
    assert readers.vllm_experts(output.config, first) is None
    assert readers.vllm_experts(output.config, second) == expert_strategy(scheme)


@pytest.mark.parametrize(
    ("moe", "scheme"),
    [
        (LLAMA4_TEXT, CHANNEL),
        (LLAMA4_TEXT, CT_BLOCK),
        (ARIA, FP8_BLOCK),
        (INKLING, CT_BLOCK),
        (STEP, FP8_TENSOR),
        (MISTRAL4, FP8_TENSOR),
        (QWEN_HUB, FP8_TENSOR),
    ],
    ids=label,
)
def test_a_small_budget_and_more_threads_give_the_same_bytes(
    run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme
) -> None:
    """Rows and columns that alternate or lie across each other go through in parts."""
    source = write(moe, tmp_path)
    whole = quantize(run, source, scheme)
    (tmp_path / "out").rename(tmp_path / "whole")
    parts = quantize(run, source, scheme, "--memory-budget", "1500KB", "--threads", "2")
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(same(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    assert whole.config == parts.config


@pytest.mark.parametrize(
    ("moe", "scheme", "form"),
    [
        (ARIA, CHANNEL, "per-expert"),
        (INKLING, CHANNEL, "per-expert"),
        (INKLING2, CHANNEL, "fused"),
        (JETMOE, CHANNEL, "per-expert"),
        (LLAMA4_TEXT, FP8_BLOCK, "fused"),
        (granite("granitemoehybrid"), FP8_BLOCK, "fused"),
    ],
    ids=label,
)
def test_a_form_that_vllm_was_seen_to_lose_is_never_said_to_load(
    run: Runner, tmp_path: Path, moe: Moe, scheme: Scheme, form: str
) -> None:
    """It may be refused, or written on the user's word; not with the claim that it is read."""
    source = write(moe, tmp_path)
    granularity, dialect = scheme
    done = run(
        "quantize",
        source,
        tmp_path / "out",
        "--scheme",
        granularity,
        "--format",
        dialect,
        "--experts",
        form,
    )
    assert "vLLM does" not in done.err
    if done.code == 0:
        assert "no engine" in done.err or "vLLM" in done.err
