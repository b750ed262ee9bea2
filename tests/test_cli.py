"""The command line as shells and pipelines see it: streams, exit codes, JSON, signals."""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8stream import console, options
from fp8stream.stream import LayerDone
from tests.conftest import Run, llama_tensors, write_checkpoint

Runner = Callable[..., Run]
COMMAND = [sys.executable, "-m", "fp8stream"]


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a bash line in which `fp8stream` is this package."""
    head = f'set -o pipefail; fp8stream() {{ {sys.executable} -m fp8stream "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", head + line], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_quantize_prints_the_path_on_stdout_and_peak_memory_on_stderr(
    run: Runner, llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = run("quantize", llama, output)
    assert (done.code, done.out) == (0, f"{output}\n"), done
    assert "peak memory" in done.err
    assert "planned" in done.err
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_quantize_json_is_one_object_with_the_promised_keys(
    run: Runner, llama: Path, tmp_path: Path
) -> None:
    done = run("quantize", llama, tmp_path / "out", "--json", "-q")
    document = json.loads(done.out)
    assert list(document) == [
        "schema",
        "output",
        "seconds",
        "bytes_read",
        "bytes_written",
        "layers_quantized",
        "layers_kept",
        "peak_memory",
        "layers_continued",
        "workers",
        "stages",
    ]
    assert document["layers_continued"] == 0
    assert document["workers"] > 0
    assert list(document["stages"]) == ["read", "quantize", "write", "copy"]
    assert all(list(spent) == ["busy", "blocked"] for spent in document["stages"].values())
    assert list(document["peak_memory"]) == [
        "host_anonymous_bytes",
        "host_resident_bytes",
        "baseline_anonymous_bytes",
        "device_allocated_bytes",
        "device_reserved_bytes",
    ]
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert document["bytes_written"] == written
    assert document["layers_quantized"] == 14
    assert document["output"] == str(tmp_path / "out")


def test_inspect_json_has_the_promised_keys(run: Runner, llama: Path) -> None:
    document = json.loads(run("inspect", llama, "--json").out)
    assert list(document) == ["schema", "source", "plan", "tensors", "warnings"]
    assert list(document["source"]) == [
        *("path", "architecture", "model_type", "files", "tensors", "parameters", "bytes"),
        *("dtypes", "quantized_as"),
    ]
    assert list(document["plan"]) == [
        *("scheme", "format", "layers_quantized", "layers_kept", "bytes_read", "bytes_written"),
        *("output_files", "peak_memory_bytes"),
    ]
    assert list(document["tensors"][0]) == [
        *("name", "dtype", "shape", "file", "role", "action", "scheme", "reason", "fused_with"),
        "outputs",
    ]


def test_a_dry_run_prints_what_inspect_prints_and_writes_nothing(
    run: Runner, llama: Path, tmp_path: Path
) -> None:
    dry = run("quantize", llama, tmp_path / "out", "--dry-run", "--json", "--device", "cpu")
    assert json.loads(dry.out) == json.loads(run("inspect", llama, "--json").out)
    text = run("quantize", llama, tmp_path / "out", "--dry-run")
    assert "a lookup, not a multiplication" in text.out
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_inspect_for_the_eye_collapses_layers(run: Runner, llama: Path) -> None:
    done = run("inspect", llama)
    assert "model.layers.[0-1].mlp.down_proj.weight" in done.out
    assert "FP8 channel" in done.out
    assert "\x1b" not in done.out


def test_tensors_are_one_tab_separated_line_each(run: Runner, llama: Path) -> None:
    lines = [line.split("\t") for line in run("inspect", llama, "--tensors").out.splitlines()]
    assert len(lines) == 21
    by_name = {fields[0]: fields[1:] for fields in lines}
    assert by_name["model.layers.0.mlp.up_proj.weight"][:5] == [
        *("quantize", "channel", "BF16", "256x128", "65536")
    ]
    assert by_name["model.norm.weight"][:4] == ["keep", "-", "BF16", "128"]


def test_control_characters_in_names_are_escaped(run: Runner, tmp_path: Path) -> None:
    tensors = llama_tensors(layers=1) | {"a\tb\nc\x7f": llama_tensors()["model.norm.weight"]}
    source = write_checkpoint(tmp_path / "in", tensors)
    out = run("inspect", source, "--tensors").out
    assert len(out.splitlines()) == len(tensors)
    assert out.startswith("a\\u0009b\\u000ac\\u007f\t")


def test_a_pipeline_of_jq_and_ignore_from(llama: Path) -> None:
    if not shutil.which("jq"):
        pytest.skip("jq is not installed")
    pick = "jq -r '.tensors[]|select(.action==\"keep\").name'"
    line = f"fp8stream inspect llama --json | {pick} | fp8stream quantize llama o --ignore-from -"
    done = shell(line, llama.parent)
    assert (done.returncode, done.stdout) == (0, "o\n"), done


def test_every_name_that_inspect_prints_may_be_given_back(
    run: Runner, llama: Path, tmp_path: Path
) -> None:
    tensors = json.loads(run("inspect", llama, "--json").out)["tensors"]
    listed = tmp_path / "names"
    listed.write_text("".join(tensor["name"] + "\n" for tensor in tensors))
    document = json.loads(run("inspect", llama, "--json", "--ignore-from", listed).out)
    assert document["plan"]["layers_quantized"] == 0
    refused = run("quantize", llama, tmp_path / "out", "--ignore-from", listed)
    assert refused.code == 1
    assert "nothing to quantize" in refused.err


def test_a_reader_that_had_enough_is_no_error(llama: Path) -> None:
    done = shell("fp8stream inspect llama --tensors | head -1", llama.parent)
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_stdout_alone_is_the_path(llama: Path) -> None:
    done = shell('o=$(fp8stream quantize llama o 2>/dev/null); test "$o" = o', llama.parent)
    assert done.returncode == 0


def test_a_stderr_that_is_closed_does_not_stop_a_run(llama: Path) -> None:
    done = shell("fp8stream quantize llama o 2>&-", llama.parent)
    assert (done.returncode, done.stdout) == (0, "o\n")


def test_streams_that_are_closed_are_not_what_a_run_opens_next(llama: Path) -> None:
    """A line for the eye would go there; and no lock is given back by whoever prints one."""
    python = (
        "import os, sys; from fp8stream import cli, writer; commit = writer.CheckpointWriter.commit"
        "\ndef look(*arguments):\n"
        "    open('streams', 'w').write(' '.join(map(os.readlink, "
        "map('/proc/self/fd/{}'.format, range(3)))))\n"
        "    commit(*arguments)\n"
        "writer.CheckpointWriter.commit = look; cli.run()"
    )
    (llama.parent / "script").write_text(python)
    done = shell(f"{sys.executable} script quantize llama o <&- >&- 2>&-", llama.parent)
    assert done.returncode == 0
    assert (llama.parent / "streams").read_text() == " ".join(["/dev/null"] * 3)


def test_a_line_before_anything_was_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(console, "tell", told.append)
    lines = console._Lines(10, 0)
    for size in (0, 5):
        time.sleep(0.001)
        lines(LayerDone("layer", size, size))
    assert [line.partition(":")[0] for line in told] == ["50 %"]


def ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("start", [None, ignore_sigint], ids=["foreground", "shell's background"])
def test_interrupted_midway_the_same_command_goes_on(
    run: Runner,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    start: Callable[[], None] | None,
) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors(layers=2))
    slow = (
        "import sys, time; from fp8stream import stream, cli; convert = stream.Worker.convert\n"
        "def late(self, layer): time.sleep(0.1); convert(self, layer)\n"
        "stream.Worker.convert = late; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "quantize", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=start)
    while not list(tmp_path.glob("out.fp8stream-partial/output/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    start_of_end = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - start_of_end < 5
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert run("quantize", source, tmp_path / "out").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_bar_on_a_terminal_and_plain_lines_elsewhere(
    llama: Path, tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [*COMMAND, "quantize", str(llama), str(tmp_path / "one")]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=slave, check=True)
    os.close(slave)
    seen = os.read(master, 100_000).decode()
    os.close(master)
    assert "%|" in seen
    assert "iB/s" in seen
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    lines = run("quantize", llama, tmp_path / "two").err.splitlines()
    assert any("/s, " in line and "left, model.layers.1" in line for line in lines)
    quiet = run("quantize", llama, tmp_path / "three", "-q").err
    assert " left, " not in quiet


def test_overwrite_replaces_a_checkpoint_in_one_step(
    run: Runner, llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert run("quantize", llama, output).code == 0
    (output / "old").write_text("")
    before = (output / "model.safetensors").stat().st_ino
    assert run("quantize", llama, output).code == 1
    assert run("quantize", llama, output, "--overwrite", "--scheme", "tensor").code == 0
    assert not (output / "old").exists()
    assert (output / "model.safetensors").stat().st_ino != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_overwrite_replaces_checkpoints_only(run: Runner, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "home"
    output.mkdir()
    (output / "diary").write_text("")
    assert run("quantize", llama, output, "--overwrite").code == 1
    assert (output / "diary").exists()


def test_an_empty_output_directory_is_accepted(run: Runner, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("quantize", llama, tmp_path / "out").code == 0


def test_missing_parents_are_made(run: Runner, llama: Path, tmp_path: Path) -> None:
    assert run("quantize", llama, tmp_path / "a" / "b" / "out").code == 0


def test_a_single_file_takes_the_config_beside_it(run: Runner, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors())
    (source / "tokenizer.json").write_text("{}")
    (source / "other").mkdir()
    (source / "other" / "file").write_text("")
    assert run("quantize", source / "model.safetensors", tmp_path / "out").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json")
    ]


def test_shards_stay_under_the_size_and_the_index_counts_them(run: Runner, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors(layers=4), shards=3)
    assert run("quantize", source, tmp_path / "out", "--max-shard-size", "200KB").code == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) <= 200_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize",),
        ("quantize", "a", "b", "--scheme", "row"),
        ("quantize", "a", "b", "--threads", "0"),
        ("quantize", "a", "b", "--memory-budget", "lots"),
        ("quantize", "a", "b", "--device", "tpu"),
        ("quantize", "a", "b", "--ignore-from", "no such file"),
        ("inspect", "a", "--json", "--tensors"),
        ("inspect", ""),
        ("quantize", "a", ""),
        ("frobnicate",),
    ],
)
def test_wrong_usage_exits_with_2(run: Runner, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.code == 2, done
    assert done.out == ""


def test_a_device_that_is_not_there_is_refused(run: Runner, llama: Path, tmp_path: Path) -> None:
    done = run("quantize", llama, tmp_path / "out", "--device", "cuda:99")
    assert done.code == 1
    assert "--device cpu" in done.err


def test_what_we_did_not_foresee_is_one_line_too(
    run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(options, "plan_quantization", fail)
    done = run("inspect", llama)
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    monkeypatch.setenv("FP8STREAM_DEBUG", "1")
    assert "Traceback" in run("inspect", llama).err


def test_the_version(run: Runner) -> None:
    assert run("--version").out.startswith("fp8stream, version ")


def test_a_closed_stderr_pipe_is_no_success_without_an_output(llama: Path) -> None:
    """What nobody reads on stderr must neither stop a run nor pass for a reader of stdout."""
    (llama / "pytorch_model.bin").write_text("")  # so that there is a warning to print
    shell("{ fp8stream quantize llama o -q; echo $? >code; } 2> >(true)", llama.parent)
    while not (llama.parent / "code").exists():
        time.sleep(0.05)
    assert (llama.parent / "code").read_text() == "0\n"
    assert (llama.parent / "o" / "config.json").exists()


def test_stdout_on_a_full_disk_is_an_error_that_says_so(llama: Path) -> None:
    done = shell("fp8stream inspect llama --json >/dev/full", llama.parent)
    assert done.returncode == 1
    assert "standard output" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_patterns_from_a_file_hold_on_every_device(
    run: Runner, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    gpus = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr("fp8stream.device.find_devices", lambda name: gpus)
    listed = tmp_path / "patterns"
    listed.write_text("model.layers.0.mlp.down_proj\n\n")
    done = run("quantize", llama, tmp_path / "o", "--dry-run", "--json", "--ignore-from", listed)
    assert json.loads(done.out)["plan"]["layers_quantized"] == 13


def test_a_snapshot_whose_files_are_links_is_not_overwritten(
    run: Runner, llama: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in llama.iterdir():
        (snapshot / file.name).symlink_to(file)
    before = {file.name: file.read_bytes() for file in llama.iterdir()}
    done = run("quantize", snapshot, llama, "--overwrite")
    assert done.code == 1
    assert "OUTPUT contains SOURCE" in done.err
    assert {file.name: file.read_bytes() for file in llama.iterdir()} == before


def test_the_current_directory_is_not_replaced(
    run: Runner, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for output in (".", here, tmp_path, "/"):
        assert run("quantize", llama, output, "--overwrite").code == 1
    assert os.getcwd() == str(here)


def test_a_dry_run_tells_what_would_be_refused(run: Runner, llama: Path) -> None:
    done = run("quantize", llama, llama, "--dry-run")
    assert done.code == 0
    assert "warning: " in done.err
    assert "SOURCE itself" in done.err


def signalled(
    where: str, before: str, llama: Path, output: Path, *options: str, start: str = ""
) -> subprocess.CompletedProcess[str]:
    """A run that executes `start`, and `before` when it first calls `where`; what came of it.

    There `send(NAME)` sends it a signal, and leaves the time in which to answer.
    """
    code = (
        "import os, shutil, signal, sys, time\n"
        f"from fp8stream import cli, output, recorder, stream, writer\n{start}\n"
        "def send(name): os.kill(os.getpid(), getattr(signal, name)); time.sleep(0.2)\n"
        f"call, called = {where}, []\n"
        "def wrapped(*arguments, **options):\n"
        "    if not called:\n"
        f"        called.append(1); {before}\n"
        "    return call(*arguments, **options)\n"
        f"{where} = wrapped; cli.run()"
    )
    command = [sys.executable, "-c", code, "quantize", str(llama), str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "where",
    [
        "writer.Recorder._sync_and_record",
        "writer.CheckpointWriter._check_whole",
        "writer.write_file",
        "output.OutputDirectory.publish",
        "output.publishing_line",
    ],
)
def test_a_signal_once_all_is_written_stops_a_run_as_before(
    tmp_path: Path, llama: Path, run: Runner, where: str
) -> None:
    """A disk that takes minutes to sync is no reason not to listen."""
    assert run("quantize", llama, tmp_path / "whole").code == 0
    before = "send('SIGTERM'); time.sleep(30)"
    done = signalled(where, before, llama, tmp_path / "out")
    assert done.returncode == 143, done
    assert (len(done.stderr.splitlines()), "terminated" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()
    assert run("quantize", llama, tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_signal_while_the_first_record_is_synced_neither_waits_nor_discards_it(
    tmp_path: Path, llama: Path, run: Runner
) -> None:
    slow = (
        "from fp8stream import plan; plan._LAYERS_A_TASK = 1\n"
        "recorder._INTERVAL = 0.01; convert = stream.Worker.convert\n"
        "def late(self, task): convert(self, task); time.sleep(0.2)\n"
        "stream.Worker.convert = late"
    )
    before = "call(*arguments); send('SIGTERM'); time.sleep(20)"
    begin = time.monotonic()
    done = signalled("output.append_all", before, llama, tmp_path / "out", start=slow)
    assert time.monotonic() - begin < 15
    assert (done.returncode, "the same command goes on" in done.stderr) == (143, True), done
    found = json.loads(run("quantize", llama, tmp_path / "out", "--json").out)
    assert found["layers_continued"] > 0


@pytest.mark.parametrize("where", ["output.exchange", "shutil.rmtree"])
def test_a_signal_comes_too_late_once_an_output_is_put_in_place(
    tmp_path: Path, llama: Path, run: Runner, where: str
) -> None:
    assert run("quantize", llama, tmp_path / "out").code == 0
    (tmp_path / "out" / "old").touch()
    more = "send('SIGINT'); send('SIGHUP')" if where == "output.exchange" else ""
    options = ("--overwrite", "--scheme", "tensor")
    done = signalled(where, f"send('SIGTERM'); {more}", llama, tmp_path / "out", *options)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done
    assert not (tmp_path / "out" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out"]


def test_a_second_signal_ends_tidying_up_and_the_same_command_goes_on_with_it(
    tmp_path: Path, llama: Path, run: Runner
) -> None:
    assert run("quantize", llama, tmp_path / "out").code == 0
    options = ("--overwrite", "--scheme", "tensor")
    assert run("quantize", llama, tmp_path / "whole", *options).code == 0
    twice = "send('SIGINT'); send('SIGINT')"
    done = signalled("shutil.rmtree", twice, llama, tmp_path / "out", *options)
    assert done.returncode == 130
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out.fp8stream-partial").exists()
    again = run("quantize", llama, tmp_path / "out", *options, "--json")
    assert (again.code, json.loads(again.out)["bytes_read"]) == (0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "out", "whole"]


@pytest.mark.parametrize("then", ["pass", "raise ImportError"])
def test_a_signal_that_an_import_swallows_stops_a_run_nonetheless(
    tmp_path: Path, llama: Path, then: str
) -> None:
    """As Python itself does where it frees an object, and those who try this module and that."""
    swallow = f"try: send('SIGINT')\nexcept BaseException: {then}"
    where = "writer.CheckpointWriter.copy_side_files"
    done = signalled(where, f"exec({swallow!r})", llama, tmp_path / "out")
    assert (done.returncode, "interrupted" in done.stderr) == (130, True), done
    assert not (tmp_path / "out").exists()


def test_parents_that_were_made_for_an_output_that_failed_are_removed(
    run: Runner, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fp8stream.writer.reserve", fail)
    done = run("quantize", llama, tmp_path / "a" / "b" / "out")
    assert (done.code, "disk is full" in done.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_narrow_terminal_breaks_no_name(
    run: Runner, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8stream.report.PIPED_WIDTH", 80)
    lines = run("inspect", llama).out.splitlines()
    assert "model.layers.[0-1].self_attn.q_proj.weight" in lines
    assert max(map(len, lines)) <= 80


def test_many_signals_still_lose_nothing(run: Runner, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", llama_tensors(layers=40))
    command = [*COMMAND, "quantize", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("out.fp8stream-partial/output/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.002)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    code = process.wait(timeout=30)
    assert code in (129, 130, 143, 0)
    assert (code == 0) == (tmp_path / "out").exists()
    assert code == 0 or run("quantize", source, tmp_path / "out").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
