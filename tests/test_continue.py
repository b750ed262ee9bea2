"""A run that was stopped goes on, and its end is that of one that never was; or it says why not."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from fp8stream import device, output, recorder, stream, system
from fp8stream.checkpoint import open_checkpoint
from fp8stream.errors import DeviceMemoryError, OutputError
from fp8stream.experts import ExpertForm, ExpertOptions
from fp8stream.journal import (
    Journal,
    differences,
    fingerprint,
    first_line,
    layers_line,
    parse_journal,
    publishing_line,
)
from fp8stream.memory import MIB
from fp8stream.output import OutputDirectory
from fp8stream.plan import Plan, Resources, Task, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.recorder import Recorder
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from fp8stream.stream import stream_layers
from fp8stream.writer import CheckpointWriter
from tests.conftest import LLAMA, Run, Tensors, llama_tensors, write_checkpoint

Runner = Callable[..., Run]
CPU = torch.device("cpu")
SCHEMES = [
    Scheme(Granularity.CHANNEL),
    Scheme(Granularity.BLOCK),
    Scheme(Granularity.TENSOR),
    Scheme(Granularity.BLOCK, OutputFormat.FP8),
]
PARTIAL = "out.fp8stream-partial"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records come as fast as they can."""
    monkeypatch.setattr(recorder, "_INTERVAL", 0.001)
    monkeypatch.setattr(recorder, "_PATIENCE", 0)


class Killed(Exception):
    """Stands for the end of a process."""


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def moe_tensors() -> Tensors:
    """A small llama with experts that lie in one tensor, in the layout of mistral4."""
    tensors = llama_tensors(hidden=256, inter=256, layers=3)
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        tensors[f"{at}.gate_up_proj"] = torch.randn(4, 512, 256).to(torch.bfloat16)
        tensors[f"{at}.down_proj"] = torch.randn(4, 256, 256).to(torch.bfloat16)
    return tensors


MOE = {
    **LLAMA,
    "model_type": "mistral4",
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "intermediate_size": 256,
    "n_routed_experts": 4,
    "num_hidden_layers": 3,
}


def plan_of(source: Path, scheme: Scheme, form: ExpertForm, threads: int = 1) -> Plan:
    resources = Resources(threads * 3 * MIB, threads, 400_000)
    checkpoint = open_checkpoint(source)
    return plan_quantization(checkpoint, scheme, Patterns(), resources, ExpertOptions(form))


def convert(source: Path, output: Path, plan: Plan) -> int:
    """Converts what is left: how much was on record before."""
    checkpoint = open_checkpoint(source)
    now = fingerprint(checkpoint, plan, {})
    with OutputDirectory(output, now) as directory:
        done = directory.done(len(plan.layers))
        with CheckpointWriter(directory, plan.files, plan.written(done)) as writer:
            writer.copy_side_files(checkpoint)
            list(stream_layers(checkpoint, plan, writer, [CPU], tasks=plan.tasks(done)))
            writer.commit(plan.config)
    return len(done)


def _writer(worker: stream.Worker) -> CheckpointWriter:
    assert isinstance(worker._sink, CheckpointWriter)
    return worker._sink


@contextmanager
def killed_after(tasks: int) -> Iterator[None]:
    """Ends a run within as soon as so many tasks are done, and on record."""
    begun = 0

    def convert(self: stream.Worker, task: Task) -> None:
        nonlocal begun
        begun += 1
        if begun > tasks:
            _writer(self)._recorder.flush()
            raise Killed
        Convert(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fp8stream.plan._LAYERS_A_TASK", 1)
        patch.setattr(stream.Worker, "convert", convert)
        yield


Convert = stream.Worker.convert


@pytest.mark.parametrize("form", [ExpertForm.PER_EXPERT, ExpertForm.FUSED])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.granularity.value}-{s.format.value}")
def test_a_run_stopped_again_and_again_ends_as_an_unbroken_one(
    tmp_path: Path, scheme: Scheme, form: ExpertForm
) -> None:
    source = write_checkpoint(tmp_path / "in", moe_tensors(), 3, config=MOE)
    (source / "more").mkdir()
    (source / "more" / "vocabulary").write_text("words")
    try:
        plan = plan_of(source, scheme, form)
    except Exception as error:  # a form that the scheme does not have
        pytest.skip(str(error))
    assert len(plan.files) > 1
    convert(source, tmp_path / "whole", plan)
    recorded = [0]
    for stop in (2, 5, 0, 3, 6):
        with pytest.raises(Killed), killed_after(stop):
            convert(source, tmp_path / "out", plan_of(source, scheme, form, 1 + stop % 2))
        with OutputDirectory(tmp_path / "out", fingerprint(open_checkpoint(source), plan, {})) as d:
            recorded.append(len(d.done(len(plan.layers))))
        (tmp_path / PARTIAL / "output" / "more" / "left").touch()
    assert recorded == sorted(recorded)
    assert len({*recorded}) > 3
    assert convert(source, tmp_path / "out", plan_of(source, scheme, form, 2)) == recorded[-1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_what_is_recorded_is_not_read_again(tmp_path: Path, run: Runner) -> None:
    source = stopped(tmp_path, run)
    journal = parse_journal((tmp_path / PARTIAL / "journal").read_bytes())
    done = run("quantize", source, tmp_path / "out", "--json", "--threads", 3)
    document = json.loads(done.out)
    recorded = sum(end - begin for begin, end in journal.layers)
    assert document["layers_continued"] == recorded > 0
    assert 0 < document["bytes_read"] < 0.8 * sum(size_of(source).values())
    assert "going on with an unfinished run" in done.err
    assert "steps were done by an unfinished run" in done.err


def size_of(source: Path) -> Mapping[str, int]:
    return {tensor.name: tensor.nbytes for tensor in open_checkpoint(source).tensors}


def stopped(tmp_path: Path, run: Runner) -> Path:
    """The source of a run that was stopped half-way, with some layers on record."""
    source = write_checkpoint(tmp_path / "in", llama_tensors(layers=6), shards=2)
    (source / "tokenizer.json").write_text("{}")
    with killed_after(20):
        done = run("quantize", source, tmp_path / "out", "--threads", 1)
    assert done.code == 1
    assert "the same command goes on" in done.err
    assert len(done.err.splitlines()) == 1
    assert (tmp_path / PARTIAL / "journal").exists()
    return source


CHANGES: dict[str, tuple[list[str], str]] = {
    "scheme": (["--scheme", "tensor"], "--scheme was channel, is tensor"),
    "format": (
        ["--scheme", "tensor", "--format", "fp8"],
        "--format was compressed-tensors, is fp8",
    ),
    "ignore": (
        ["--ignore", "model.layers.0.mlp.down_proj"],
        "--ignore was not given, is model.layers.0.mlp.down_proj",
    ),
    "include": (["--include", "lm_head"], "--include was not given, is lm_head"),
    "size": (["--max-shard-size", "300KB"], "--max-shard-size was 5000000000, is 300000"),
}


@pytest.mark.parametrize(("options", "words"), CHANGES.values(), ids=CHANGES)
def test_another_option_is_refused_until_restart(
    tmp_path: Path,
    run: Runner,
    options: list[str],
    words: str,
) -> None:
    source = stopped(tmp_path, run)
    before = contents(tmp_path / PARTIAL)
    refused = run("quantize", source, tmp_path / "out", *options)
    assert refused.code == 1
    assert words in refused.err
    assert "--restart" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert words in run("quantize", source, tmp_path / "out", *options, "--dry-run").err
    assert contents(tmp_path / PARTIAL) == before
    assert run("quantize", source, tmp_path / "out", *options, "--restart").code == 0
    assert run("quantize", source, tmp_path / "whole", *options).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / PARTIAL).exists()


def touch(source: Path) -> None:
    os.utime(source / "model-00002-of-00002.safetensors", ns=(1, 1))


def rewrite(source: Path) -> None:
    write_checkpoint(source, llama_tensors(layers=6, inter=512), shards=2)


def configure(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (touch, "model-00002-of-00002.safetensors has changed (time)"),
        (rewrite, "model-00001-of-00002.safetensors has changed (size, time, header)"),
        (configure, "config.json has changed"),
    ],
)
def test_another_source_is_refused(
    tmp_path: Path,
    run: Runner,
    change: Callable[[Path], None],
    words: str,
) -> None:
    source = stopped(tmp_path, run)
    change(source)
    refused = run("quantize", source, tmp_path / "out")
    assert (refused.code, words in refused.err) == (1, True), refused
    assert run("quantize", source, tmp_path / "out", "--restart").code == 0


def spoil(source: Path) -> None:
    tensors = llama_tensors(layers=6)
    tensors["model.layers.5.mlp.down_proj.weight"][0, 3] = float("nan")
    write_checkpoint(source, tensors, shards=2)


@pytest.mark.parametrize("cure", ["repair", "ignore"])
@pytest.mark.parametrize("what", ["not finite", "changed"])
def test_what_the_same_command_cannot_cure_is_said_to_need_a_new_run(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, what: str, cure: str
) -> None:
    source = tmp_path / "in"
    spoil(source) if what == "not finite" else rewrite(source)

    def convert(self: stream.Worker, task: Task) -> None:
        if "layers.5.mlp.down" in task.layers[0].name:
            _writer(self)._recorder.flush()
            if what == "changed":
                touch(source)
        Convert(self, task)

    with monkeypatch.context() as patch:
        patch.setattr("fp8stream.plan._LAYERS_A_TASK", 1)
        patch.setattr(stream.Worker, "convert", convert)
        failed = run("quantize", source, tmp_path / "out", "--threads", 1)
    assert (failed.code, len(failed.err.splitlines())) == (1, 1), failed
    assert "makes another conversion, which needs --restart" in failed.err
    assert "goes on" not in failed.err
    options = ["--ignore", "model.layers.5.mlp.down_proj"] if cure == "ignore" else []
    if cure == "repair":
        rewrite(source)
    assert "another conversion" in run("quantize", source, tmp_path / "out", *options).err
    assert run("quantize", source, tmp_path / "out", *options, "--restart").code == 0


def test_other_numerics_are_refused(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stopped(tmp_path, run)
    monkeypatch.setattr("fp8stream.journal.NUMERICS", 2)
    assert "numerics was 1, is 2" in run("quantize", source, tmp_path / "out").err


def test_side_files_are_those_of_the_last_run(tmp_path: Path, run: Runner) -> None:
    source = stopped(tmp_path, run)
    (source / "tokenizer.json").unlink()
    (source / "chat_template.jinja").write_text("hello")
    assert run("quantize", source, tmp_path / "out").code == 0
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hello"


def test_nothing_on_record_is_nothing_to_refuse(tmp_path: Path, run: Runner, llama: Path) -> None:
    (tmp_path / PARTIAL / "output").mkdir(parents=True)
    (tmp_path / PARTIAL / "journal").write_bytes(first_line({"--scheme": "tensor"}))
    assert run("quantize", llama, tmp_path / "out").code == 0


@pytest.mark.parametrize("damage", ["shorter", "gone", "a link", "output is a link", "no output"])
def test_data_that_is_not_what_was_left_is_refused(
    tmp_path: Path, run: Runner, damage: str
) -> None:
    source = stopped(tmp_path, run)
    output = tmp_path / PARTIAL / "output"
    file = output / "model.safetensors"
    if damage == "shorter":
        os.truncate(file, 1000)
    elif "output" in damage:
        output.rename(tmp_path / "elsewhere")
        if damage == "output is a link":
            output.symlink_to(tmp_path / "elsewhere")
    else:
        file.rename(tmp_path / "elsewhere")
        if damage == "a link":
            file.symlink_to(tmp_path / "elsewhere")
    refused = run("quantize", source, tmp_path / "out")
    assert (refused.code, refused.err.count("--restart")) == (1, 1), refused
    assert "goes on" not in refused.err
    assert run("quantize", source, tmp_path / "out", "--restart").code == 0


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0" * 100,
        b"not a journal\n",
        first_line({})[:-5],
        first_line({}) + layers_line([10**6]),
        first_line({}).replace(b'"journal": 1', b'"journal": 2'),
    ],
)
def test_a_damaged_journal_is_refused_until_restart(
    tmp_path: Path, run: Runner, llama: Path, text: bytes
) -> None:
    (tmp_path / PARTIAL / "output").mkdir(parents=True)
    (tmp_path / PARTIAL / "journal").write_bytes(text)
    refused = run("quantize", llama, tmp_path / "out")
    assert (refused.code, "--restart" in refused.err) == (1, True), refused
    assert run("quantize", llama, tmp_path / "out", "--restart").code == 0


def test_a_journal_cut_at_any_byte_says_less_and_never_more() -> None:
    head, one, two = first_line({"a": "\0\r\n é"}), layers_line([0, 1, 5]), layers_line([2])
    whole = head + one + two + publishing_line(7, 8, "9")
    for size in range(len(whole) + 1):
        if size < len(head):
            with pytest.raises(OutputError, match="first line is damaged"):
                parse_journal(whole[:size])
            continue
        found = parse_journal(whole[:size] + b"garbage\n")
        expected = {0, 1, 5} if size >= len(head + one) else set()
        expected |= {2} if size >= len(head + one + two) else set()
        assert found.done(6) == expected
        assert found.inode == (7 if size == len(whole) else None)
        assert found.size <= size
    assert parse_journal(whole).fingerprint == {"a": "\0\r\n é"}


@given(st.sets(st.integers(0, 60)))
def test_layers_come_back_as_they_were_recorded(numbers: set[int]) -> None:
    assert parse_journal(first_line({}) + layers_line(numbers)).done(61) == numbers


def test_very_many_overlapping_ranges_are_read_at_once() -> None:
    journal = Journal({}, [(0, 10**6)] * 10**5, None, 0)
    assert len(journal.done(10**6)) == 10**6


def test_differences_tell_what_files_came_and_went() -> None:
    before = {"a.safetensors": [1, 2, "x"], "--ignore": ["b", "c"], "the plan": "x"}
    now = {"b.safetensors": [1, 2, "x"], "--ignore": [], "the plan": "y"}
    assert differences(before, now) == [
        "a.safetensors is gone",
        "--ignore was b c, is not given",
        "b.safetensors is new",
    ]
    assert differences({"the plan": "x"}, {"the plan": "y"}) == ["the plan was made by other code"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kept", ["same", "other"])
def test_killed_when_only_tidying_up_was_left(
    tmp_path: Path, run: Runner, llama: Path, overwrite: bool, kept: str
) -> None:
    """The output is in place, and so is what the run did not come to remove."""
    options = ["--overwrite"] if overwrite else []
    (tmp_path / "old").mkdir()
    if overwrite:
        assert run("quantize", llama, tmp_path / "out", "--scheme", "tensor").code == 0
    real = OutputDirectory._discard

    def leave(self: OutputDirectory) -> None:
        if not self.in_place:
            real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDirectory, "_discard", leave)
        assert run("quantize", llama, tmp_path / "out", *options).code == 0
    assert (tmp_path / PARTIAL / "journal").exists()
    before = contents(tmp_path / "out")
    scheme = ["--scheme", "channel" if kept == "same" else "block"]
    done = run("quantize", llama, tmp_path / "out", *options, *scheme, "--json")
    if kept == "same":
        assert (done.code, json.loads(done.out)["bytes_read"]) == (0, 0)
        assert len(done.err.splitlines()) == 1
        assert "finished by the run before this one" in done.err
        assert contents(tmp_path / "out") == before
        assert not (tmp_path / PARTIAL).exists()
    else:
        assert done.code == (0 if overwrite else 1)
        assert overwrite or "exists already" in done.err
        assert (contents(tmp_path / "out") != before) == overwrite


@pytest.fixture
def untidy(tmp_path: Path, run: Runner, llama: Path) -> Path:
    """An output that is in place, of a run that was killed before it tidied up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDirectory, "_discard", lambda self: None)
        assert run("quantize", llama, tmp_path / "out").code == 0
    return tmp_path / "out"


def test_what_was_put_in_place_and_then_moved_away_is_made_anew(
    untidy: Path, tmp_path: Path, run: Runner, llama: Path
) -> None:
    untidy.rename(tmp_path / "elsewhere")
    assert "unfinished run" not in run("quantize", llama, untidy, "--dry-run").err
    done = run("quantize", llama, untidy, "--json")
    assert (done.code, json.loads(done.out)["layers_continued"]) == (0, 0)
    assert contents(untidy) == contents(tmp_path / "elsewhere")
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["gone", "shorter"])
def test_an_output_in_place_that_lost_a_file_is_not_taken_for_finished(
    untidy: Path, run: Runner, llama: Path, file: str, damage: str
) -> None:
    if damage == "gone":
        (untidy / file).unlink()
    else:
        status = (untidy / file).stat()
        os.truncate(untidy / file, 100)
        os.utime(untidy / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused = run("quantize", llama, untidy)
    assert (refused.code, "exists already" in refused.err) == (1, True), refused


def test_the_disk_must_have_room_for_another_conversion_than_was_put_in_place(
    untidy: Path, tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    refused = run("quantize", llama, untidy, "--overwrite", "--scheme", "block")
    assert (refused.code, "not enough disk space" in refused.err) == (1, True), refused
    assert run("quantize", llama, untidy, "--overwrite").code == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_stopped_while_tidying_up_the_same_command_tidies_up(
    tmp_path: Path, run: Runner, llama: Path, overwrite: bool
) -> None:
    """The journal is the last that goes: without it nobody knows that no more was left to do."""
    options = ["--overwrite"] if overwrite else []
    if overwrite:
        assert run("quantize", llama, tmp_path / "out", "--scheme", "tensor").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: None)
        patch.setattr(Path, "unlink", lambda path: None)
        assert run("quantize", llama, tmp_path / "out", *options).code == 0
    assert (tmp_path / PARTIAL / "journal").exists()
    done = run("quantize", llama, tmp_path / "out", *options, "--json")
    assert (done.code, json.loads(done.out)["bytes_read"]) == (0, 0)
    assert not (tmp_path / PARTIAL).exists()


def test_a_sync_that_fails_after_the_rename_leaves_the_rest_to_the_next_run(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = system.sync_directory

    def fail(path: Path) -> None:
        if path == tmp_path and (tmp_path / "out").exists():
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "sync_directory", fail)
        for _ in range(2):
            failed = run("quantize", llama, tmp_path / "out")
            assert (failed.code, "is whole and in place" in failed.err) == (1, True), failed
            assert "goes on" not in failed.err
            assert "Input/output error; the same command" in failed.err
    # The output itself took what was free.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert run("quantize", llama, tmp_path / "out").code == 0
    assert not (tmp_path / PARTIAL).exists()


@pytest.mark.parametrize("call", ["rmtree", "unlink", "rmdir"])
def test_what_cannot_be_removed_is_told_and_no_failure(
    tmp_path: Path, run: Runner, llama: Path, call: str
) -> None:
    assert run("quantize", llama, tmp_path / "out", "--scheme", "tensor").code == 0

    def fail(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil if call == "rmtree" else Path, call, fail)
        done = run("quantize", llama, tmp_path / "out", "--overwrite")
    assert done.code == 0
    assert f"warning: {tmp_path / PARTIAL}: could not be removed: " in done.err
    assert "Permission denied" in done.err
    if call == "rmtree":
        assert run("quantize", llama, tmp_path / "out", "--overwrite", "--json").code == 0
        assert not (tmp_path / PARTIAL).exists()


def test_a_finished_output_that_cannot_be_put_in_place_is_told_once_how_to_go_on(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, target: Path) -> None:
        if path.name == "output":
            raise OSError(errno.EIO, "Input/output error")
        real(path, target)

    real = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        failed = run("quantize", llama, tmp_path / "out")
    assert (failed.code, failed.err.count("the same command goes on")) == (1, 1)
    assert "run again" not in failed.err
    assert run("quantize", llama, tmp_path / "out").code == 0


@pytest.mark.parametrize("error", [RuntimeError("unable to open file"), SafetensorError("bad")])
def test_an_output_that_cannot_be_read_again_is_one_clear_error(
    tmp_path: Path, run: Runner, llama: Path, error: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fp8stream.writer.safe_open", fail)
        failed = run("quantize", llama, tmp_path / "out")
    assert (failed.code, f"cannot be read again: {error}" in failed.err) == (1, True)
    assert "FP8STREAM_DEBUG" not in failed.err
    assert run("quantize", llama, tmp_path / "out").code == 0


@pytest.mark.parametrize("came", ["a file", "a directory", "a checkpoint"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_be_at_the_output_meanwhile_is_not_replaced(
    tmp_path: Path, run: Runner, llama: Path, overwrite: bool, came: str
) -> None:
    """Unless it is a checkpoint, and was to be."""
    options = ["--overwrite"] if overwrite else []
    real = CheckpointWriter._give_back

    def come(self: CheckpointWriter) -> None:
        real(self)
        if came == "a file":
            (tmp_path / "out").write_text("precious")
        elif came == "a directory":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").write_text("precious")
        else:
            shutil.copytree(llama, tmp_path / "out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "_give_back", come)
        done = run("quantize", llama, tmp_path / "out", *options)
    if overwrite and came == "a checkpoint":
        assert done.code == 0
        return
    assert (done.code, "goes on" in done.err) == (1, True)
    there = tmp_path / "out"
    assert there.read_text() == "precious" if came == "a file" else len(contents(there)) > 0
    there.rename(tmp_path / "elsewhere")
    assert run("quantize", llama, tmp_path / "out", *options).code == 0


def test_a_run_that_fails_to_begin_leaves_nothing(tmp_path: Path, run: Runner, llama: Path) -> None:
    def fail(path: Path, data: bytes) -> None:
        path.write_bytes(data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "write_file", fail)
        failed = run("quantize", llama, tmp_path / "new" / "out")
    assert (failed.code, "disk is full" in failed.err) == (1, True)
    assert sorted(tmp_path.iterdir()) == before


def test_the_names_of_all_that_is_made_are_synced(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = system.sync_directory

    def sync(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(output, "sync_directory", sync)
    assert run("quantize", llama, tmp_path / "a" / "b" / "out").code == 0
    for made in ("a", "a/b", "a/b/out.fp8stream-partial", "a/b/out.fp8stream-partial/output"):
        assert (tmp_path / made).parent in synced
    assert synced[-1] == tmp_path / "a" / "b"


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--overwrite"]])
def test_a_journal_that_cannot_be_read_is_one_clear_error(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    source = stopped(tmp_path, run)
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "journal":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        failed = run("quantize", source, tmp_path / "out", *options)
    assert failed.code == (0 if "--dry-run" in options else 1)
    assert "journal: cannot be read: Input/output error" in failed.err
    assert "FP8STREAM_DEBUG" not in failed.err
    assert run("quantize", source, tmp_path / "out").code == 0


def test_a_directory_that_got_the_number_of_the_output_is_not_taken_for_it(
    tmp_path: Path, run: Runner, llama: Path
) -> None:
    """Killed before all was tidied up; then somebody removed the output, and made another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDirectory, "_discard", lambda self: None)
        assert run("quantize", llama, tmp_path / "out").code == 0
    for file in (tmp_path / "out").iterdir():
        file.unlink()  # the directory stays: no file system promises another number, or the same
    shutil.copytree(llama, tmp_path / "out", dirs_exist_ok=True)
    refused = run("quantize", llama, tmp_path / "out")
    assert (refused.code, "exists already" in refused.err) == (1, True)


def test_a_signal_while_a_torn_journal_is_cut_stops_nothing(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.ftruncate` begins again where a signal cut it short, which `os.truncate` does not."""
    source = stopped(tmp_path, run)
    with (tmp_path / PARTIAL / "journal").open("ab") as journal:
        journal.write(b"torn")

    def interrupted(*arguments: object) -> None:
        raise InterruptedError(errno.EINTR, "Interrupted system call")

    monkeypatch.setattr(os, "truncate", interrupted)
    assert run("quantize", source, tmp_path / "out").code == 0


def test_two_processes_to_one_output(tmp_path: Path, run: Runner, llama: Path) -> None:
    (tmp_path / PARTIAL).mkdir()
    descriptor = os.open(tmp_path / PARTIAL / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for options in ([], ["--restart"], ["--scheme", "block"]):
        refused = run("quantize", llama, tmp_path / "out", *options)
        assert (refused.code, "another run is writing this output" in refused.err) == (1, True)
    os.close(descriptor)
    assert run("quantize", llama, tmp_path / "out").code == 0
    assert not (tmp_path / PARTIAL).exists()


def test_a_lock_asks_for_no_more_than_nfs_has(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It emulates them by locks of bytes, which a descriptor for reading alone is refused."""
    real, locked = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        locked.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    done = run("quantize", llama, tmp_path / "out")
    assert (done.code, locked) == (0, [str(tmp_path / PARTIAL / "lock")])
    assert "has no locks" not in done.err


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*arguments: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    done = run("quantize", llama, tmp_path / "out")
    assert (done.code, done.err.count("this file system has no locks")) == (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_a_lock_whose_file_was_removed_is_none(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that had it removed it while we waited for no more than our turn."""
    real, files = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        files.append(os.fstat(descriptor).st_ino)
        if len(files) == 1:
            (tmp_path / PARTIAL / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run("quantize", llama, tmp_path / "out").code == 0
    assert len(files) == 2


def test_a_directory_that_another_run_takes_while_we_leave_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.close

    def close(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("lock (deleted)"):
            (tmp_path / PARTIAL / "lock").touch()
            (tmp_path / PARTIAL / "journal").write_bytes(first_line({}))
        real(descriptor)

    monkeypatch.setattr(os, "close", close)
    with OutputDirectory(tmp_path / "out", {}):
        pass
    assert sorted(path.name for path in (tmp_path / PARTIAL).iterdir()) == ["journal", "lock"]


@pytest.mark.parametrize("options", [[], ["--restart"], ["--dry-run"]])
@pytest.mark.parametrize("text", [b"", b"my diary\n", b"5f3759df {}\n"])
def test_a_journal_that_is_not_ours_is_in_the_way(
    tmp_path: Path, run: Runner, llama: Path, text: bytes, options: list[str]
) -> None:
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "journal").write_bytes(text)
    (tmp_path / PARTIAL / "thesis.tex").write_text("years of work")
    before = contents(tmp_path / PARTIAL)
    refused = run("quantize", llama, tmp_path / "out", *options)
    assert (refused.code, "in the way" in refused.err) == (int("--dry-run" not in options), True)
    assert contents(tmp_path / PARTIAL) == before


def test_a_directory_called_output_alone_is_in_the_way(
    tmp_path: Path, run: Runner, llama: Path
) -> None:
    (tmp_path / PARTIAL / "output").mkdir(parents=True)
    assert "in the way" in run("quantize", llama, tmp_path / "out", "--restart").err


@pytest.mark.parametrize("where", ["listdir", "open"])
def test_a_directory_that_another_run_removes_meanwhile_is_made_anew(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / PARTIAL).mkdir()
    real = getattr(os, where)
    removed: list[Path] = []

    def remove(path: object, *arguments: int, **options: int) -> object:
        if str(path).startswith(str(tmp_path / PARTIAL)) and not removed:
            removed.append(tmp_path / PARTIAL)
            (tmp_path / PARTIAL).rmdir()
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, where, remove)
    assert run("quantize", llama, tmp_path / "out").code == 0
    assert removed


def test_what_was_replaced_goes_back_when_a_run_is_discarded(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames of a file system that cannot exchange directories."""
    source = stopped(tmp_path, run)
    (tmp_path / PARTIAL / "replaced").mkdir()
    (tmp_path / PARTIAL / "replaced" / "precious").write_text("years of work")
    refused = run("quantize", source, tmp_path / "out", "--restart", "--device", "cuda:99")
    assert refused.code == 1
    assert (tmp_path / "out" / "precious").read_text() == "years of work"


def test_what_goes_back_is_not_in_the_way_when_all_is_done(tmp_path: Path, run: Runner) -> None:
    """But at once: without --overwrite nothing may be put in its place."""
    source = stopped(tmp_path, run)
    shutil.copytree(source, tmp_path / PARTIAL / "replaced")
    refused = run("quantize", source, tmp_path / "out", "--restart")
    assert (refused.code, "exists already" in refused.err) == (1, True)
    assert contents(tmp_path / "out") == contents(source)
    assert not (tmp_path / PARTIAL).exists()


def test_a_recorder_records_nothing_that_was_not_synced_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: calls.append("sync"))
    file = tmp_path / "file"
    file.touch()
    with Recorder(lambda layers: calls.append(list(layers))) as recording:
        recording.follow(file)
        recording.finished(3)
        recording.finished(1)
        recording.flush()
    assert calls in (["sync", [3, 1]], ["sync", [3], "sync", [1]])


def test_a_sync_that_fails_stops_the_run_and_records_nothing(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fdatasync

    def fail(descriptor: int) -> None:
        if threading.current_thread().name == "fp8stream-recorder" or "model" in os.readlink(
            f"/proc/self/fd/{descriptor}"
        ):
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fail)
    failed = run("quantize", llama, tmp_path / "out")
    assert (failed.code, "cannot be written: Input/output error" in failed.err) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_nothing_is_recorded_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk tells each descriptor once that it lost something, whichever layer that belongs to."""
    monkeypatch.setattr(recorder, "_INTERVAL", 60)
    answers: list[Exception | None] = [OSError(5, "Input/output error"), None, None]
    recorded: list[object] = []

    def sync(descriptor: int) -> None:
        answer = answers.pop(0)
        if answer:
            raise answer

    monkeypatch.setattr(os, "fdatasync", sync)
    (tmp_path / "file").touch()
    with Recorder(recorded.append) as recording:
        recording.follow(tmp_path / "file")
        recording.finished(0)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                recording.flush()
        with pytest.raises(OSError, match="Input/output"):
            recording.finished(1)
    assert not recorded


@pytest.mark.parametrize("fitting", [1, 0])
def test_a_device_that_runs_out_of_memory_gets_smaller_buffers(
    tmp_path: Path, run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch, fitting: int
) -> None:
    real = device.open_lane
    seen = []

    def open_lane(space: Any, where: torch.device) -> Any:
        seen.append(space.slab_bytes)
        if space.slab_bytes > MIB * fitting:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 MiB")
        return real(space, where)

    monkeypatch.setattr(stream, "open_lane", open_lane)
    done = run("quantize", llama, tmp_path / "out")
    if fitting:
        assert done.code == 0
        assert "going on with smaller buffers" in done.err
        assert run("quantize", llama, tmp_path / "whole").code == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert seen[0] > 2 * seen[-1]
    else:
        assert (done.code, "out of memory with the smallest" in done.err) == (1, True), done
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize("before", [False, True])
def test_what_is_told_at_the_end_counts_what_was_done_with_larger_buffers(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    if before:
        source = stopped(tmp_path, run)
        journal = parse_journal((tmp_path / PARTIAL / "journal").read_bytes())
        there = sum(end - begin for begin, end in journal.layers)
    else:
        source, there = write_checkpoint(tmp_path / "in", llama_tensors(layers=6), shards=2), 0
    names: list[str] = []

    def convert(self: stream.Worker, task: Task) -> None:
        if len(names) == 5:
            _writer(self)._recorder.flush()
            names.append("failed")
            time.sleep(0.3)
            raise DeviceMemoryError("out of memory")
        names.append(task.layers[0].name)
        Convert(self, task)

    with monkeypatch.context() as patch:
        patch.setattr("fp8stream.plan._LAYERS_A_TASK", 1)
        patch.setattr(stream.Worker, "convert", convert)
        done = run("quantize", source, tmp_path / "out", "--json", "--threads", 1)
    document = json.loads(done.out)
    assert "going on with smaller buffers" in done.err
    assert done.err.count("going on with an unfinished run") == int(before)
    assert document["layers_continued"] == there
    assert document["seconds"] > 0.3
    assert len(names) == len({*names}), "nothing was converted twice"
    if not before:
        assert document["bytes_read"] == sum(size_of(source).values())


def test_hosts_without_memory_are_told_from_other_errors() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(DeviceMemoryError), device.running_out_of_memory():
            raise error
    with pytest.raises(RuntimeError, match="shape"), device.running_out_of_memory():
        raise RuntimeError("a shape is wrong")


def test_an_interrupt_while_python_is_still_importing_is_no_traceback(tmp_path: Path) -> None:
    """Imports take a tenth of a second, in which nobody listens to signals yet."""
    slow = tmp_path / "click.py"
    slow.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-m", "fp8stream", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "fp8stream: interrupted\n")


def test_a_copy_of_an_unfinished_run_goes_on(tmp_path: Path, run: Runner) -> None:
    source = stopped(tmp_path, run)
    shutil.copytree(tmp_path / PARTIAL, tmp_path / "copy.fp8stream-partial")
    assert run("quantize", source, tmp_path / "copy").code == 0
    assert run("quantize", source, tmp_path / "out").code == 0
    assert contents(tmp_path / "copy") == contents(tmp_path / "out")
