"""Tensor parallelism: what ranks hold is the whole model's, and together they compute what it does.

Ranks are simulated in one process, as loading takes no communication; one test runs two of them.
"""

import json
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8stream.errors import CheckpointError, SchemeError
from fp8stream.fused_experts import FP8Experts
from fp8stream.linear import FP8Linear
from fp8stream.live import Share
from fp8stream.mapping import model_tensors
from fp8stream.online import load_into, reload
from fp8stream.places import Place, strides
from fp8stream.saving import save
from tests import tiny, tp_rank
from tests.conftest import Run
from tests.oracle import same

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore")]

SCHEMES = ["channel", "block", "tensor"]
schemes = pytest.mark.parametrize("scheme", SCHEMES)
sizes = pytest.mark.parametrize("size", [2, 4])
TINY: Mapping[str, Any] = {
    **tiny.TINY,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
EXPERTS: Mapping[str, Any] = {**TINY, "num_experts_per_tok": 2}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": TINY,
    "llama-tied": {**TINY, "tie_word_embeddings": True},
    "llama-grouped": {**TINY, "num_key_value_heads": 4, "num_hidden_layers": 2},
    "qwen2": TINY,
    "phi3": TINY,
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 512},
    "many": {
        **EXPERTS,
        "hidden_size": 128,
        "num_experts": 24,
        "moe_intermediate_size": 128,
    },
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "layer_types": ["full_attention"]},
    "llama4_text": {
        **EXPERTS,
        "intermediate_size_mlp": 512,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
}
BY_EXPERTS = {"*.mlp.experts": "experts", "lm_head": "colwise_gather_output"}
WITHIN_EXPERTS = {"*.mlp.experts": "moe_tp_experts", "*.embed_tokens": "embedding_rowwise"}
Plan = Mapping[str, str] | None
# What is loaded by which plan; None is the model's own.
CASES: Sequence[tuple[str, Plan]] = [
    ("llama", None),
    ("llama-tied", None),
    ("qwen2", None),
    ("phi3", None),
    ("qwen3_moe", None),
    ("qwen3_moe", BY_EXPERTS),
    ("mixtral", None),
    ("gpt_oss", None),
    ("gpt_oss", WITHIN_EXPERTS),
    ("llama4_text", None),
]
cases = pytest.mark.parametrize(("name", "plan"), CASES)
Sources = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Makes the checkpoint of a name in CONFIGS, once for each seed."""
    root = tmp_path_factory.mktemp("models")

    def made(name: str, seed: int = 0) -> Path:
        directory = root / f"{name}-{seed}"
        if not directory.exists():
            torch.manual_seed(seed)
            kind = name.removesuffix("-tied").removesuffix("-grouped")
            kind = kind.replace("many", "qwen3_moe")
            config = transformers.AutoConfig.for_model(kind, **CONFIGS[name])
            model = transformers.AutoModelForCausalLM.from_config(config)
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    nn.init.normal_(parameter)
            model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="1MB")
        return directory

    return made


def skeleton(directory: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def loaded(directory: Path, rank: int = 0, size: int = 1, plan: Plan = None, **more: Any) -> Any:
    model = skeleton(directory)
    load_into(model, directory, device="cpu", tp_rank=rank, tp_size=size, tp_plan=plan, **more)
    return model


def ranks_of(directory: Path, size: int, plan: Plan = None, **more: Any) -> list[Any]:
    return [loaded(directory, rank, size, plan, **more) for rank in range(size)]


def together(name: str, parts: Sequence[Tensor], shape: Sequence[int], halves: bool) -> Tensor:
    """The parts of all ranks put together, by shapes alone; gate and up in halves one by one."""
    sides = [axis for axis, side in enumerate(shape) if parts[0].shape[axis] != side]
    if not sides:
        assert all(same(one, other) for one, other in pairwise(parts)), name
        return parts[0]
    (axis,) = sides
    if not halves:
        return torch.cat([*parts], axis)
    gate, up = zip(*(part.chunk(2, axis) for part in parts), strict=True)
    return torch.cat([*gate, *up], axis)


def put_together(ranks: Sequence[Any], whole: Any) -> set[str]:
    """The tensors that ranks have parts of, which are the whole model's to the bit."""
    cut = set()
    held = [model_tensors(model) for model in ranks]
    # Their rows alternate there.
    halves = type(whole).__name__ != "GptOssForCausalLM"
    for name, tensor in model_tensors(whole).items():
        parts = [one[name] for one in held]
        packed = halves and "experts.gate_up_proj" in name and len(parts[0]) == len(tensor)
        whole_again = together(name, [*map(bits, parts)], tensor.shape, packed)
        assert torch.equal(whole_again, bits(tensor)), name
        if parts[0].shape != tensor.shape:
            cut.add(name)
    return cut


def bits(tensor: Tensor) -> Tensor:
    """Values as integers of their size."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def size_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


# What ranks hold


@cases
@schemes
@sizes
def test_parts_put_together_are_the_whole(
    source: Sources, name: str, plan: Plan, scheme: str, size: int
) -> None:
    directory = source(name)
    whole = loaded(directory, scheme=scheme)
    ranks = ranks_of(directory, size, plan, scheme=scheme)
    cut = put_together(ranks, whole)
    assert any("weight" in key or "proj" in key for key in cut)
    if plan is None and name != "gpt_oss":
        for model in ranks:
            assert size_of(model) <= size_of(whole) / size * 1.02
    kinds = [{n: type(m) for n, m in model.named_modules()} for model in (ranks[0], whole)]
    assert kinds[0] == kinds[1]


@schemes
def test_case_21(source: Sources, scheme: str) -> None:
    """In vLLM a rank's scale was once the amax of its part alone, so that a model had other weights
    on two GPUs than on one; now ranks ask each other for the amax, and here each reads it itself,
    as the rows and the fused set of a scale are in the file, whoever holds which part."""
    directory = source("llama")
    tensors = {n: t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}
    attention = "model.layers.0.self_attn"
    # The largest of a fused set, of a row and of no block but one: in the second rank's part.
    tensors[f"{attention}.v_proj.weight"][-1, -1] = 4.0
    tensors[f"{attention}.o_proj.weight"][:, -1] = 4.0
    whole = skeleton(directory)
    load_into(whole, tensors, scheme=scheme, device="cpu")
    ranks = []
    for rank in range(2):
        model = skeleton(directory)
        load_into(model, tensors, scheme=scheme, device="cpu", tp_rank=rank, tp_size=2)
        ranks.append(model)
    put_together(ranks, whole)
    first = ranks[0].get_submodule(attention)
    if scheme == "tensor":
        assert float(first.q_proj.weight_scale.detach()) == float(torch.tensor(4.0) / 448)
    if scheme != "block":
        assert (first.o_proj.weight_scale == torch.tensor(4.0) / 448).all()


@pytest.mark.parametrize("plan", [None, BY_EXPERTS])
def test_what_stays_in_16_bit_is_cut_alike(source: Sources, plan: Plan) -> None:
    directory = source("qwen3_moe")
    whole = loaded(directory, **tp_rank.KEEP)
    assert not any(isinstance(module, FP8Linear | FP8Experts) for module in whole.modules())
    cut = put_together(ranks_of(directory, 2, plan, **tp_rank.KEEP), whole)
    assert "model.layers.0.mlp.experts.gate_up_proj" in cut


@schemes
def test_a_source_in_fp8_is_cut_as_it_is(
    source: Sources, scheme: str, run: Callable[..., Run], tmp_path: Path
) -> None:
    done = run("quantize", source("llama"), tmp_path / "fp8", "--scheme", scheme)
    assert done.code == 0
    whole = loaded(source("llama"), scheme=scheme)
    ranks = []
    for rank in range(2):
        model = skeleton(source("llama"))
        load_into(model, tmp_path / "fp8", device="cpu", tp_rank=rank, tp_size=2)
        ranks.append(model)
    assert put_together(ranks, whole)


@pytest.mark.parametrize("plan", [None, BY_EXPERTS])
@schemes
def test_tensors_in_any_order(source: Sources, plan: Plan, scheme: str) -> None:
    directory = source("qwen3_moe")
    files = sorted(directory.glob("*.safetensors"))
    items = [item for file in files for item in load_file(file).items()]
    random.Random(1).shuffle(items)
    model = skeleton(directory)
    at: dict[str, Any] = {"tp_rank": 1, "tp_size": 2, "tp_plan": plan}
    result = load_into(model, iter(items), scheme=scheme, device="cpu", **at)
    assert not result.missing
    wanted = model_tensors(loaded(directory, 1, 2, plan, scheme=scheme))
    for name, tensor in model_tensors(model).items():
        assert same(tensor, wanted[name]), name


def test_what_other_ranks_hold_is_not_read(source: Sources) -> None:
    """All of a column-parallel weight's other rows, of an embedding's, and other experts."""

    def read(name: str, scheme: str, plan: Plan, size: int) -> int:
        at: dict[str, Any] = {"tp_size": size, "tp_plan": plan, "device": "cpu"}
        return load_into(skeleton(source(name)), source(name), scheme=scheme, **at).bytes_read

    def file_bytes(name: str, of: Sequence[str]) -> int:
        files = source(name).glob("*.safetensors")
        tensors = [item for file in files for item in load_file(file).items()]
        return sum(t.nbytes for n, t in tensors if any(each in n for each in of))

    columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed", "lm_head")
    for scheme in ("channel", "block"):
        saved = read("llama", scheme, None, 1) - read("llama", scheme, None, 4)
        assert saved == file_bytes("llama", columns) * 3 // 4
    for scheme in SCHEMES:
        plan = {"*.experts": "experts"}
        saved = read("qwen3_moe", scheme, None, 1) - read("qwen3_moe", scheme, plan, 4)
        assert saved >= file_bytes("qwen3_moe", ["experts"]) * 3 // 4


# Reload


@schemes
@pytest.mark.parametrize(("name", "plan"), [("llama-tied", None), *CASES[4:7], CASES[8]])
def test_reload_keeps_the_storage_of_a_rank(
    source: Sources, name: str, plan: Plan, scheme: str
) -> None:
    model = loaded(source(name), 1, 2, plan, scheme=scheme)
    pointers = {n: t.data_ptr() for n, t in model_tensors(model).items()}
    result = reload(model, source(name, 1))
    assert not result.missing
    assert pointers == {n: t.data_ptr() for n, t in model_tensors(model).items()}
    wanted = model_tensors(loaded(source(name, 1), 1, 2, plan, scheme=scheme))
    for key, tensor in model_tensors(model).items():
        assert same(tensor, wanted[key]), key


@pytest.mark.parametrize("size", [1, 2])
def test_experts_with_tensor_scales_are_reloaded_together(
    run: Callable[..., Run], source: Sources, tmp_path: Path, size: int
) -> None:
    """Each of very many has a scale of its own, but all lie in one tensor."""
    for seed in (0, 1):
        asked = ("--scheme", "tensor", "--format", "fp8")
        assert run("quantize", source("many", seed), tmp_path / str(seed), *asked).code == 0
    at: dict[str, Any] = {"device": "cpu", "tp_size": size}
    at |= {"tp_plan": {"*.experts": "experts"}} if size > 1 else {}
    model, fresh = skeleton(source("many")), skeleton(source("many"))
    load_into(model, tmp_path / "0", **at)
    reload(model, tmp_path / "1")
    load_into(fresh, tmp_path / "1", **at)
    wanted = model_tensors(fresh)
    assert [n for n, t in model_tensors(model).items() if not same(t, wanted[n])] == []


# Refusals


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        (
            "llama-grouped",
            {"tp_size": 4, "scheme": "block"},
            (
                r"0\.self_attn\.k_proj: 4 ranks cut its 256 outputs into parts of 64, no multiple "
                r"of 128 \(a block\), and 3 more: tp_size may be 1, 2, or take another scheme"
            ),
        ),
        (
            "llama-grouped",
            {"tp_size": 8},
            (
                r"self_attn\.k_proj: 8 ranks cut its 256 outputs into parts of 32, no multiple of "
                r"64 \(an attention head\), and 3 more: tp_size may be 1, 2, 4$"
            ),
        ),
        ("llama", {"tp_size": 3}, r"3 ranks cut its 320 rows into parts of 106\.667, and 11 more"),
        (
            "llama",
            {"tp_size": 3, "tp_plan": {"lm_head": "colwise_rep"}},
            (
                r"lm_head: 3 ranks cut its 320 outputs .*tp_size may be 1, 2, 4, 5, 8, 10, 16, 20, "
                r"32, 40, 64, or "
                r'leave it whole with tp_plan \{\.\.\., "lm_head": "replicated"\}'
            ),
        ),
        (
            "qwen3_moe",
            {"tp_size": 8, "tp_plan": {"*.experts": "experts"}},
            r"mlp\.experts: 8 ranks cut its 4 experts into parts of 0\.5: tp_size may be 1, 2, 4$",
        ),
        (
            "mixtral",
            {"tp_size": 8, "scheme": "block", "tp_plan": {"*.experts": "moe_tp_experts"}},
            "8 ranks cut its 512 of intermediate size into parts of 64, no multiple of 128",
        ),
        ("llama", {"tp_rank": 2, "tp_size": 2}, "tp_rank 2: expected one of 0 to 1"),
        ("llama", {"tp_rank": -1, "tp_size": 2}, "tp_rank -1"),
        (
            "llama",
            {"tp_size": 2, "tp_plan": {"*.q_proj": "diagonal"}},
            r"tp_plan: \*\.q_proj: 'diagonal' is no style; expected one of .*colwise",
        ),
        (
            "llama-tied",
            {"tp_size": 2, "tp_plan": {"lm_head": "colwise_rep"}},
            "are one tensor, but are cut differently",
        ),
        (
            "llama",
            {"tp_size": 2, "tp_plan": {"*.norm": "colwise"}},
            r"model\.norm: a rank cannot have outputs.* of LlamaRMSNorm in 16 bit; leave it whole",
        ),
        (
            "llama",
            {"tp_size": 2, "tp_plan": {"model.layer.*.q_proj": "colwise"}},
            "tp_plan: nothing of LlamaForCausalLM is cut by it: expected names such as model,",
        ),
        (
            "gpt_oss",
            {"tp_size": 2, "experts": "keep", "tp_plan": {"*.experts": "moe_tp_experts"}},
            "cannot have some of each expert's intermediate size of GptOssExperts in 16 bit",
        ),
    ],
)
def test_what_cannot_be_cut_is_told_before_anything_changes(
    source: Sources, name: str, more: Mapping[str, Any], words: str
) -> None:
    model = skeleton(source(name))
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(SchemeError, match=words):
        load_into(model, source(name), device="cpu", **more)
    assert before == {n: id(m) for n, m in model.named_modules()}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_without_a_plan_wants_one(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    tensors = {"0.weight": torch.ones(4, 8), "0.bias": torch.ones(4)}
    with pytest.raises(SchemeError, match="Sequential has no tp_plan of its own: give one"):
        load_into(model, tensors, device="cpu", tp_size=2)
    result = load_into(
        model, tensors, device="cpu", tp_rank=1, tp_size=2, tp_plan={"0": "colwise", "1": "rowwise"}
    )
    assert model[0].weight.shape == (2, 8)
    assert model[0].bias.shape == (2,)
    assert "tp_plan: 1 is nothing of the model" in result.warnings


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tp_size": 0}, "tp_size 0: expected 1 or more"),
        ({"tp_size": 2, "tp_plan": {}}, "tp_plan: nothing of Sequential is cut by it"),
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank 2: expected one of 0 to 1"),
        (
            {"tp_size": 2, "tp_plan": {"*.bias": "colwise"}},
            "tp_plan: 0.bias: cut alone, it does not fit the weight; name 0 instead",
        ),
    ],
)
def test_what_no_ranks_can_have_is_refused(more: dict[str, Any], words: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    tensors = {"0.weight": torch.ones(4, 8), "0.bias": torch.ones(4)}
    with pytest.raises(SchemeError, match=words):
        load_into(model, tensors, device="cpu", **{"tp_plan": {"0": "colwise"}, **more})
    assert model[0].weight.is_meta


def test_a_weight_and_its_bias_may_be_named_each() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4))
    tensors = {"0.weight": torch.ones(4, 8), "0.bias": torch.ones(4)}
    plan = {"0.weight": "colwise", "0.bias": "colwise"}
    load_into(model, tensors, device="cpu", tp_size=2, tp_plan=plan)
    assert (model[0].weight.shape, model[0].bias.shape) == ((2, 8), (2,))


def test_a_forward_alone_is_refused_and_so_is_a_save(source: Sources, tmp_path: Path) -> None:
    model = loaded(source("llama"), 0, 2)
    with pytest.raises(SchemeError, match=r"rank 0 of 2: .*expected 2 processes .*found 0"):
        model(torch.arange(4)[None])
    with pytest.raises(SchemeError, match="save: the model is spread over ranks"):
        save(model, tmp_path / "out")


def test_what_is_missing_is_told_on_ranks_too(source: Sources) -> None:
    files = sorted(source("llama").glob("*.safetensors"))
    tensors = dict(item for file in files for item in load_file(file).items())
    del tensors["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.mlp\.down_proj"):
        load_into(skeleton(source("llama")), tensors, device="cpu", tp_rank=1, tp_size=2)


# Geometry of a part


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_part_takes_what_is_its_own(data: st.DataObject) -> None:
    ranks, parts = data.draw(st.integers(2, 3)), data.draw(st.integers(1, 2))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = data.draw(st.integers(0, len(shape) - 1))
    shape[axis] *= ranks * parts
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    rank = data.draw(st.integers(0, ranks - 1))
    cut = [half.chunk(ranks, axis)[rank] for half in whole.chunk(parts, axis)]
    part, wanted = Share.cut(shape, axis, rank, ranks, parts), torch.cat(cut, axis)
    assert torch.equal(part.of_whole(whole), wanted)
    assert part.local == wanted.shape
    placed = torch.full(part.local, -1.0)
    place = Place("", "", tuple(shape), tuple(map(range, shape)), 0, strides(shape))
    for inside in part.inside(place):
        inside.apply(placed.view(part.held), whole)
    assert torch.equal(placed, wanted)
    taken, width = torch.full(part.local, -1.0), part.shape[-1]
    rows = data.draw(st.integers(1, 5)) * width
    for first in range(0, whole.numel(), rows):
        part.take(taken, first, whole.view(-1)[first : first + rows])
    assert torch.equal(taken, wanted)
    first, last = part.span()
    assert first <= wanted.min() <= wanted.max() < last
    assert first % width == last % width == 0
    first, last = sorted(data.draw(st.integers(0, whole.numel() - 1)) for _ in range(2))
    local, run = part.local_run(first, last), torch.arange(first, last + 1)
    at = wanted.view(-1).tolist().index(first) if first in wanted else wanted.numel()
    if local is None:
        assert not torch.equal(wanted.view(-1)[at : at + len(run)], run)
    else:
        assert torch.equal(wanted.view(-1)[local : local + len(run)], run)


def test_a_second_load_is_of_the_same_rank(source: Sources) -> None:
    model = loaded(source("qwen3_moe"), 1, 2)
    pointers = {n: t.data_ptr() for n, t in model_tensors(model).items()}
    with pytest.raises(SchemeError, match="rank 1 of 2 already, not 0 of 2; begin with a new"):
        load_into(model, source("qwen3_moe"), device="cpu", tp_rank=0, tp_size=2)
    with pytest.raises(SchemeError, match="rank 1 of 2 already, not 0 of 1"):
        load_into(model, source("qwen3_moe"), device="cpu")
    forwards = [vars(module).get("forward") for module in model.modules()]
    load_into(model, source("qwen3_moe", 1), device="cpu", tp_rank=1, tp_size=2)
    assert pointers == {n: t.data_ptr() for n, t in model_tensors(model).items()}
    assert forwards == [vars(module).get("forward") for module in model.modules()]
    wanted = model_tensors(loaded(source("qwen3_moe", 1), 1, 2))
    assert all(same(t, wanted[n]) for n, t in model_tensors(model).items())


# A real run

REAL: Sequence[tuple[str, str, str, Plan, float]] = [
    # The bounds are on the norm of the difference in logits to one process, over theirs. Sums in
    # another order differ in the last bit, and now and then that moves an activation to the next
    # code, or, in 16 bit, a token to another expert.
    *(("llama-grouped", scheme, "float32", None, 2e-2) for scheme in SCHEMES),
    ("llama-tied", "channel", "bfloat16", None, 2e-2),
    ("phi3", "channel", "float32", None, 2e-2),
    *(("qwen3_moe", scheme, "float32", None, 2e-2) for scheme in SCHEMES),
    ("qwen3_moe", "channel", "bfloat16", None, 5e-2),
    ("qwen3_moe", "channel", "bfloat16", BY_EXPERTS, 5e-2),
    ("gpt_oss", "block", "float32", None, 2e-2),
    ("gpt_oss", "channel", "float32", WITHIN_EXPERTS, 2e-2),
    ("llama4_text", "channel", "float32", None, 2e-2),
    ("qwen3_moe", "16 bit", "float32", None, 1e-5),
    ("qwen3_moe", "16 bit", "float32", BY_EXPERTS, 1e-5),
]


def test_two_processes_compute_what_one_does(source: Sources, tmp_path: Path) -> None:
    work = [[str(source(name)), scheme, dtype, plan] for name, scheme, dtype, plan, _ in REAL]
    (tmp_path / "cases").write_text(json.dumps(work))
    first, second = _run_two(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [tp_rank.run([*case[:3], None], 0, 1) for case in work]
    finally:
        torch.set_num_threads(threads)
    for (*what, bound), one, other, (logits, tokens) in zip(
        REAL, first, second, alone, strict=True
    ):
        assert torch.equal(one[0], other[0]), what
        apart = float((one[0] - logits).norm() / logits.norm())
        assert apart <= bound, (what, apart)
        if "float32" in what:
            assert torch.equal(one[1], tokens), what


def _run_two(directory: Path) -> list[list[tuple[Tensor, Tensor]]]:
    """What two processes save. Skips where gloo cannot start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.tp_rank", str(rank), "2", port),
                *(str(directory / "cases"), str(directory / f"rank{rank}")),
            ],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=240)[1] for process in started]
    for process, text in zip(started, ended, strict=True):
        if process.returncode and "init_process_group" in text:
            pytest.skip(f"gloo cannot start: {text.splitlines()[-1]}")
        assert not process.returncode, text
    return [torch.load(directory / f"rank{rank}") for rank in range(2)]
