"""A checkpoint that means harm: what it puts in place of files, names and code.

Nothing outside SOURCE and OUTPUT is read or written, nothing in SOURCE is executed, and nothing
that may wait for ever is opened.
"""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fp8stream
from fp8stream import device, header
from fp8stream.checkpoint import open_checkpoint
from fp8stream.errors import CheckpointError
from fp8stream.header import open_regular
from tests.conftest import LLAMA, Run, llama_tensors, small_tensors, write_checkpoint

Runner = Callable[..., Run]
Make = Callable[[Path], object]
ONE = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


pytestmark = pytest.mark.usefixtures("alarm")


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def assert_refused(result: Run, *words: str) -> None:
    assert result.code == 1, result
    assert result.out == ""
    assert len(result.err.splitlines()) == 1, result
    assert "FP8STREAM_DEBUG" not in result.err, "an error that nobody foresaw"
    assert all(word in result.err for word in words), result


# In place of files.


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's whole path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def link_to(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def make_link_to_fifo(path: Path) -> None:
    os.mkfifo(path.parent.parent / "pipe")
    path.symlink_to("../pipe")


def make_loop_of_two(path: Path) -> None:
    (path.parent / "other-link").symlink_to(path.name)
    path.symlink_to("other-link")


THINGS: Mapping[str, Make] = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a directory": os.mkdir,
    "a link to a FIFO": make_link_to_fifo,
    "a link to the directory": link_to("."),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a loop of two links": make_loop_of_two,
    "a link to nothing": link_to("../gone"),
    **{
        f"a link to {device}": link_to(device) for device in ("/dev/zero", "/dev/tty", "/dev/stdin")
    },
}


@pytest.mark.parametrize("command", ["inspect", "quantize"])
@pytest.mark.parametrize("file", [ONE, INDEX, "config.json"])
@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
def test_what_stands_in_place_of_a_file_is_refused_at_once(
    make: Make, file: str, command: str, source: Path, run: Runner
) -> None:
    (source / file).unlink()
    make(source / file)
    before = listing(source.parent)
    output = [source.parent / "output"] if command == "quantize" else []
    assert_refused(run(command, source, *output), file)
    assert listing(source.parent) == before


@pytest.mark.parametrize("make", THINGS.values(), ids=THINGS)
def test_what_stands_in_place_of_a_side_file_is_left(make: Make, source: Path, run: Runner) -> None:
    make(source / "vocab.txt")
    result = run("quantize", source, source.parent / "output")
    assert result.code == 0, result
    copied = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {*listing(source.parent / "output")} <= {*copied, "vocab.txt"}
    assert not (source.parent / "output" / "vocab.txt").is_file()


def test_a_fifo_that_takes_the_place_of_a_file_as_it_is_opened_is_not_waited_for(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = header._check_regular
    calls: list[Path] = []

    def check_then_replace(path: Path, mode: int) -> None:
        check(path, mode)
        if not calls:
            path.unlink()
            os.mkfifo(path)
        calls.append(path)

    monkeypatch.setattr(header, "_check_regular", check_then_replace)
    with pytest.raises(CheckpointError, match="found a FIFO"):
        open_regular(source / "config.json")


@pytest.mark.skipif(not Path("/proc/kmsg").exists(), reason="no such file of the system")
@pytest.mark.parametrize("file", [ONE, INDEX, "config.json"])
def test_a_link_to_a_file_of_the_system_that_has_no_end_is_not_waited_for(
    file: str, source: Path, run: Runner
) -> None:
    """It calls itself a regular file of no bytes, and a read of it waits for the next message."""
    (source / file).unlink()
    (source / file).symlink_to("/proc/kmsg")
    assert_refused(run("inspect", source), file)


def test_loops_of_links_between_directories_are_not_followed(source: Path, run: Runner) -> None:
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "up").symlink_to("../..")
    (source / "a" / "over").symlink_to("b")
    (source / "a" / "b" / "notes.txt").write_text("notes")
    result = run("quantize", source, source.parent / "output")
    assert result.code == 0, result
    assert (source.parent / "output" / "a" / "b" / "notes.txt").read_text() == "notes"
    assert not any(path.is_symlink() for path in (source.parent / "output").rglob("*"))
    assert not (source.parent / "output" / "a" / "over").exists()
    assert "a/b/up/" in result.err


def test_a_link_out_of_the_source_is_followed_to_a_file_and_told(source: Path, run: Runner) -> None:
    """As hand-made checkpoints have them. Those of the hub's cache lead to its blobs: no word."""
    secret = source.parent / "secret.txt"
    secret.write_text("s")
    (source.parent / "blobs").mkdir()
    (source.parent / "blobs" / "0a1b").write_text("b")
    (source / "vocab.txt").symlink_to("../secret.txt")
    (source / "merges.txt").symlink_to("../blobs/0a1b")
    (source / "same.txt").symlink_to("tokenizer.json")
    result = run("quantize", source, source.parent / "output")
    assert result.code == 0, result
    written = {name: (source.parent / "output" / name) for name in ("vocab.txt", "merges.txt")}
    assert [path.read_text() for path in written.values()] == ["s", "b"]
    assert not any(path.is_symlink() for path in written.values())
    (line,) = (line for line in result.err.splitlines() if "outside" in line)
    assert f"vocab.txt -> {secret}" in line
    assert "merges.txt" not in line
    assert "same.txt" not in line


def test_an_index_may_name_a_file_through_a_link_but_none_twice(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    outside = source.parent / "elsewhere.safetensors"
    (source / ONE).rename(outside)
    (source / ONE).symlink_to(outside)
    assert len(open_checkpoint(source).tensors) == len(small_tensors())
    (source / "again.safetensors").symlink_to(ONE)
    index["weight_map"]["more"] = "again.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"stands in again\.safetensors too"):
        open_checkpoint(source)


@pytest.mark.parametrize("name", ["source", "source/config.json", "source/sub", "source/vocab.txt"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become someone else")
def test_what_may_not_be_read_is_refused_in_words(name: str, source: Path) -> None:
    """In place of root, whom no permission stops, somebody else runs it."""
    (source / "sub").mkdir()
    (source / "vocab.txt").write_text("v")
    ours = [path for path in source.parents if path.is_relative_to(tempfile.gettempdir())]
    for path in (source, *source.iterdir(), *ours[:-1]):
        path.chmod(0o755)
    (source.parent / name).chmod(0)
    code = (
        "import os, sys; from fp8stream.cli import main; os.setgroups([]); os.setgid(65534); "
        "os.setuid(65534); os._exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "--json", source], capture_output=True, text=True
    )
    (source.parent / name).chmod(0o755)
    if name in ("source", "source/config.json"):
        assert_refused(Run(done.returncode, done.stdout, done.stderr), name, "Permission denied")
    else:
        assert done.returncode == 0, done.stderr


def test_a_side_file_that_grows_is_refused_or_copied_as_it_was_at_some_time(
    source: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up = device.warm_up

    def grow_then_warm_up(devices: Any) -> None:
        with (source / "tokenizer.json").open("a") as stream:
            stream.write(" " * 3_000_000)
        warm_up(devices)

    monkeypatch.setattr(device, "warm_up", grow_then_warm_up)
    result = run("quantize", source, source.parent / "output")
    if result.code:
        assert_refused(result, "tokenizer.json")
        assert listing(source.parent) == ["source", *(f"source/{n}" for n in listing(source))]
    else:
        copied = (source.parent / "output" / "tokenizer.json").read_bytes()
        assert (source / "tokenizer.json").read_bytes().startswith(copied)
        assert copied.startswith(b"{}")


# Side files that have names like those of the output.


def test_side_files_never_stand_where_the_output_does(source: Path, run: Runner) -> None:
    copied = {
        "Config.json": "not the config",
        "a\nb.txt": "newline",
        "...": "dots",
        "tab\there": "tab",
        "README.md": "one",
        "readme.md": "two",
        "caf\u00e9": "composed",
        "cafe\u0301": "decomposed",
        "sub/config.json": "inner",
        "sub/model.safetensors.txt": "text",
    }
    left = {
        "model.safetensors/notes.txt": "in a directory that is called like our file",
        "MODEL.SAFETENSORS": "which some file systems take for ours",
        "Model.safetensors.index.JSON": "{}",
        "model.fp8stream-partial/journal": "",
        "model.fp8stream-partial/output/tokenizer.json": "{}",
    }
    for name, content in {**copied, **left}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    before = listing(source)
    result = run("quantize", source, source.parent / "output")
    assert result.code == 0, result
    output = source.parent / "output"
    files = {str(p.relative_to(output)): p for p in output.rglob("*") if p.is_file()}
    assert set(files) == {*copied, "tokenizer.json", "config.json", "model.safetensors"}
    assert {name: files[name].read_text() for name in copied} == copied
    assert json.loads(files["config.json"].read_text())["quantization_config"]
    with safe_open(files["model.safetensors"], framework="pt") as opened:
        assert opened.keys()
    assert "MODEL.SAFETENSORS" in result.err
    assert listing(source) == before


def test_an_index_that_is_a_side_file_of_a_single_file_is_not_copied(
    tmp_path: Path, run: Runner
) -> None:
    """Its own, of one file or several, would be another's."""
    directory = write_checkpoint(tmp_path / "source", small_tensors())
    (directory / INDEX).write_text('{"weight_map": {"evil": "../evil.safetensors"}}')
    result = run("quantize", directory / "model.safetensors", tmp_path / "output")
    assert result.code == 0, result
    assert listing(tmp_path / "output") == ["config.json", "model.safetensors"]


# Names of tensors.

NFC, NFD = (unicodedata.normalize(form, "model.layers.0.größe.q_proj") for form in ("NFC", "NFD"))
NAMES = [
    *(NFC, NFD, "model.layers.0.a\0b.k_proj", "model.layers.0.a\nb.v_proj", "tab\t.0.cr\r.o_proj"),
    *("model.layers.0.\x1b[31mred", "model.layers.0.\x7f\x9b2J", "model.layers.0.\u202egnp.up"),
    *("model.layers.0.\u2028line", "model.layers.0.x\x85y", "model.layers.0.\U0001f600"),
    *(
        'model.layers.0."q"',
        "model.layers.0.back\\slash",
        "model.layers.0.re:.*",
        "../../etc/passwd",
    ),
]


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A checkpoint whose tensors have strange names, half of them quantized."""
    tensors = llama_tensors(hidden=64, inter=128, layers=1, kv=64, vocab=96)
    for number, name in enumerate(NAMES):
        tensors[f"{name}.weight"] = torch.full((64, 64), 1.0 + number).bfloat16()
        tensors[f"{name}.bias"] = torch.full((64,), 1.0 + number).bfloat16()
    return write_checkpoint(tmp_path / "strange", tensors, shards=2)


def test_every_strange_name_is_one_line_of_eight_fields(strange: Path, run: Runner) -> None:
    result = run("inspect", strange, "--tensors")
    assert result.code == 0, result
    lines = result.out.split("\n")[:-1]
    assert len(lines) == len(open_checkpoint(strange).tensors)
    assert all(line.count("\t") == 7 for line in lines)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.out + result.err)
    shown = [line.partition("\t")[0] for line in lines]
    assert len({*shown}) == len(lines)
    assert "model.layers.0.a\\u0000b.k_proj.weight" in shown
    assert {f"{NFC}.weight", f"{NFD}.weight"} <= {*shown}


@pytest.mark.parametrize("options", [(), ("--scheme", "block"), ("--scheme", "tensor")])
def test_strange_names_are_the_output_s_names(
    options: tuple[str, ...], strange: Path, run: Runner
) -> None:
    output = strange.parent / "output"
    result = run("quantize", strange, output, *options, "--max-shard-size", "100kB")
    assert result.code == 0, result
    weight_map: dict[str, str] = json.loads((output / INDEX).read_text())["weight_map"]
    found: dict[str, float] = {}
    for file in {*weight_map.values()}:
        with safe_open(output / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert weight_map.pop(name) == file
                found[name] = float(opened.get_tensor(name).float().flatten()[0])
    assert not weight_map
    for number, name in enumerate(NAMES):
        assert found[f"{name}.bias"] == 1.0 + number
        scale = found.get(f"{name}.weight_scale", 1.0)
        assert found[f"{name}.weight"] * scale == pytest.approx(1.0 + number, rel=0.01)
    assert sum(f"{name}.weight_scale" in found for name in (NFC, NFD)) in (0, 2)
    assert open_checkpoint(output).warnings == ()


def test_names_that_differ_in_unicode_form_alone_are_two_tensors(
    strange: Path, run: Runner
) -> None:
    assert NFC != NFD
    document = json.loads(run("inspect", strange, "--json").out)
    names = [tensor["name"] for tensor in document["tensors"]]
    assert names.count(f"{NFC}.weight") == names.count(f"{NFD}.weight") == 1
    result = run("inspect", strange, "--tensors", "--ignore", NFC)
    lines = [line.split("\t") for line in result.out.split("\n")]
    reasons = {fields[0]: fields[-1] for fields in lines}
    assert reasons[f"{NFC}.weight"] == f"--ignore {NFC}"
    assert reasons[f"{NFD}.weight"] != f"--ignore {NFC}"


# What a run touches.

WATCHED = """
import json, os, sys
from pathlib import Path

import fp8stream.cli as cli
import fp8stream.stream, fp8stream.writer, fp8stream.device, rich.table, tqdm, torch

record = []

def note(event, arguments):
    if watching and event.partition(".")[0] in ("open", "compile", "exec", "import", "os", "shutil",
            "subprocess", "socket", "ctypes", "pty", "tempfile"):
        record.append((event, [repr(a) if not isinstance(a, (str, int)) else a for a in arguments]))

watching = False
good, *runs = json.loads(sys.argv[1])
for arguments in good:
    assert cli.main(arguments) == 0
sys.addaudithook(note)
watching = True
codes = [cli.main(arguments) for arguments in runs]
watching = False
Path(sys.argv[2]).write_text(json.dumps([codes, record]))
os._exit(0)
"""
EVIL = """
import pathlib
pathlib.Path("PLACE").write_text("executed")
raise SystemExit("executed")
"""


@pytest.fixture
def evil(source: Path) -> Path:
    """A checkpoint with model code that leaves a trace if it is ever executed."""
    code = EVIL.replace("PLACE", str(source.parent / "trace"))
    names = ["modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"]
    names += ["conftest.py", "setup.py", "sitecustomize.py", "sub/modeling.py", "evil.pth.py"]
    (source / "sub").mkdir()
    for name in names:
        (source / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    config = {**LLAMA, "auto_map": auto_map, "trust_remote_code": True}
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (source / "odd.pkl").write_bytes(b"cos\nsystem\n(S'touch trace'\ntR.")
    return source


def test_nothing_outside_is_touched_and_no_code_is_executed(evil: Path, tmp_path: Path) -> None:
    warm = write_checkpoint(tmp_path / "warm", small_tensors())
    output, report = tmp_path / "out" / "fp8", tmp_path / "record.json"
    output.parent.mkdir()
    runs = [
        [["inspect", str(warm)], ["quantize", str(warm), str(tmp_path / "warm-fp8"), "-q"]],
        ["inspect", str(evil)],
        ["inspect", str(evil), "--tensors"],
        ["inspect", str(evil), "--json"],
        ["quantize", str(evil), str(output), "--max-shard-size", "50kB"],
        ["quantize", str(evil), str(output), "--overwrite"],
    ]
    command = [sys.executable, "-c", WATCHED, json.dumps(runs), str(report)]
    env = {**os.environ, "PYTHONPATH": str(Path(fp8stream.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    codes, record = json.loads(report.read_text())
    assert codes == [0] * 5, done.stderr

    assert not (tmp_path / "trace").exists()
    events = {event for event, _ in record}
    assert {"open", "os.rename", "os.mkdir"} <= events, "the hook saw nothing"
    assert not events & {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"}
    assert not {event for event in events if event.startswith("socket.")}
    for event, arguments in record:
        if event in ("compile", "exec", "import"):
            assert not any(str(evil) in str(argument) for argument in arguments), (event, arguments)
            assert not any("evil" in str(argument) for argument in arguments), (event, arguments)
    python = (sys.prefix, sys.base_prefix, str(Path(fp8stream.__file__).parent))
    system = ("/proc/", "/sys/", "/dev/null", "/dev/nvidia", *python)
    opened = [arguments for event, arguments in record if event == "open"]
    for path, mode, flags in opened:
        if not isinstance(path, str) or path.startswith(system):
            continue
        reads = not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if not os.path.isabs(path):
            assert reads, "a directory inside one that is removed"
        elif Path(path) == output.parent:
            assert reads, "only to make the name durable"
        elif is_within(path, evil):
            assert reads, (path, mode, flags)
        else:
            assert is_ours(path, output), path
    names = {Path(path).name for path, _, _ in opened if isinstance(path, str)}
    assert {"modeling_evil.py", "odd.pkl", ONE} <= names, "side files are read to be copied"
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")
    for event, arguments in record:
        if event not in (*changes, "os.symlink", "os.chmod", "os.utime"):
            continue
        paths = [a for a in arguments if isinstance(a, str) and os.path.isabs(a)]
        if event == "os.mkdir" and paths == [str(output.parent)]:
            continue  # there already
        assert all(is_ours(path, output) for path in paths), (event, arguments)


def is_within(path: str, directory: Path) -> bool:
    return Path(path) == directory or directory in Path(path).parents


def is_ours(path: str, output: Path) -> bool:
    """Whether a path is OUTPUT, or the directory beside it in which it is made, or in these."""
    work = output.with_name(output.name + ".fp8stream-partial")
    return is_within(path, output) or is_within(path, work) or path.startswith(f"{work}")


def test_model_code_and_side_files_are_copied_as_bytes(evil: Path, run: Runner) -> None:
    data = bytes(range(256)) * 5000
    (evil / "blob.dat").write_bytes(data)
    output = evil.parent / "output"
    result = run("quantize", evil, output)
    assert result.code == 0, result
    sides = [p for p in evil.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    for path in sides:
        name = path.relative_to(evil)
        if str(name) not in ("config.json", INDEX):
            assert (output / name).read_bytes() == path.read_bytes(), name
    assert len(sides) > 12
    assert not (evil.parent / "trace").exists()
    assert not list(output.rglob("*.pyc"))
    config = json.loads((output / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_evil.Evil"


def test_there_is_no_such_thing_as_trust_remote_code() -> None:
    for path in Path(fp8stream.__file__).parent.glob("*.py"):
        assert "trust_remote_code" not in path.read_text(), path.name
    text = "".join(path.read_text() for path in Path(fp8stream.__file__).parent.glob("*.py"))
    for word in ("import pickle", "runpy", "torch.load", "eval(", "exec("):
        assert not re.search(rf"(?<![\w.]){re.escape(word)}", text), word
    # What is imported by name is our own, or transformers': never what a checkpoint names.
    imported = re.findall(r"import_module\(f?\"([a-z0-9]+)\.", text)
    assert len(imported) == text.count("import_module(")
    assert {*imported} == {"fp8stream", "transformers"}


# Permissions.


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask_whatever_the_source_s_are(
    umask: int, tmp_path: Path, run: Runner
) -> None:
    directory = write_checkpoint(tmp_path / "source", small_tensors(), shards=2)
    (directory / "sub" / "deep").mkdir(parents=True)
    modes = {"read-only.txt": 0o400, "run.sh": 0o755, "set.bin2": 0o6777, "sub/deep/all.txt": 0o666}
    for name, mode in modes.items():
        (directory / name).write_text(name)
        (directory / name).chmod(mode)
    (directory / ONE).chmod(0o440)
    (directory / "sub").chmod(0o700)
    output = tmp_path / "parent" / "output"
    before = os.umask(umask)
    try:
        result = run("quantize", directory, output, "--max-shard-size", "50kB")
    finally:
        os.umask(before)
    assert result.code == 0, result
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in output.rglob("*")}
    assert {path.name for path in found} >= {INDEX, "config.json", "run.sh", "all.txt", "deep"}
    for path, mode in {**found, output: output.stat().st_mode & 0o7777}.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
    for name, mode in modes.items():
        assert stat.S_IMODE((directory / name).stat().st_mode) == mode
    shutil.rmtree(output.parent)


def test_the_index_of_a_file_that_is_not_a_tensor_file_is_not_followed(source: Path) -> None:
    save_file({"z": torch.zeros(1)}, source.parent / "outside.safetensors")
    index = json.loads((source / INDEX).read_text())
    for name in (
        "..//outside.safetensors",
        "/proc/self/root/x.safetensors",
        "source/../x.safetensors",
    ):
        index["weight_map"]["z"] = name
        (source / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="in the same directory"):
            open_checkpoint(source)
