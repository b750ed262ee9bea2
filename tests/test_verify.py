"""Outputs against their sources: what is right passes, and whatever is wrong is found and named."""

import errno
import gc
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8stream.checkpoint import open_checkpoint
from fp8stream.comparison import BOUND, Comparer
from fp8stream.errors import CheckpointError
from fp8stream.expectation import LayerError, Problem
from fp8stream.fp8 import Quantizer, dequantize_weight
from fp8stream.journal import first_line
from fp8stream.layout import INDEX_NAME
from fp8stream.memory import MIB, MemoryUsage, PeakMeter
from fp8stream.scheme import Granularity, Scheme
from fp8stream.verify import compare_values, prepare
from tests import oracle
from tests.conftest import Run, Tensors, llama_tensors, write_checkpoint
from tests.test_bytes import checkpoint as odd_tensors
from tests.test_hostile import make_socket
from tests.test_stream import SCHEMES, convert, schemes

Runner = Callable[..., Run]
CPU = torch.device("cpu")
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def verify(
    source: Path, output: Path, budget: int = 64 * MIB, threads: int = 2
) -> tuple[list[Problem], dict[str, LayerError]]:
    """What is wrong, and the error of every layer."""
    comparison = prepare(open_checkpoint(source), str(output), None, budget, threads)
    checked = list(compare_values(comparison))
    problems = [*comparison.problems, *(p for done in checked for p in done.problems)]
    layers = {layer.name: layer for done in checked for layer in done.layers}
    if not problems:
        assert sum(done.bytes_read for done in checked) >= comparison.bytes_read
    return sorted(problems, key=lambda p: (p.file, p.tensor, p.problem)), layers


def rewrite(output: Path, change: Callable[[Tensors], None]) -> None:
    """The one file of an output with other tensors in it, and no checksum of ours."""
    tensors = load_file(output / "model.safetensors")
    change(tensors)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


# What passes.


@schemes
@pytest.mark.parametrize("shards", [1, 3])
def test_an_output_of_ours_is_equal_to_the_bit(tmp_path: Path, scheme: Scheme, shards: int) -> None:
    """Experts, ragged blocks, every dtype, rows of zeros and tiny ones, in one file or in many."""
    source = write_checkpoint(tmp_path / "in", odd_tensors(), shards=2)
    size = 5 * 10**9 if shards == 1 else 3 * 10**6
    plan = convert(source, tmp_path / "out", scheme, max_shard_size=size)
    problems, layers = verify(source, tmp_path / "out")
    assert problems == []
    assert set(layers) == {w.name for t in plan.tensors for w in t.weights}


@pytest.mark.parametrize("tied", [False, True])
def test_errors_are_those_of_the_definition(tmp_path: Path, tied: bool) -> None:
    tensors = llama_tensors(tied=tied)
    tensors[DOWN][3] = 0
    for scheme in SCHEMES:
        source = write_checkpoint(tmp_path / scheme.format / scheme.granularity / "in", tensors)
        output = source.parent / "out"
        convert(source, output, scheme)
        problems, layers = verify(source, output)
        assert problems == []
        stored = load_file(output / "model.safetensors")
        for name, found in layers.items():
            codes = stored[name]
            scale = stored[name.removesuffix("weight") + scheme.scale_suffix]
            weight = tensors[name].double()
            error = (weight - dequantize_weight(codes, scale).double()).abs()
            magnitude = codes.view(torch.uint8) & 0x7F
            assert found.relative_error == pytest.approx(float(error.norm() / weight.norm()), 1e-5)
            assert found.max_error == pytest.approx(float(error.max()), 1e-5)
            assert found.zeros == pytest.approx(float((magnitude == 0).double().mean()))
            assert found.saturated == pytest.approx(float((magnitude == 0x7E).double().mean()))
            assert found.rows_scale_one == int((scale == 1).sum())
        ones = 1 if scheme.granularity is Granularity.CHANNEL else 0
        assert layers[DOWN].rows_scale_one == ones


@schemes
def test_budget_and_threads_change_nothing(tmp_path: Path, scheme: Scheme) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors(hidden=512, inter=768, kv=256))
    output = tmp_path / "out"
    convert(source, output, scheme)
    name = "model.layers.0.self_attn.k_proj"
    spec = {t.name: t for t in open_checkpoint(output).tensors}
    for tensor, at in ((DOWN, 700), (DOWN, 120_000), (f"{name}.{scheme.scale_suffix}", 1)):
        file = output / spec[tensor].file
        patch(file, spec[tensor].offset + at, b"\x15")
    first = verify(source, output, 1024 * MIB, 1)
    assert {p.tensor for p in first[0]} == {DOWN, f"{name}.{scheme.scale_suffix}"}
    for budget, threads in ((MIB, 1), (MIB, 3), (3 * MIB, 2), (1024 * MIB, 3)):
        problems, layers = verify(source, output, budget, threads)
        assert problems == first[0]
        assert layers.keys() == first[1].keys()
        for key, layer in layers.items():
            for field in ("relative_error", "max_error", "zeros", "saturated"):
                wanted = getattr(first[1][key], field)
                assert getattr(layer, field) == pytest.approx(wanted, rel=1e-5), key


@pytest.mark.parametrize("columns", [40_001, 40_004, 131_080])
def test_rows_wider_than_a_scratch(tmp_path: Path, columns: int) -> None:
    """Whole words, or not, and more words in a row than a byte can count."""
    tensors, name = llama_tensors(), DOWN
    tensors[name] = torch.randn(128, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors[name][5, 3:90] = 0
    source = write_checkpoint(tmp_path / "in", tensors)
    convert(source, tmp_path / "out", Scheme(), budget=4 * MIB)
    problems, layers = verify(source, tmp_path / "out", budget=16 * columns + MIB // 4, threads=1)
    assert problems == []
    codes = load_file(tmp_path / "out" / "model.safetensors")[name].view(torch.uint8) & 0x7F
    assert layers[name].zeros == int((codes == 0).sum()) / codes.numel()
    assert layers[name].saturated == int((codes == 0x7E).sum()) / codes.numel()


def test_patterns_need_not_be_told(tmp_path: Path, run: Runner, llama: Path) -> None:
    """What was asked for is read off the output, in whatever words it was."""
    for number, options in enumerate(
        [
            ["--ignore", "re:.*k_proj"],
            ["--ignore", "model.layers.0", "--scheme", "block"],
            ["--ignore", "re:.*layers.1.*up_proj", "--ignore", "model.layers.0.self_attn.o_proj"],
            ["--include", "lm_head", "--ignore", "re:.*mlp", "--scheme", "tensor"],
        ]
    ):
        output = tmp_path / f"out{number}"
        assert run("quantize", llama, output, "--device", "cpu", *options).code == 0
        assert run("verify", output, "--against", llama).code == 0, options


def test_one_file_as_source(tmp_path: Path, run: Runner) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors()) / "model.safetensors"
    assert run("quantize", source, tmp_path / "out", "--device", "cpu").code == 0
    done = run("verify", tmp_path / "out", "--against", source)
    assert done.code == 0, done


# What others wrote.


def others(
    source: Path,
    output: Path,
    granularity: Granularity,
    suffix: str = "weight_scale",
    dtype: torch.dtype = torch.bfloat16,
    config: Mapping[str, Any] | None = None,
) -> Tensors:
    """An output by compressed-tensors' own code, its linear layers' scales beside them."""
    tensors: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            codes, scale = oracle.compressed_tensors(tensor, granularity)
            tensors[name] = codes.contiguous()
            tensors[name.removesuffix("weight") + suffix] = scale.to(dtype)
    output.mkdir()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((source / "config.json").read_text())
    described["quantization_config"] = config or {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": granularity.value},
                "input_activations": None,
            }
        },
    }
    (output / "config.json").write_text(json.dumps(described))
    return tensors


DEEPSEEK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain", llama_tensors(kv=192, inter=320))


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_output_of_another_tool_is_within_the_bound(
    tmp_path: Path, run: Runner, plain: Path, granularity: Granularity, dtype: torch.dtype
) -> None:
    others(plain, tmp_path / "out", granularity, dtype=dtype)
    done = run("verify", tmp_path / "out", "--against", plain, "--json")
    document = json.loads(done.out)
    assert (done.code, document["problems"]) == (0, [])
    assert (document["ok"], document["compared"]) == (True, "bound")
    assert len(document["layers"]) == 14
    assert all(0.01 < layer["relative_error"] < 0.04 for layer in document["layers"])


def test_scales_that_are_called_inverse(tmp_path: Path, plain: Path) -> None:
    others(plain, tmp_path / "out", Granularity.BLOCK, "weight_scale_inv", config=DEEPSEEK)
    problems, layers = verify(plain, tmp_path / "out")
    assert problems == []
    assert len(layers) == 14


def test_scales_of_other_shapes(tmp_path: Path, plain: Path) -> None:
    """A number alone for a tensor, a vector for channels."""
    for granularity, shape in ((Granularity.TENSOR, ()), (Granularity.CHANNEL, (-1,))):
        output = tmp_path / granularity.value
        tensors = others(plain, output, granularity)
        flat = {n: t.reshape(shape) if n.endswith("scale") else t for n, t in tensors.items()}
        save_file(flat, output / "model.safetensors")
        assert verify(plain, output)[0] == []


def test_scales_of_activations_are_not_compared(tmp_path: Path, run: Runner, plain: Path) -> None:
    tensors = others(plain, tmp_path / "out", Granularity.TENSOR)
    name = DOWN.replace("weight", "input_scale")
    save_file({**tensors, name: torch.ones(1)}, tmp_path / "out" / "model.safetensors")
    done = run("verify", tmp_path / "out", "--against", plain, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["not_compared"] == [name]


def test_a_code_is_allowed_what_the_bound_allows_and_no_more() -> None:
    """Every code, at quotients around every border between two of them."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    borders = (values[1:] + values[:-1]) / 2
    quantizer = Quantizer(CPU, 128 * 128)
    comparer = Comparer(quantizer, 128 * 128)
    one = torch.ones(1)
    for sign in (1, -1):
        for shift in (-3, -1.5, -0.9, 0.0, 0.9, 1.5, 3):
            weight = sign * borders * (1 + shift * BOUND)
            for step in (-1, 0, 1):
                codes = (weight.to(torch.float8_e4m3fn).view(torch.uint8).int() + step).clamp(0)
                stored = codes.to(torch.uint8).view(torch.float8_e4m3fn)
                rows = comparer.compare(
                    weight[None], stored[None], Granularity.TENSOR, one, one, exact=False
                )
                low = (weight * (1 - BOUND)).to(torch.float8_e4m3fn).float().abs()
                high = (weight * (1 + BOUND)).clamp(-448, 448).to(torch.float8_e4m3fn).float().abs()
                decoded = stored.float()
                right = (low <= decoded.abs()) & (decoded.abs() <= high)
                right &= (decoded == 0) | (decoded.sign() == sign)
                assert int(rows.wrong) == int((~right).sum())


def test_a_code_of_another_tool_beyond_the_bound_is_found(tmp_path: Path, plain: Path) -> None:
    tensors = others(plain, tmp_path / "out", Granularity.CHANNEL)
    codes = tensors[DOWN].view(torch.uint8)
    scale = tensors[DOWN.replace("weight", "weight_scale")].float()
    weight = load_file(plain / "model.safetensors")[DOWN].float()
    quotient = (weight / scale).abs()
    at = (quotient > 16).nonzero()[5].tolist()
    codes[at[0], at[1]] ^= 4  # half of its value: no rounding does that
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    (problem,), _ = verify(plain, tmp_path / "out")
    assert problem.tensor == DOWN
    assert problem.problem.startswith("1 of 40960 codes beyond the bound differ, the first at")
    assert str(at) in problem.problem


@pytest.mark.parametrize(
    ("change", "named", "words"),
    [
        (lambda c: c.update(ignore=["lm_head", "re:.*up_proj"]), "up_proj", "read as 16 bit"),
        (lambda c: c.update(ignore=[]), "lm_head", "would be read as channel scales"),
        (
            lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="tensor"),
            "down_proj",
            "it has channel scales, and would be read as tensor scales",
        ),
        (lambda c: c.update(config_groups=3), "", "cannot be read"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["re:.*mlp"]), "q_proj", "16 bit"),
    ],
)
def test_a_config_of_another_tool_must_say_what_the_files_hold(
    tmp_path: Path, plain: Path, change: Callable[[dict[str, Any]], None], named: str, words: str
) -> None:
    others(plain, tmp_path / "out", Granularity.CHANNEL)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    problems, _ = verify(plain, tmp_path / "out")
    assert problems
    assert {p.file for p in problems} == {"config.json"}
    assert any(named in p.problem and words in p.problem for p in problems)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_another_tool_that_are_none(tmp_path: Path, plain: Path, value: float) -> None:
    tensors = others(plain, tmp_path / "out", Granularity.CHANNEL)
    name = DOWN.replace("weight", "weight_scale")
    tensors[name][7] = value
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    (problem,), _ = verify(plain, tmp_path / "out")
    assert (problem.tensor, problem.problem) == (
        name,
        "1 of 128 scales are not positive numbers",
    )


Scales = Callable[[torch.Tensor], torch.Tensor]


def under(source: Path, output: Path, granularity: Granularity, change: Scales) -> None:
    """An output of another tool whose scales are `change` of amax / 448, and its codes those."""
    tensors = others(source, output, granularity)
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = change(oracle.amax_of([weight], granularity) / 448)
            wide = oracle.expand(scale.float(), weight.shape, granularity)
            codes = (weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors |= {name: codes, name.removesuffix("weight") + "weight_scale": scale}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda due: torch.full_like(due, 1e6).bfloat16(), "large"),
        (lambda due: torch.full_like(due, 1e-30).bfloat16(), "small"),
        (lambda due: (due / 16).bfloat16(), "small"),
        (lambda due: (due * 1e5).bfloat16(), "large"),
        (lambda due: due * 0.98, "small"),
        (lambda due: due * 70, "large"),
    ],
    ids=["all zero", "all saturated", "16 times too small", "1e5 times too large", "2 %", "70"],
)
def test_scales_that_do_not_fit_the_values(
    tmp_path: Path, run: Runner, plain: Path, granularity: Granularity, change: Scales, what: str
) -> None:
    """Codes that are right under them all the same."""
    under(plain, tmp_path / "out", granularity, change)
    done = run("verify", tmp_path / "out", "--against", plain, "--json")
    problems = json.loads(done.out)["problems"]
    assert done.code == 1
    assert len(problems) == 14
    (problem,) = (p for p in problems if p["tensor"] == SCALE)
    count = int(torch.Size(granularity.scale_shape((128, 320))).numel())
    first = {Granularity.CHANNEL: "[0, 0]", Granularity.BLOCK: "[0, 0]"}.get(granularity)
    which = f"{count} of {count} scales are too {what}, the first at {first}: expected"
    which = which if first else f"the scale is too {what}: expected"
    assert problem["problem"].startswith(which)
    assert "the largest value / 448" in problem["problem"]


def test_one_scale_that_does_not_fit_is_named(tmp_path: Path, plain: Path) -> None:
    weight = load_file(plain / "model.safetensors")[DOWN]
    due = float(weight[7].abs().max()) / 448

    def change(scales: torch.Tensor) -> torch.Tensor:
        scales[7] /= 3
        return scales

    under(plain, tmp_path / "out", Granularity.CHANNEL, change)
    problems, _ = verify(plain, tmp_path / "out")
    (problem,) = (p for p in problems if p.tensor == SCALE)
    assert problem.problem.startswith("1 of 128 scales are too small, the first at [7, 0]: ")
    assert f"expected at least {due:.3g} (the largest value / 448), found" in problem.problem


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize(
    "change",
    [
        lambda due: due.bfloat16(),
        lambda due: due.half(),
        lambda due: (1 / (1 / due).bfloat16()).bfloat16(),
        lambda due: due.log2().ceil().exp2(),
        lambda due: due * 448 / 240,
        lambda due: due * 15,
    ],
    ids=["BF16", "F16", "an inverse in BF16", "powers of two", "a limit of 240", "15"],
)
def test_scales_that_others_choose(
    tmp_path: Path, plain: Path, granularity: Granularity, change: Scales
) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors[DOWN] *= 2.0**-8  # whose scales are below what F16 has its whole precision for
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    under(plain, tmp_path / "out", granularity, change)
    assert verify(plain, tmp_path / "out")[0] == []


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_groups_that_others_have_no_scale_for(
    tmp_path: Path, plain: Path, granularity: Granularity, dtype: torch.dtype
) -> None:
    """Zeros, for which the scale is an epsilon, and values that are near them."""
    tensors = load_file(plain / "model.safetensors")
    tensors[DOWN][:128, :128] = 0
    tensors[DOWN][3:100] = 1e-9
    name = DOWN.replace("down", "up")
    tensors[name][:] = 0
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    least = {torch.float16: 1e-7}.get(dtype, 1e-4 / 448)

    def change(due: torch.Tensor) -> torch.Tensor:
        scales = due.clamp(min=least).to(dtype)
        scales[due == 0] = torch.finfo(dtype).eps
        return scales

    under(plain, tmp_path / "out", granularity, change)
    assert verify(plain, tmp_path / "out")[0] == []


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**-20, 2.0**70])
def test_weights_of_any_size_have_their_errors_told(
    tmp_path: Path, plain: Path, granularity: Granularity, factor: float
) -> None:
    """Although the squares of such values are none of float32."""
    before = load_file(plain / "model.safetensors")
    tensors = {n: t * factor if n.endswith("_proj.weight") else t for n, t in before.items()}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    under(plain, tmp_path / "out", granularity, lambda due: due)
    problems, layers = verify(plain, tmp_path / "out")
    assert problems == []
    assert all(0.02 < (layer.relative_error or 0) < 0.04 for layer in layers.values())


@pytest.mark.parametrize("granularity", Granularity)
def test_a_weight_that_is_lost_under_the_smallest_scale_of_a_tool(
    tmp_path: Path, plain: Path, granularity: Granularity
) -> None:
    """No scale is too large by itself, but nothing is left of the weight."""
    tensors = load_file(plain / "model.safetensors")
    tensors[DOWN] *= 1e-10
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    under(plain, tmp_path / "out", granularity, lambda due: due.clamp(min=1e-4 / 448))
    (problem,), layers = verify(plain, tmp_path / "out")
    assert problem.tensor == DOWN
    wanted = "the values are lost under the scales: expected a relative error of at most 0.0703, "
    assert problem.problem == wanted + "found 1"
    assert layers[DOWN].relative_error == pytest.approx(1, rel=1e-3)


# What is wrong.


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def renamed(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.down_prej.weight"] = tensors.pop(DOWN)


def reshaped(tensors: Tensors) -> None:
    tensors[DOWN] = tensors[DOWN].reshape(-1, 128).contiguous()


def swapped(tensors: Tensors) -> None:
    one, other = (f"model.layers.{n}.mlp.down_proj.weight_scale" for n in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def dequantized(tensors: Tensors) -> None:
    tensors[DOWN] = tensors[DOWN].to(torch.bfloat16)


def added(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(3)


def other_dtype(tensors: Tensors) -> None:
    tensors[NORM] = tensors[NORM].float()


def other_norm(tensors: Tensors) -> None:
    tensors[NORM][5] = 2


SCALE = DOWN.replace("weight", "weight_scale")


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop(DOWN), {DOWN}),
        (drop(SCALE), {SCALE, DOWN}),
        (drop(NORM), {NORM}),
        (renamed, {DOWN, "model.layers.1.mlp.down_prej.weight"}),
        (reshaped, {DOWN}),
        (swapped, {SCALE, SCALE.replace("1", "0"), DOWN, DOWN.replace("1", "0")}),
        (dequantized, {DOWN}),
        (added, {"model.layers.1.mlp.extra.weight"}),
        (other_dtype, {NORM}),
        (other_norm, {NORM}),
    ],
)
def test_what_is_wrong_with_tensors_is_named(
    tmp_path: Path,
    plain: Path,
    change: Callable[[Tensors], None],
    named: set[str],
    ours: bool,
) -> None:
    output = tmp_path / "out"
    convert(plain, output, Scheme())
    tensors = load_file(output / "model.safetensors")
    change(tensors)
    # Half damaged: the metadata still tells whose it is, or tells nothing.
    metadata = {"format": "pt", **({"fp8stream": "0"} if ours else {})}
    save_file(tensors, output / "model.safetensors", metadata=metadata)
    problems, _ = verify(plain, output)
    found = {p.tensor for p in problems if p.tensor}
    assert found
    assert found <= named | {SCALE}
    assert found & named
    assert any(p.file == "model.safetensors" and not p.tensor for p in problems) == ours


def test_thousands_of_wrong_codes_are_one_problem(tmp_path: Path, llama: Path) -> None:
    output = tmp_path / "out"
    convert(llama, output, Scheme())
    spec = {t.name: t for t in open_checkpoint(output).tensors}[DOWN]
    codes = (output / spec.file).read_bytes()[spec.offset :][: spec.nbytes]
    changed = bytes(byte ^ 1 for byte in codes[600:4600])
    patch(output / spec.file, spec.offset + 600, changed)
    (problem,), _ = verify(llama, output)
    assert problem == Problem(
        spec.file,
        DOWN,
        f"4000 of 32768 codes differ, the first at [2, 88]: expected 0x{codes[600]:02x}, "
        f"found 0x{changed[0]:02x}",
    )


@schemes
def test_a_wrong_scale_is_not_blamed_on_its_codes(
    tmp_path: Path, llama: Path, scheme: Scheme
) -> None:
    output = tmp_path / "out"
    convert(llama, output, scheme)
    name = f"model.layers.0.self_attn.q_proj.{scheme.scale_suffix}"
    spec = {t.name: t for t in open_checkpoint(output).tensors}[name]
    patch(output / spec.file, spec.offset + 2, b"\x11")
    problems, _ = verify(llama, output)
    assert [p.tensor for p in problems] == [name]
    assert "scales differ, the first at [0" in problems[0].problem


def test_a_source_that_no_code_can_stand_for(tmp_path: Path, plain: Path) -> None:
    convert(plain, tmp_path / "out", Scheme())
    tensors = load_file(plain / "model.safetensors")
    tensors[DOWN][2, 3] = float("inf")
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    (problem,), _ = verify(plain, tmp_path / "out")
    assert problem.tensor == DOWN
    assert "NaN or infinity" in problem.problem


THINGS: Mapping[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a directory": os.mkdir,
}

FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("config.json", lambda p: p.write_text(p.read_text() + "\n"), "expected the end of the file"),
    ("config.json", lambda p: p.write_text(p.read_text()[:-1]), "found the end of the file"),
    ("config.json", lambda p: p.write_text(p.read_text().replace("lm_head", "lm_heed")), "line "),
    ("config.json", lambda p: p.write_text("{"), "broken"),
    ("config.json", Path.unlink, "missing"),
    (INDEX_NAME, Path.unlink, "missing"),
    (INDEX_NAME, lambda p: p.write_text(p.read_text().replace("layers.1", "layers.2")), "line "),
    (INDEX_NAME, lambda p: p.write_text(p.read_text()[:-9]), "line "),
    (INDEX_NAME, lambda p: p.write_text(p.read_text().replace("00002-", "00009-")), "line "),
    ("tokenizer.json", Path.unlink, "missing"),
    ("tokenizer.json", lambda p: p.write_text("{ }"), "differs from the source's at byte 1"),
    ("extra.safetensors", lambda p: p.write_text("{ }"), "unexpected"),
    ("extra.safetensors.index.json", lambda p: p.write_text("{ }"), "unexpected"),
    ("model-00002-of-00002.safetensors", Path.unlink, "missing"),
    (
        "model-00002-of-00002.safetensors",
        lambda p: p.write_bytes(p.read_bytes()[:-5]),
        "truncated",
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), FILES)
def test_what_is_wrong_with_files_is_named(
    tmp_path: Path,
    run: Runner,
    llama: Path,
    name: str,
    change: Callable[[Path], object],
    words: str,
) -> None:
    output = tmp_path / "out"
    convert(llama, output, Scheme(), max_shard_size=250_000)
    assert verify(llama, output)[0] == []
    change(output / name)
    done = run("verify", output, "--against", llama, "--json")
    document = json.loads(done.out)
    assert (done.code, document["ok"]) == (1, False)
    assert done.err.startswith("fp8stream: ")
    assert len(done.err.splitlines()) == 1
    problems = document["problems"]
    assert any(p["file"] == name or name in p["problem"] for p in problems), problems
    assert any(words in p["problem"] for p in problems), problems


@pytest.mark.parametrize(
    "name", ["MODEL_CARD.md", "pytorch_model.bin", "sub/notes.txt", "sub/x.safetensors", "a.gguf/x"]
)
@pytest.mark.parametrize("given", ["", "model.safetensors"])
def test_what_the_user_added_is_not_compared(
    tmp_path: Path, run: Runner, llama: Path, name: str, given: str
) -> None:
    output = tmp_path / "out"
    convert(llama, output, Scheme())
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    done = run("verify", output / given, "--against", llama, "--json")
    listed = name.replace("a.gguf/x", "a.gguf/")
    assert (done.code, json.loads(done.out)["not_compared"]) == (0, [listed])
    done = run("verify", output / given, "--against", llama)
    assert f"1 file that the source does not have, such as {listed}" in done.out


@pytest.mark.parametrize("given", ["", "model.safetensors"])
def test_side_files_below_directories_are_those_of_one_file_too(
    tmp_path: Path, llama: Path, given: str
) -> None:
    (llama / "sub").mkdir()
    (llama / "sub" / "text").write_text("text")
    convert(llama, tmp_path / "out", Scheme())
    assert verify(llama, tmp_path / "out" / given)[0] == []
    (tmp_path / "out" / "sub" / "text").write_text("test")
    (problem,), _ = verify(llama, tmp_path / "out" / given)
    assert problem == Problem("sub/text", "", "differs from the source's at byte 2")
    (tmp_path / "out" / "sub" / "text").unlink()
    (problem,), _ = verify(llama, tmp_path / "out" / given)
    assert problem == Problem("sub/text", "", "missing: the source has it")


@contextmanager
def at_once() -> Iterator[None]:
    """Fails what takes longer than a few seconds, as waiting for the writer of a FIFO does."""

    def fail(number: int, frame: object) -> None:
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sparse(path: Path) -> None:
    os.truncate(path, 3 << 30)


def one_long_line(path: Path) -> None:
    path.write_text(path.read_text().rstrip().removesuffix("}") + ',"x":"' + "y" * 10**6 + '"}')


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "tokenizer.json"])
@pytest.mark.parametrize("change", [sparse, one_long_line])
def test_files_of_any_size_are_told_of_in_a_line(
    tmp_path: Path, llama: Path, name: str, change: Callable[[Path], None]
) -> None:
    """And no more of them is held than what must be there."""
    output = tmp_path / "out"
    convert(llama, output, Scheme(), max_shard_size=250_000)
    change(output / name)
    before = MemoryUsage.now().anonymous
    with PeakMeter(interval=0.001) as meter:
        problems = prepare(open_checkpoint(llama), str(output), None, 8 * MIB, 1).problems
    assert {problem.file for problem in problems} == {name}
    assert all(len(problem.problem) < 1000 for problem in problems)
    assert meter.peak.anonymous - before < 32 * MIB


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, "tokenizer.json"])
@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
def test_what_stands_in_place_of_a_file_is_not_waited_for(
    tmp_path: Path, run: Runner, llama: Path, make: Callable[[Path], None], name: str
) -> None:
    output = tmp_path / "out"
    convert(llama, output, Scheme(), max_shard_size=250_000)
    (output / name).unlink()
    make(output / name)
    with at_once():
        done = run("verify", output, "--against", llama, "--json")
    assert done.code == 1, done
    assert {problem["file"] for problem in json.loads(done.out)["problems"]} == {name}


@schemes
def test_no_flipped_bit_goes_unseen(tmp_path: Path, llama: Path, scheme: Scheme) -> None:
    output = tmp_path / "out"
    convert(llama, output, scheme, max_shard_size=250_000)
    chosen = random.Random(scheme.granularity.value + scheme.format.value)
    places: dict[str, list[tuple[Path, int, int, str]]] = {}
    for shard in open_checkpoint(output).shards:
        path = output / shard.name
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        text = len(path.read_bytes()[8:length].rstrip())
        places.setdefault("length", []).append((path, 0, 8, ""))
        places.setdefault("metadata", []).append((path, 8, 80, ""))
        places.setdefault("header", []).append((path, 8, text, ""))
        places.setdefault("blanks", []).append((path, 8 + text, length - 8 - text, ""))
        for spec in shard.tensors:
            place = path, spec.offset, spec.nbytes, spec.name
            kind = "scales" if "scale" in spec.name else "codes"
            places.setdefault(kind if "_proj" in spec.name else "kept", []).append(place)
    for name in ("config.json", INDEX_NAME, "README.md"):
        places[name] = [(output / name, 0, (output / name).stat().st_size, "")]
    for kind in [kind for kind in places for _ in range(2)]:
        path, begin, size, tensor = chosen.choice([p for p in places[kind] if p[2]])
        at, bit = begin + chosen.randrange(size), chosen.randrange(8)
        before = path.read_bytes()[at]
        patch(path, at, bytes([before ^ 1 << bit]))
        problems, _ = verify(llama, output)
        named = [p.tensor == tensor if tensor else p.file == path.name for p in problems]
        assert any(named), (kind, path.name, at, bit, problems)
        patch(path, at, bytes([before]))
    assert verify(llama, output)[0] == []


def of(place: Path, what: object) -> bool:
    """Whether an argument of a call of the system's is a path below `place`, or a file there."""
    if isinstance(what, int):
        what = os.readlink(f"/proc/self/fd/{what}")
    return isinstance(what, str | Path) and Path(what).is_relative_to(place)


@pytest.mark.parametrize("which", ["whole", "damaged"])
@pytest.mark.parametrize(
    "call", ["open", "stat", "lstat", "fstat", "listdir", "scandir", "preadv", "close"]
)
def test_whatever_call_fails_the_file_is_named(
    tmp_path: Path,
    run: Runner,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    which: str,
) -> None:
    """Each call of the system in turn, as a disk does that goes bad."""
    output = tmp_path / "out"
    (llama / "more").mkdir()
    (llama / "more" / "text").write_text("text")
    convert(llama, output, Scheme(), max_shard_size=250_000)
    if which == "damaged":
        (output / INDEX_NAME).write_text("{")
    real, left = getattr(os, call), 0

    def fail(what: Any = ".", *arguments: Any, **named: Any) -> Any:
        nonlocal left
        there = of(tmp_path, what)
        result = real(what, *arguments, **named) if call == "close" or not there else None
        left -= there
        if there and left == 0:
            raise OSError(errno.EIO, "Input/output error", what if isinstance(what, str) else None)
        return result if call == "close" or not there else real(what, *arguments, **named)

    met = 0
    for number in range(1, 1000):
        left = number
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            done = run("verify", output, "--against", llama, "--threads", "1", "-q")
        if left > 0:
            break
        met += 1
        assert done.code in (0, 1), done
        assert "FP8STREAM_DEBUG" not in done.err, (number, done)
        assert "None" not in done.err + done.out, (number, done)
        assert len(done.err.splitlines()) == done.code, (number, done)
    assert left > 0
    assert met or call == "listdir"


@pytest.mark.parametrize("which", ["source", "output"])
def test_a_directory_that_is_gone_before_values_are_compared(
    tmp_path: Path, llama: Path, which: str
) -> None:
    output = tmp_path / "out"
    convert(llama, output, Scheme())
    comparison = prepare(open_checkpoint(llama), str(output), None, 8 * MIB, 1)
    gone = llama if which == "source" else output
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{gone}: cannot be read: No such file"):
        list(compare_values(comparison))


# What is printed.


def test_the_document_has_what_was_promised(tmp_path: Path, run: Runner, llama: Path) -> None:
    convert(llama, tmp_path / "out", Scheme())
    done = run("verify", tmp_path / "out", "--against", llama, "--json")
    document = json.loads(done.out)
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 1)
    assert document.keys() == {
        *("schema", "ok", "compared", "tensors", "bytes_read", "seconds", "peak_memory"),
        *("problems", "layers", "not_compared"),
    }
    assert (document["schema"], document["ok"], document["compared"]) == (1, True, "exact")
    assert document["tensors"] == len(open_checkpoint(tmp_path / "out").tensors)
    (layer, *_) = document["layers"]
    assert layer.keys() == {
        *("name", "relative_error", "max_error", "zeros", "saturated", "rows_scale_one"),
    }
    assert document["peak_memory"].keys() == {
        *("host_anonymous_bytes", "host_resident_bytes", "baseline_anonymous_bytes"),
        *("device_allocated_bytes", "device_reserved_bytes"),
    }


def test_the_table_shows_the_worst_and_every_problem(
    tmp_path: Path, run: Runner, llama: Path
) -> None:
    tensors = load_all(llama)
    convert(llama, tmp_path / "out", Scheme())
    done = run("verify", tmp_path / "out", "--against", llama)
    assert done.code == 0
    assert "compared     to the bit" in done.out
    assert "problems     none" in done.out
    assert done.out.count("_proj.weight") == 10
    assert "relative error        layers" in done.out
    assert tensors
    (tmp_path / "out" / "tokenizer.json").unlink()
    done = run("verify", tmp_path / "out", "--against", llama)
    assert done.code == 1
    assert "tokenizer.json: missing: the source has it" in done.out
    out = tmp_path / "out"
    assert done.err == f"fp8stream: {out}: 1 problem in tokenizer.json: not what {llama} makes\n"


def load_all(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_an_output_without_a_weight_in_fp8_is_a_problem(
    tmp_path: Path, run: Runner, llama: Path
) -> None:
    shutil.copytree(llama, tmp_path / "out")
    done = run("verify", tmp_path / "out", "--against", llama, "--json")
    (problem,) = json.loads(done.out)["problems"]
    assert done.code == 1
    assert problem["problem"] == "not quantized: there are no FP8 weights with scales in it"
    assert "1 problem in" in done.err


@pytest.mark.parametrize("which", ["output", "source", "both"])
def test_what_is_not_there_is_an_error_like_others(
    tmp_path: Path, run: Runner, llama: Path, which: str
) -> None:
    convert(llama, tmp_path / "out", Scheme())
    output = tmp_path / ("out" if which == "source" else "absent")
    source = llama if which == "output" else tmp_path / "absent"
    done = run("verify", output, "--against", source, "--json")
    assert (done.code, done.out) == (1, "")
    assert "no such file or directory" in done.err


def test_a_source_that_is_quantized_is_refused(tmp_path: Path, run: Runner, llama: Path) -> None:
    convert(llama, tmp_path / "out", Scheme())
    done = run("verify", llama, "--against", tmp_path / "out")
    assert done.code == 1
    assert "already quantized" in done.err


@pytest.fixture
def unfinished(tmp_path: Path, llama: Path) -> Path:
    """Where a run has done all but to put its output in place."""
    partial = tmp_path / "out.fp8stream-partial"
    partial.mkdir()
    convert(llama, partial / "output", Scheme())
    (partial / "journal").write_bytes(first_line({}))
    return partial


@pytest.mark.parametrize(
    ("directory", "path"),
    [
        (".", "out.fp8stream-partial"),
        (".", "out.fp8stream-partial/output"),
        (".", "out.fp8stream-partial/output/model.safetensors"),
        (".", "link"),
        ("out.fp8stream-partial", "."),
        ("out.fp8stream-partial", "output"),
        ("out.fp8stream-partial/output", "."),
        ("out.fp8stream-partial/output", ".."),
    ],
)
def test_an_unfinished_output_is_refused(
    unfinished: Path,
    run: Runner,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    directory: str,
    path: str,
) -> None:
    (unfinished.parent / "link").symlink_to(unfinished / "output")
    monkeypatch.chdir(unfinished.parent / directory)
    done = run("verify", path, "--against", llama)
    assert done.code == 1
    assert "an unfinished run's" in done.err


@pytest.mark.parametrize(
    "path", ["fine.fp8stream-partial", "x.fp8stream-partial/output", "journals/output"]
)
def test_an_output_of_any_name_is_not_unfinished(
    tmp_path: Path, run: Runner, llama: Path, path: str
) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / "journals").mkdir(exist_ok=True)
    (tmp_path / "journals" / "journal").write_text("Monday: a walk.")
    convert(llama, tmp_path / path, Scheme())
    assert run("verify", tmp_path / path, "--against", llama).code == 0


def test_peak_memory_stays_within_the_plan(tmp_path: Path) -> None:
    tensors = llama_tensors(hidden=1024, inter=8192, layers=2)
    source = write_checkpoint(tmp_path / "in", tensors)
    convert(source, tmp_path / "out", Scheme())
    verify(source, tmp_path / "out", budget=8 * MIB)  # what is loaded once is not the run's
    gc.collect()
    comparison = prepare(open_checkpoint(source), str(tmp_path / "out"), None, 8 * MIB, 2)
    with PeakMeter(interval=0.001) as meter:
        list(compare_values(comparison))
    grown = meter.peak.anonymous - meter.baseline.anonymous
    assert comparison.workspace.total_bytes <= 8 * MIB
    assert grown <= comparison.workspace.total_bytes + 3 * MIB
