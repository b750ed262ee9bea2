"""Streamed equals everything at once, bit for bit, for every order, thread count and budget."""

import gc
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fp8stream import filling, stream
from fp8stream import plan as plan_module
from fp8stream import writer as writer_module
from fp8stream.checkpoint import open_checkpoint
from fp8stream.clock import Clock
from fp8stream.device import Lane, find_devices
from fp8stream.errors import CheckpointError, DeviceError, OutputError, WeightError
from fp8stream.experts import ExpertForm, ExpertLayout, ExpertOptions
from fp8stream.journal import first_line
from fp8stream.memory import MIB, PeakMeter, Workspace
from fp8stream.output import JOURNAL
from fp8stream.plan import LayerPlan, Plan, Resources, Task, plan_quantization, take_turns
from fp8stream.policy import Patterns
from fp8stream.reader import Reader, ShardReader
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from fp8stream.stream import Worker, stream_layers
from fp8stream.system import cached_pages, drop_cached, is_memory_backed
from fp8stream.writer import CheckpointWriter
from tests import oracle
from tests.conftest import Tensors, llama_tensors, open_writer, write_checkpoint

CPU = torch.device("cpu")
SCHEMES = [
    Scheme(Granularity.CHANNEL),
    Scheme(Granularity.BLOCK),
    Scheme(Granularity.TENSOR),
    Scheme(Granularity.BLOCK, OutputFormat.FP8),
    Scheme(Granularity.TENSOR, OutputFormat.FP8),
]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
schemes = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.granularity.value}-{s.format.value}"
)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer is all NaN before it is read into, so that an element not read shows."""
    read_into = ShardReader.read_into

    def poisoned(self: ShardReader, buffer: memoryview, offset: int, name: str) -> None:
        buffer[:] = b"\xff" * len(buffer)
        read_into(self, buffer, offset, name)

    monkeypatch.setattr(ShardReader, "read_into", poisoned)


def convert(
    source: Path,
    output: Path,
    scheme: Scheme,
    budget: int = 64 * MIB,
    threads: int = 2,
    max_shard_size: int = 5 * 10**9,
) -> Plan:
    checkpoint = open_checkpoint(source)
    resources = Resources(budget, threads, max_shard_size)
    plan = plan_quantization(checkpoint, scheme, Patterns(), resources)
    with open_writer(output, plan.files) as writer:
        writer.copy_side_files(checkpoint)
        list(stream_layers(checkpoint, plan, writer, [CPU]))
        writer.commit(plan.config)
    return plan


def load(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def expected(tensors: Tensors, plan: Plan) -> Tensors:
    """What quantizing `tensors` at once gives, in the granularities that `plan` chose."""
    result: Tensors = {}
    for name, granularity in chosen(plan).items():
        assert granularity is due(name, tensors, plan.scheme), name
        if granularity is None:
            result[name] = tensors[name]
            continue
        partners = [tensors[partner] for partner in fused_set(name, tensors) if partner != name]
        codes, scale = oracle.quantize([tensors[name], *partners], granularity)
        module = name.removesuffix(".weight")
        result |= {name: codes, f"{module}.{plan.scheme.scale_suffix}": scale}
    assert tensors.keys() == chosen(plan).keys()
    return result


def chosen(plan: Plan) -> Mapping[str, Granularity | None]:
    return {tensor.spec.name: tensor.granularity for tensor in plan.tensors}


def due(name: str, tensors: Tensors, scheme: Scheme) -> Granularity | None:
    """What the plan must choose: what was asked for, but where blocks do not fit."""
    if ".layers." not in name or tensors[name].ndim != 2 or ".gate.weight" in name:
        return None
    asked = scheme.expert_granularity if ".experts." in name else scheme.granularity
    shapes = [tensors[member].shape for member in fused_set(name, tensors)]
    if asked is not Granularity.BLOCK or not any(side % 128 for s in shapes for side in s):
        return asked
    if scheme.format is OutputFormat.FP8:
        return None
    # Rows may end inside a block where no other weight is stacked below them.
    whole = not any(s[1] % 128 for s in shapes) and not any(s[0] % 128 for s in shapes[:-1])
    return Granularity.BLOCK if whole else Granularity.CHANNEL


def fused_set(name: str, tensors: Tensors) -> list[str]:
    """The weights that engines stack, this one among them, in their order."""
    parent, leaf = name.removesuffix(".weight").rsplit(".", 1)
    leaves = next((members for members in FUSED if leaf in members), (leaf,))
    names = [f"{parent}.{member}.weight" for member in leaves]
    return [member for member in names if member in tensors]


def lone(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A layer that no other is stacked with: its rows may end inside a block."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    return {f"model.layers.0.mlp.dense_{rows}x{columns}.weight": weight.to(dtype)}


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert oracle.same(found[name], tensor), name


@schemes
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_streamed_equals_at_once_for_every_order_of_files(
    tmp_path: Path, scheme: Scheme, order: tuple[int, ...]
) -> None:
    tensors = llama_tensors(kv=128, inter=300, hidden=200) | lone(300, 256) | lone(384, 256)
    source = write_checkpoint(tmp_path / "in", tensors, shards=3, order=order)
    plan = convert(source, tmp_path / "out", scheme)
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


@schemes
@pytest.mark.parametrize("shards", [1, 3])
def test_streamed_equals_at_once_where_every_block_fits(
    tmp_path: Path, scheme: Scheme, shards: int
) -> None:
    tensors = llama_tensors(kv=128, inter=384, hidden=256)
    source = write_checkpoint(tmp_path / "in", tensors, shards=shards)
    plan = convert(source, tmp_path / "out", scheme)
    assert {found for found in chosen(plan).values() if found} == {scheme.granularity}
    assert plan.layers_quantized == 14
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


BLOCK, CHANNEL = Granularity.BLOCK, Granularity.CHANNEL


@pytest.mark.parametrize("format_", list(OutputFormat))
def test_one_checkpoint_may_have_blocks_and_what_stands_in_for_them(
    tmp_path: Path, format_: OutputFormat
) -> None:
    tensors = llama_tensors(hidden=512, inter=1400, kv=256) | lone(1400, 512) | lone(1408, 512)
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    plan = convert(source, tmp_path / "out", Scheme(BLOCK, format_), budget=2 * MIB)
    ct = format_ is OutputFormat.COMPRESSED_TENSORS
    instead = CHANNEL if ct else None
    found = {name.split(".")[-2]: granularity for name, granularity in chosen(plan).items()}
    assert {leaf: found[leaf] for leaf in found if "norm" not in leaf} == {
        "embed_tokens": None,
        "lm_head": None,
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), BLOCK),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), instead),
        "dense_1400x512": BLOCK if ct else None,
        "dense_1408x512": BLOCK,
    }
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_source_dtype(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    tensors = llama_tensors(dtype=dtype)
    source = write_checkpoint(tmp_path / "in", tensors)
    plan = convert(source, tmp_path / "out", scheme)
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


@pytest.mark.parametrize("granularity", list(Granularity))
def test_a_float32_source_gives_what_compressed_tensors_gives(
    tmp_path: Path, granularity: Granularity
) -> None:
    """It divides in the source's dtype, so float32 is where both must agree."""
    hidden, inter = (256, 640) if granularity is BLOCK else (300, 500)
    tensors = llama_tensors(hidden=hidden, inter=inter, dtype=torch.float32)
    tensors |= lone(1000, 256, torch.float32) | lone(1100, 512, torch.float32)
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    plan = convert(source, tmp_path / "out", Scheme(granularity), budget=2 * MIB)
    found = load(tmp_path / "out")
    compared = 0
    for name, chose in chosen(plan).items():
        if chose is None or (granularity is Granularity.TENSOR and name in plan.fused_with):
            continue
        assert chose is granularity
        codes, scale = oracle.compressed_tensors(tensors[name], granularity)
        assert oracle.same(found[name], codes), name
        assert oracle.same(found[f"{name}_scale"], scale), name
        compared += 1
    assert compared == (6 if granularity is Granularity.TENSOR else 16)


@schemes
def test_every_budget_thread_count_and_sharding_gives_the_same_files(
    tmp_path: Path, scheme: Scheme
) -> None:
    tensors = llama_tensors(hidden=512, inter=1400, kv=256, layers=3, vocab=2000)
    tensors |= lone(1400, 512) | lone(1408, 512)
    written = set()
    runs = itertools.product((1, 3, 17), (1, 2, 5), (3 * MIB // 2, 16 * MIB, 1024 * MIB))
    for number, (shards, threads, budget) in enumerate(runs):
        source = tmp_path / f"in-{shards}"
        if not source.exists():
            write_checkpoint(source, tensors, shards)
        output = tmp_path / f"out-{number}"
        plan = convert(source, output, scheme, budget, threads, max_shard_size=2 * 10**6)
        written.add(tuple((f.name, f.read_bytes()) for f in sorted(output.iterdir())))
    assert len(written) == 1
    assert_same(load(output), expected(tensors, plan))


@schemes
def test_experts_are_quantized_and_routers_kept(tmp_path: Path, scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()

    tensors = llama_tensors(layers=1)
    for expert in range(12):
        at = f"model.layers.0.block_sparse_moe.experts.{expert}"
        tensors |= {
            f"{at}.w1.weight": matrix(256, 128) * (expert + 1),
            f"{at}.w3.weight": matrix(256, 128),
            f"{at}.w2.weight": matrix(128, 256),
        }
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = matrix(12, 128)
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    plan = convert(source, tmp_path / "out", scheme)
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


# What blocks fit, half of the time.
sides = st.one_of(st.sampled_from([128, 256, 384]), st.integers(64, 400))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=sides,
    columns=sides,
    alone=st.integers(64, 400),
    scheme=st.sampled_from(SCHEMES),
    budget=st.integers(350_000, 2_000_000),
    threads=st.integers(1, 4),
)
def test_slabs_change_no_bit(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    alone: int,
    scheme: Scheme,
    budget: int,
    threads: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("slabs")
    tensors = llama_tensors(hidden=columns, inter=rows, layers=1, kv=columns)
    tensors |= lone(alone, columns) | lone(alone, 256)
    source = write_checkpoint(tmp_path / "in", tensors)
    plan = convert(source, tmp_path / "out", scheme, budget, threads)
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


def test_what_is_not_quantized_keeps_its_bytes(tmp_path: Path) -> None:
    tensors = llama_tensors(layers=1)
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "doubles": torch.randn(3, 3, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(128).bfloat16(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8),
    }
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    scheme = Scheme()
    plan = convert(source, tmp_path / "out", scheme)
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


def test_a_file_of_empty_tensors_alone_is_written(tmp_path: Path) -> None:
    tensors = llama_tensors(layers=1) | {"zz": torch.empty(0, 7)}
    source = write_checkpoint(tmp_path / "in", tensors)
    plan = convert(source, tmp_path / "out", Scheme(), max_shard_size=1)
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


def test_kept_tensors_are_copied_where_the_kernel_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.copy_file_range", refuse)
    tensors = llama_tensors(vocab=3000)
    source = write_checkpoint(tmp_path / "in", tensors)
    plan = convert(source, tmp_path / "out", Scheme())
    assert_same(load(tmp_path / "out"), expected(tensors, plan))


@schemes
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_and_infinity_are_refused_by_name_count_and_place(
    tmp_path: Path, scheme: Scheme, bad: float
) -> None:
    tensors = llama_tensors(hidden=512, inter=512)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][300, 7] = tensors[name][511, 511] = bad
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    with pytest.raises(WeightError) as caught:
        convert(source, tmp_path / "out", scheme, budget=MIB)
    assert name in str(caught.value)
    assert "2 of 262144" in str(caught.value)
    assert "[300, 7]" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("layout", list(ExpertLayout))
@pytest.mark.parametrize("place", [(2, 511, 300), (1, 0, 383), (0, 130, 0)])
def test_the_place_of_a_nan_is_told_in_the_tensors_own_sides(
    tmp_path: Path, layout: ExpertLayout, place: tuple[int, int, int]
) -> None:
    """Whatever matrix it belongs to, and however that lies in the tensor."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    down = (3, 192, 512) if layout.transposed else (3, 384, 256)
    tensors = llama_tensors(layers=1)
    tensors[name] = torch.zeros(3, 512, 384).bfloat16()
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(down).bfloat16()
    tensors[name][place] = float("nan")
    source = write_checkpoint(tmp_path / "in", tensors, config={"model_type": "unheard of"})
    checkpoint, options = open_checkpoint(source), ExpertOptions(ExpertForm.PER_EXPERT, layout)
    resources = Resources(MIB, 1, 10**9)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), resources, options)
    with (
        pytest.raises(WeightError, match="found 1 of") as caught,
        open_writer(tmp_path / "out", plan.files) as writer,
    ):
        list(stream_layers(checkpoint, plan, writer, [CPU]))
    assert repr(name) in str(caught.value)
    assert f"the first at {list(place)}" in str(caught.value)


def test_an_event_for_every_layer_adds_up_to_the_plan(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors(hidden=512, kv=512))
    checkpoint = open_checkpoint(source)
    for scheme in SCHEMES:
        plan = plan_quantization(checkpoint, scheme, Patterns(), Resources(MIB, 2, 10**9))
        with open_writer(tmp_path / "out", plan.files) as writer:
            events = list(stream_layers(checkpoint, plan, writer, [CPU]))
        assert {event.name for event in events} == {layer.name for layer in plan.layers}
        assert sum(event.bytes_read for event in events) == plan.bytes_read
        tensors = sum(t.nbytes for file in plan.files for t in file.tensors)
        assert sum(event.bytes_written for event in events) == tensors


def test_closing_early_stops_the_workers_and_gives_no_output(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors(hidden=1024, inter=4096, layers=4))
    checkpoint = open_checkpoint(source)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), Resources(64 * MIB, 2, 10**9))
    with open_writer(tmp_path / "out", plan.files) as writer:
        events = stream_layers(checkpoint, plan, writer, [CPU])
        next(events)
        assert isinstance(events, Iterator)
        events.close()
        workers = {f"fp8stream-{number}" for number in range(plan.workspace.workers)}
        assert not [t for t in threading.enumerate() if t.name in workers]
        with pytest.raises(OutputError, match="missing"):
            writer.commit(plan.config)
    assert not (tmp_path / "out").exists()


def test_buffers_are_freed_at_the_end(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[weakref.ref[Worker]] = []
    init = Worker.__init__

    def remember(self: Worker, *arguments: Any) -> None:
        workers.append(weakref.ref(self))
        init(self, *arguments)

    monkeypatch.setattr(Worker, "__init__", remember)
    convert(llama, tmp_path / "out", Scheme())
    gc.collect()
    assert len(workers) == 2
    assert all(worker() is None for worker in workers)


def test_peak_memory_stays_within_the_plan(tmp_path: Path) -> None:
    tensors = llama_tensors(hidden=1024, inter=8192, layers=2)  # 16 MiB a matrix
    source = write_checkpoint(tmp_path / "in", tensors)
    convert(source, tmp_path / "first", Scheme())  # what is loaded once is not the run's
    gc.collect()
    with PeakMeter(interval=0.001) as meter:
        plan = convert(source, tmp_path / "out", Scheme(), budget=8 * MIB)
    space = plan.workspace
    assert space.total_bytes <= 8 * MIB
    poison = space.workers * space.slab_bytes  # as large as what it is written over
    grown = meter.peak.anonymous - meter.baseline.anonymous
    assert grown <= space.total_bytes + poison + 4 * MIB


def test_a_source_that_changes_under_the_run_is_refused(tmp_path: Path, llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), Resources(64 * MIB, 1, 10**9))
    shard = llama / checkpoint.shards[1].name
    shard.write_bytes(shard.read_bytes()[:-1])
    with (
        pytest.raises(CheckpointError, match="changed since its header was read"),
        open_writer(tmp_path / "out", plan.files) as writer,
    ):
        list(stream_layers(checkpoint, plan, writer, [CPU]))
    assert not list(tmp_path.glob("out*"))


def test_a_source_that_changes_during_its_last_read_is_refused(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into = ShardReader.read_into

    def touch(self: ShardReader, buffer: memoryview, offset: int, name: str) -> None:
        read_into(self, buffer, offset, name)
        if name == "model.layers.1.self_attn.v_proj.weight":
            with self.path.open("r+b") as shard:
                shard.seek(-1, 2)
                shard.write(b"!")

    monkeypatch.setattr(ShardReader, "read_into", touch)
    with pytest.raises(CheckpointError, match="changed since its header was read"):
        convert(llama, tmp_path / "out", Scheme())
    assert not list(tmp_path.glob("out*"))


def test_bytes_written_twice_are_refused(tmp_path: Path, llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), Resources(64 * MIB, 1, 10**9))
    name = plan.files[0].tensors[0].name
    with open_writer(tmp_path / "out", plan.files) as writer:
        writer.write(name, 0, memoryview(b"1234"))
        with pytest.raises(OutputError, match="came before"):
            writer.write(name, 2, memoryview(b"1234"))


def test_a_file_has_no_header_before_it_is_whole(tmp_path: Path, llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), Resources(64 * MIB, 1, 10**9))
    file = plan.files[0]
    with open_writer(tmp_path / "out", plan.files) as writer:
        for tensor in file.tensors[:-1]:
            writer.write(tensor.name, 0, memoryview(bytes(tensor.nbytes)))
        path = tmp_path / "out.fp8stream-partial" / "output" / file.name
        assert path.stat().st_size == file.size
        assert path.read_bytes()[: len(file.header)] == bytes(len(file.header))
        writer.write(file.tensors[-1].name, 0, memoryview(bytes(file.tensors[-1].nbytes)))
        assert path.read_bytes()[: len(file.header)] == file.header


def test_a_second_run_to_the_same_output_is_refused_while_the_first_lives(
    tmp_path: Path, llama: Path
) -> None:
    with open_writer(tmp_path / "out", []):
        with (
            pytest.raises(OutputError, match="another run"),
            open_writer(tmp_path / "out", []),
        ):
            pass
        assert (tmp_path / "out.fp8stream-partial").exists()


def test_what_a_dead_run_left_is_taken_over(tmp_path: Path, llama: Path) -> None:
    left = tmp_path / "out.fp8stream-partial"
    (left / "subdirectory").mkdir(parents=True)
    (left / "subdirectory" / "file").write_text("left")
    (left / JOURNAL).write_bytes(first_line({}))
    convert(llama, tmp_path / "out", Scheme())
    assert not left.exists()
    assert not (tmp_path / "out" / "subdirectory").exists()


def test_a_finished_output_that_cannot_be_put_in_place_is_kept(tmp_path: Path, llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), Resources(64 * MIB, 1, 10**9))
    with open_writer(tmp_path / "out", plan.files) as writer:
        list(stream_layers(checkpoint, plan, writer, [CPU]))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "somebody else's").write_text("")
        with pytest.raises(OutputError, match="move it where you want it"):
            writer.commit(plan.config)
    assert (tmp_path / "out.fp8stream-partial" / "output" / "config.json").exists()


class LateEvent:
    """A point in a `LateStream`."""

    def __init__(self, stream: "LateStream", position: int) -> None:
        self.stream, self.position = stream, position

    def synchronize(self) -> None:
        self.stream.run_until(self.position)


class LateStream:
    """A stream that does nothing before somebody waits for it, the worst that a device may do: what
    is read or overwritten too early shows as wrong bytes."""

    def __init__(self) -> None:
        self._queued: list[Callable[[], object]] = []
        self._done = 0
        self.ran = 0

    def run(self, work: Callable[[], object]) -> None:
        self._queued.append(work)
        self.ran += 1

    def record(self) -> LateEvent:
        return LateEvent(self, len(self._queued))

    def wait(self, event: Any) -> None:
        self._queued.append(event.synchronize)

    def run_until(self, position: int) -> None:
        while self._done < position:
            self._done += 1
            self._queued[self._done - 1]()


@schemes
@pytest.mark.parametrize("workers", [1, 3])
def test_a_device_that_does_everything_at_the_last_moment_gives_the_same_bytes(
    tmp_path: Path, scheme: Scheme, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that data takes on a GPU, with host memory standing in for the device's."""
    tensors = llama_tensors(hidden=512, inter=1400, kv=256) | lone(1400, 512) | lone(1408, 512)
    tensors |= lone(128, 256) | lone(130, 256) | lone(256, 256)
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    checkpoint = open_checkpoint(source)
    resources = Resources(1024 * MIB, workers, 10**9, gpus=1)
    plan = plan_quantization(checkpoint, scheme, Patterns(), resources)
    space = Workspace(workers, MIB, MIB // 2, 128 * 1400, slots=2, gpus=1)
    plan = replace(plan, workspace=space)
    lanes: list[list[LateStream]] = []

    def late_lane(workspace: Workspace, device: torch.device) -> Lane:
        lanes.append([LateStream() for _ in range(3)])
        lane = Lane(workspace, device, lanes[-1])
        for slot in lane.slots:
            slot.source_bytes[:] = b"\xff" * len(slot.source_bytes)
            slot.codes_bytes[:] = b"\xff" * len(slot.codes_bytes)
        return lane

    monkeypatch.setattr(stream, "open_lane", late_lane)
    with open_writer(tmp_path / "out", plan.files) as writer:
        list(stream_layers(checkpoint, plan, writer, [CPU]))
        writer.commit(plan.config)
    assert_same(load(tmp_path / "out"), expected(tensors, plan))
    assert len(lanes) == workers
    for number in range(3):
        assert sum(lane[number].ran for lane in lanes) > 5


def test_small_layers_are_launched_together(tmp_path: Path) -> None:
    """As many rows as a slab takes, of as many layers as a task has: Qwen3-30B-A3B has 18,867."""
    tensors = {
        f"model.layers.{layer}.mlp.{leaf}.weight": torch.full((64, 64), layer / 50)
        for layer in range(50)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    } | {"model.embed_tokens.weight": torch.zeros(8, 64)}
    source = write_checkpoint(tmp_path / "in", tensors, shards=1)
    resources = Resources(64 * MIB, 2, 10**9)
    plan = plan_quantization(open_checkpoint(source), Scheme(), Patterns(), resources)
    row = 64 * 4
    batches = [batch for task in plan.tasks() for batch in task.batches(10 * 64 * row)]
    assert sum(len(batch.slabs) for batch in batches) == 150
    assert len(batches) < 25
    assert max(batch.rows for batch in batches) == 640
    assert all(batch.nbytes == batch.rows * row <= 640 * row for batch in batches)


@schemes
def test_tasks_hold_every_layer_once_and_few_files_are_open(
    tmp_path: Path, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is large, a file is begun only when an earlier one is done."""
    monkeypatch.setattr(plan_module, "_LARGE", 10**5)
    monkeypatch.setattr(plan_module, "_LAYERS_A_TASK", 1)
    tensors = llama_tensors(hidden=256, inter=512, kv=256, layers=12) | lone(1400, 512)
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    resources = Resources(64 * MIB, 1, 4 * 10**5)
    plan = plan_quantization(open_checkpoint(source), scheme, Patterns(), resources)
    layers = [layer for task in plan.tasks() for layer in task.layers]
    assert sorted(layer.name for layer in layers) == sorted(layer.name for layer in plan.layers)
    assert all(len(task.layers) == 1 for task in plan.tasks() if task.shares_scale)
    opened: list[int] = []
    claim = CheckpointWriter._claim

    def count_open(self: CheckpointWriter, *arguments: Any) -> Any:
        claimed = claim(self, *arguments)
        opened.append(len(self._open))
        return claimed

    monkeypatch.setattr(CheckpointWriter, "_claim", count_open)
    with open_writer(tmp_path / "out", plan.files) as writer:
        list(stream_layers(open_checkpoint(source), plan, writer, [CPU]))
    assert len(plan.files) > 12
    assert 1 < max(opened) <= 8


def test_very_many_small_layers_stay_within_the_plan(tmp_path: Path) -> None:
    """What is remembered of layers that were begun is no buffer, and must not need to be one."""
    tensors = {
        f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(64, 64, dtype=torch.bfloat16)
        for layer in range(3000)
    } | {"model.embed_tokens.weight": torch.zeros(8, 64)}
    source = write_checkpoint(tmp_path / "in", tensors)
    checkpoint = open_checkpoint(source)
    resources = Resources(32 * MIB, 8, 10**9)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), resources)
    assert plan.layers_quantized == 3000
    assert max(len(task.layers) for task in plan.tasks()) <= 32
    with open_writer(tmp_path / "out", plan.files) as writer, PeakMeter(0.002) as meter:
        list(stream_layers(checkpoint, plan, writer, [CPU]))
    assert meter.peak.anonymous - meter.baseline.anonymous < plan.workspace.total_bytes + 12 * MIB


def test_a_second_pass_finds_what_the_first_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor scales read twice: pages are given back behind the second time alone."""
    given_back = read = 0
    give_back, read_runs = ShardReader.give_back, ShardReader.read_runs

    def count_given(self: ShardReader, offset: int, length: int) -> None:
        nonlocal given_back
        given_back += length
        give_back(self, offset, length)

    def count_read(self: ShardReader, buffer: memoryview, *arguments: Any) -> None:
        nonlocal read
        read += len(buffer)
        read_runs(self, buffer, *arguments)

    monkeypatch.setattr(Reader, "give_back", lambda self: None)
    monkeypatch.setattr(ShardReader, "give_back", count_given)
    monkeypatch.setattr(ShardReader, "read_runs", count_read)
    tensors = llama_tensors(hidden=1024, inter=2048, kv=1024, dtype=torch.float32)
    source = write_checkpoint(tmp_path / "in", tensors)
    plan = convert(source, tmp_path / "out", Scheme(Granularity.TENSOR), threads=1)
    once = sum(tensor.spec.nbytes for tensor in plan.tensors)
    kept = sum(tensor.spec.nbytes for tensor in plan.tensors if not tensor.granularity)
    assert given_back == once
    assert read == plan.bytes_read - kept > once


def test_groups_take_turns_a_few_at_a_time() -> None:
    a, b, c = (
        tuple(Task((LayerPlan(n, f"{name}{n}", [], []),)) for n in range(3)) for name in "abc"
    )
    order = [task.layers[0].name for task in take_turns([a, b[:1], c], 2)]
    assert order == ["a0", "b0", "a1", "a2", "c0", "c1", "c2"]
    assert list(take_turns([], 4)) == []


@pytest.mark.parametrize("name", ["cpu", "cpu:0", str(torch.device("cpu", 0))])
def test_the_cpu_has_a_number_too(name: str) -> None:
    assert find_devices(name) == (torch.device("cpu"),)


@pytest.mark.parametrize("name", ["meta", "tpu", "cuda:x", "cpu:1", ""])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{name}': expected auto, cpu, cuda or cuda:N"):
        find_devices(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@schemes
def test_a_gpu_gives_the_same_bytes(tmp_path: Path, scheme: Scheme) -> None:
    tensors = llama_tensors(hidden=512, inter=1400, kv=256) | lone(1400, 512) | lone(1408, 512)
    source = write_checkpoint(tmp_path / "in", tensors)
    checkpoint = open_checkpoint(source)
    for threads, budget in ((1, 8 * MIB), (4, 256 * MIB)):
        resources = Resources(budget, threads, 10**9, gpus=1)
        plan = plan_quantization(checkpoint, scheme, Patterns(), resources)
        output = tmp_path / f"out-{threads}"
        torch.cuda.reset_peak_memory_stats()
        with open_writer(output, plan.files) as writer:
            list(stream_layers(checkpoint, plan, writer, [torch.device("cuda", 0)]))
            writer.commit(plan.config)
        assert_same(load(output), expected(tensors, plan))
        assert torch.cuda.max_memory_allocated() <= plan.workspace.device_bytes + 8 * MIB


def test_the_workspace_is_what_the_worker_allocates(tmp_path: Path, llama: Path) -> None:
    """The predicted peak is a sum of buffers: the same that a worker really makes."""
    checkpoint = open_checkpoint(llama)
    plan = plan_quantization(checkpoint, Scheme(), Patterns(), Resources(64 * MIB, 3, 10**9))
    sizes: list[int] = []
    make: Callable[..., torch.Tensor] = torch.empty

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = make(*arguments, **options)
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        Lane(plan.workspace, CPU)
    assert isinstance(plan.workspace, Workspace)
    assert plan.workspace.total_bytes == 3 * sum(sizes)


def cached_share(files: Iterable[Path]) -> float:
    """The share of the files' pages that are in memory."""
    pages: list[int] = []
    for file in files:
        with file.open("rb") as opened:
            pages += (page & 1 for page in cached_pages(opened.fileno(), 0, file.stat().st_size))
    return sum(pages) / len(pages)


@pytest.mark.parametrize("warm", [False, True])
def test_pages_that_we_brought_in_are_given_back_and_others_stay(
    tmp_path: Path, warm: bool
) -> None:
    if is_memory_backed(tmp_path):
        pytest.skip("in a RAM disk the page cache is the file")
    tensors = llama_tensors(hidden=1024, inter=4096, layers=2, vocab=4000)
    source = write_checkpoint(tmp_path / "in", tensors, shards=2)
    files = sorted(source.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            drop_cached(opened.fileno(), 0, 0)
            if warm:
                opened.read()
    assert cached_share(files) == warm
    convert(source, tmp_path / "out", Scheme(), max_shard_size=2 * 10**7)
    assert cached_share(files) == pytest.approx(float(warm), abs=0.05)
    assert cached_share((tmp_path / "out").glob("*.safetensors")) < 0.05


def test_few_written_pages_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is written, what was not waited for stays within a few bursts."""
    waiting = most = 0
    lock = threading.Lock()

    def finish(descriptor: int, offset: int, length: int) -> None:
        nonlocal waiting
        with lock:
            waiting -= length

    pwrite = os.pwrite

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal waiting, most
        done = pwrite(descriptor, data, offset)
        with lock:
            waiting += done
            most = max(most, waiting)
        return done

    monkeypatch.setattr(writer_module, "is_memory_backed", lambda path: False)
    monkeypatch.setattr(filling, "finish_writing", finish)
    monkeypatch.setattr(filling, "_BURST", MIB)
    monkeypatch.setattr("os.pwrite", write)
    tensors = llama_tensors(hidden=1024, inter=4096, layers=2)
    convert(write_checkpoint(tmp_path / "in", tensors), tmp_path / "out", Scheme())
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 4 * MIB < most < 12 * MIB < written


@schemes
def test_the_clock_counts_every_stage(tmp_path: Path, scheme: Scheme, llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_quantization(checkpoint, scheme, Patterns(), Resources(64 * MIB, 2, 10**9))
    clock = Clock()
    with open_writer(tmp_path / "out", plan.files) as writer:
        list(stream_layers(checkpoint, plan, writer, [CPU], clock))
    assert all(spent.busy > 0 and spent.blocked >= 0 for spent in clock.stages.values())
