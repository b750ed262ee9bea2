"""A seeded share of scripts/fuzz, and what it found once: by kind of input, in bounded time."""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzz_inputs import NUMBERS, Pairs, Raw, changed, spelled, tree
from fuzz_oracles import KINDS, Kind, Verdict, examine, headers, reference

from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.errors import CheckpointError, SchemeError
from fp8stream.header import TensorSpec, read_shard
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Names, Patterns
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from fp8stream.structure import group, in_order
from tests.conftest import LLAMA

SHARE = {"headers": 3000, "indexes": 400, "configs": 500, "names": 300, "journals": 1000}
# Generous: a machine may be busy. What these tests are for took minutes.
SECONDS = 5.0
SCHEMES = [
    Scheme(Granularity.CHANNEL),
    Scheme(Granularity.BLOCK),
    Scheme(Granularity.BLOCK, OutputFormat.FP8),
]


@pytest.mark.parametrize(("name", "count"), SHARE.items())
def test_hostile_inputs_are_read_as_the_reference_reads_them_or_refused(
    name: str, count: int, tmp_path: Path
) -> None:
    kind = KINDS[name](tmp_path)
    accepted = 0
    for number in range(count):
        data = kind.make(Random(f"suite/{name}/{number}"))
        result = examine(kind, data)
        assert not result.verdict.problem, f"{name} {number}: {result.verdict.problem}"
        assert result.seconds < SECONDS, f"{name} {number}"
        assert result.memory < 200_000_000, f"{name} {number}"
        accepted += result.accepted
    assert count // 20 < accepted < count, "inputs that are all good or all bad show nothing"


# The fuzzer itself: it must see what it looks for.


def fails(data: bytes) -> object:
    raise KeyError("unforeseen")


def talks(data: bytes) -> object:
    raise CheckpointError("x" * 5000)


def hoards(data: bytes) -> object:
    return bytearray(b"\1") * 100_000_000 and None


def refuses(data: bytes) -> object:
    raise CheckpointError("no")


def test_the_fuzzer_sees_a_crash_a_long_message_and_memory() -> None:
    def result(subject: Callable[[bytes], object]) -> Any:
        return examine(Kind(lambda random: b"", subject), b"")

    assert "crash: KeyError" in result(fails).verdict.problem
    assert "5000 characters" in result(talks).verdict.problem
    assert result(hoards).memory > 90_000_000
    assert result(refuses).verdict == Verdict()
    assert not result(refuses).accepted


def test_the_fuzzer_sees_a_file_that_is_read_otherwise(tmp_path: Path) -> None:
    kind = headers(tmp_path)
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    good = len(text).to_bytes(8, "little") + text + b"\7"
    shard = kind.subject(good)
    assert kind.judge(good, shard) == Verdict()
    assert "otherwise" in kind.judge(good.replace(b'"a"', b'"b"'), shard).problem
    assert "refuses" in kind.judge(good + b"x", shard).problem
    assert kind.judge(good, CheckpointError("why")).alone == "why"


def test_inputs_follow_from_the_seed_and_are_many(tmp_path: Path) -> None:
    for name, make_kind in KINDS.items():
        (tmp_path / name).mkdir()
        kind = make_kind(tmp_path / name)
        inputs = [kind.make(Random(f"{number}")) for number in range(100)]
        assert inputs == [kind.make(Random(f"{number}")) for number in range(100)]
        assert len(set(inputs)) > 60


def test_a_tree_is_spelled_as_json() -> None:
    value: dict[str, Any] = {
        "a": [1, True, None, {}, [], 1.5, "\0é\u2028\U0001f600"],
        "b": {"c": {"d": [[]]}},
    }
    for number in range(50):
        assert json.loads(spelled(Random(number), tree(value))) == value
    assert spelled(Random(2), Pairs([("a", 1), ("a", Raw(b"01"))])).count(b'"a"') == 2
    assert any(changed(Random(n), tree(value)) != tree(value) for n in range(9))
    assert 2**63 in NUMBERS


# What it found, and what it cannot reach.


def write(directory: Path, shapes: dict[str, list[int]], **keys: Any) -> Path:
    """A checkpoint of holes: tensors in BF16, and a config.json of a llama with `keys`."""
    (directory / "config.json").write_text(json.dumps({**LLAMA, "hidden_size": 64, **keys}))
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        offsets = [position, position + size]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
    return directory


def planned(checkpoint: Checkpoint, scheme: Scheme) -> Plan:
    resources = Resources(1 << 30, 2, 5 * 10**9)
    return plan_quantization(checkpoint, scheme, Patterns(), resources)


EMBEDDING = {"model.embed_tokens.weight": [96, 64]}
LAYER = "model.layers.0"
# Names that took the square of their number or length, or more.
NAMES = {
    "one name of 100,000 parts": {"a." * 100_000 + "weight": [64, 64]},
    "names of 2,000 parts": {f"a{n}." * 2000 + "weight": [64, 64] for n in range(50)},
    "a part of 300,000 letters": {f"{LAYER}.{'a' * 300_000}.weight": [128, 128]},
    "embeddings and stacks": {f"e{n}.embed.weight": [96, 64] for n in range(4000)}
    | {f"a{n}.0.w.weight": [64, 64] for n in range(4000)},
    "matrices of one size in a layer": {f"{LAYER}.x{n}.weight": [64, 64] for n in range(9000)},
    "shapes of one name": {f"layers.{n}.x.weight": [64, 64 + n] for n in range(5000)}
    | {f"layers.{n}.x.bias": [64 + n] for n in range(5000)},
    "kept ones between": {f"{LAYER}.x{n}.a.weight": [128, 64] for n in range(4000)}
    | {f"{LAYER}.x{n}.b.weight": [2, 64] for n in range(4000)},
    "heads": {f"h{n}.weight": [96, 64] for n in range(5000)}
    | {f"a{n}.weight": [64, 64] for n in range(5000)},
    "stacked experts in one layer": {f"{LAYER}.experts.x{n}": [2, 64, 64] for n in range(5000)},
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.granularity.value}-{s.format.value}")
@pytest.mark.parametrize("shapes", NAMES.values(), ids=NAMES)
def test_names_of_a_megabyte_are_planned_at_once(
    shapes: dict[str, list[int]], scheme: Scheme, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {**EMBEDDING, **shapes}, num_experts=64))
    start = time.process_time()
    plan = planned(checkpoint, scheme)
    assert time.process_time() - start < SECONDS
    assert len(plan.tensors) == 1 + len(shapes)


def test_a_pattern_reaches_names_of_very_many_parts() -> None:
    deep, plain = "a." * 100_000 + "weight", "a.b.weight"
    specs = [TensorSpec(name, "BF16", (1,), "f", 0, 2) for name in (deep, plain)]
    start = time.process_time()
    names = Names(group(in_order(specs)), tied=False)
    assert names.match(deep) == [deep]
    assert sorted(names.match("a")) == [deep, plain]
    assert names.match("a.a.a") == [deep]
    assert names.match("a.b") == names.match("re:a.b") == [plain]
    with pytest.raises(SchemeError, match="matches nothing"):
        names.match("a.a.w")
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize(
    "keys",
    [
        {f"c{n}": {"num_experts": n + 1} for n in range(30_000)},
        {f"num_experts_{n}": n for n in range(30_000)},
    ],
    ids=["configs inside", "keys"],
)
def test_a_config_of_very_many_parts_is_planned_at_once(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    layers = {f"{LAYER}.x{n}.weight": [64, 64] for n in range(300)}
    start = time.process_time()
    planned(open_checkpoint(write(tmp_path, {**EMBEDDING, **layers}, more=keys)), SCHEMES[1])
    assert time.process_time() - start < SECONDS


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("place", ['{"a":%s}', '{"quantization_config":{"quant_method":%s}}'])
@pytest.mark.parametrize("levels", [33, 200, 900, 960, 980, 990, 5000])
def test_a_config_that_is_nested_deep_is_refused(place: str, levels: int, tmp_path: Path) -> None:
    """It would be written with an indent of hundreds of blanks a line, or fail in doing so."""
    write(tmp_path, EMBEDDING)
    (tmp_path / "config.json").write_text(place % nested(levels))
    with pytest.raises(CheckpointError, match=r"config\.json: broken: nested too deep"):
        open_checkpoint(tmp_path)


def test_a_config_that_is_nested_as_no_model_has_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, EMBEDDING)
    (tmp_path / "config.json").write_text(f'{{"a":{nested(30)}}}')
    assert open_checkpoint(tmp_path).config["a"]


@pytest.mark.parametrize("levels", [120, 500, 900, 950, 970, 980, 985, 990, 995, 20_000])
def test_a_header_or_index_that_is_nested_deep_is_refused_in_words(
    levels: int, tmp_path: Path
) -> None:
    text = f'{{"a":{nested(levels)}}}'.encode()
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_shard(file)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map":{text.decode()}}}')
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "x" * 100_000}},
        {"quantization_config": {"quant_method": ["y"] * 100_000}},
        {"quantization_config": {"config_groups": {str(n): {"weights": {}} for n in range(9999)}}},
    ],
    ids=["a long method", "a list of methods", "very many groups"],
)
def test_what_a_config_says_is_not_repeated_at_its_length(
    config: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write(tmp_path, EMBEDDING, **config))
    assert len(checkpoint.quantized_as or "") < 300


def test_a_number_of_very_many_digits_is_refused_without_advice_for_programmers(
    tmp_path: Path,
) -> None:
    write(tmp_path, EMBEDDING)
    (tmp_path / "config.json").write_text('{"hidden_size":' + "9" * 5000 + "}")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "sys." not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_file_of_a_terabyte_of_holes_is_not_read(file: str, tmp_path: Path) -> None:
    write(tmp_path, EMBEDDING)
    with (tmp_path / file).open("wb") as stream:
        stream.truncate(1 << 40)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="too large"):
        open_checkpoint(tmp_path)
    assert time.process_time() - start < 1


def test_a_name_is_not_repeated_at_its_length(tmp_path: Path) -> None:
    name = "n" * 100_000
    write(tmp_path, {name: [1]})
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    for weight_map in (
        {name: "a.safetensors", "x": "b.safetensors"},
        {name + "m": "a.safetensors"},
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("shape", [[2**62, 1, 0], [2**63 - 1, 0], [0, 2**62], [2**40, 2**23, 0]])
def test_nothing_of_a_huge_shape_overflows_where_the_reference_does(
    shape: list[int], tmp_path: Path
) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps({"a": entry}).encode()
    content = len(text).to_bytes(8, "little") + text
    (tmp_path / "a.safetensors").write_bytes(content)
    assert reference(content) == [("a", "F32", shape, b"")]
    assert read_shard(tmp_path / "a.safetensors").tensors[0].shape == tuple(shape)


def test_a_million_tensors_are_read(tmp_path: Path) -> None:
    count = 1_000_000
    entries = (
        b'"layers.%d.w":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (n, n, n + 1)
        for n in range(count)
    )
    text = b"{" + b",".join(entries) + b"}"
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
    start = time.process_time()
    gc.disable()  # the command line all but does, too: a plan is no garbage
    try:
        assert len(read_shard(file).tensors) == count
    finally:
        gc.enable()
    assert time.process_time() - start < 20
    file.unlink()
