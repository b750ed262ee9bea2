"""Every refusal: exit 1, one line that names the place, no output, the source untouched.

The heart is one table: what is done to a good small checkpoint, and what the message must say.
"""

import hashlib
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8stream.checkpoint import Checkpoint
from fp8stream.writer import CheckpointWriter
from tests.conftest import LLAMA, SECONDS, Run, llama_tensors, small_tensors, write_checkpoint

Break = Callable[[Path], object]
Runner = Callable[..., Run]

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
# What a run that is not done calls its directory, behind OUTPUT's name.
WORK_SUFFIX = ".fp8stream-partial"
# A tensor of file ONE, with others before and behind it.
TENSOR = "model.layers.0.self_attn.k_proj.weight"
LONGEST_MESSAGE = 1000
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"


pytestmark = pytest.mark.usefixtures("alarm")


def fingerprint(directory: Path) -> dict[str, tuple[int, int, str]]:
    """Kind, size and content of everything below `directory`; what is no file is not opened."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = hashlib.sha1(path.read_bytes()).hexdigest()
        size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
        found[str(path.relative_to(directory))] = (status.st_mode, size, content)
    return found


def assert_one_line(result: Run, words: Sequence[str]) -> None:
    assert result.code == 1, result
    assert result.out == ""
    assert len(result.err.splitlines()) == 1, result
    assert result.err.startswith("fp8stream: ")
    assert "FP8STREAM_DEBUG" not in result.err, "an error that nobody foresaw"
    assert len(result.err) < LONGEST_MESSAGE
    missing = [word for word in words if word not in result.err]
    assert not missing, f"{missing} not in: {result.err}"


# What can be done to the checkpoint. Each returns a function of its directory.


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_file(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def header(change: Callable[[dict[str, Any]], object], data: int = 0) -> Break:
    """Changes the declarations of file ONE, and makes its data so many bytes longer."""

    def change_header(directory: Path) -> None:
        entries, content = read_file(directory / ONE)
        change(entries)
        content = content[:data] if data < 0 else content + bytes(data)
        write_file(directory / ONE, json.dumps(entries).encode(), content)

    return change_header


def tensor(**fields: object) -> Break:
    """Declares fields of TENSOR differently."""
    return header(lambda entries: entries[TENSOR].update(fields))


def moved(begin: int, end: int) -> Break:
    """Moves the place of TENSOR."""

    def move(entries: dict[str, Any]) -> None:
        offsets = entries[TENSOR]["data_offsets"]
        entries[TENSOR]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return header(move)


def text(old: bytes, new: bytes) -> Break:
    """Replaces bytes in the header of file ONE."""

    def replace(directory: Path) -> None:
        entries, data = read_file(directory / ONE)
        before = json.dumps(entries).encode()
        assert old in before
        write_file(directory / ONE, before.replace(old, new, 1), data)

    return replace


def bytes_of_one(change: Callable[[bytes], bytes]) -> Break:
    """Changes the content of file ONE."""
    return lambda directory: (directory / ONE).write_bytes(change((directory / ONE).read_bytes()))


def length(claimed: int, size: int | None = None) -> Break:
    """Lets file ONE claim a header of so many bytes; `size` makes the file so large, sparsely."""

    def claim(directory: Path) -> None:
        with (directory / ONE).open("r+b") as stream:
            stream.write(claimed.to_bytes(8, "little"))
            if size:
                stream.truncate(size)

    return claim


def put(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def lose(*names: str) -> Break:
    def remove(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return remove


def instead(name: str, make: Callable[[Path], object]) -> Break:
    """Puts something else in place of a file."""

    def replace(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return replace


def in_turn(*breaks: Break) -> Break:
    def each(directory: Path) -> None:
        for damage in breaks:
            damage(directory)

    return each


def listed(name: str, file: object) -> Break:
    """Adds an entry to the index."""

    def add(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        index["weight_map"][name] = file
        (directory / INDEX).write_text(json.dumps(index))

    return add


def config(**keys: object) -> Break:
    return put("config.json", json.dumps({**LLAMA, **keys}))


def add_file(name: str, tensors: dict[str, torch.Tensor]) -> Break:
    return lambda directory: save_file(tensors, directory / name)


def make_socket(path: Path) -> None:
    # A socket's whole path may have 107 bytes.
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def leave_directory(path: Path) -> None:
    """Puts a good file beside the checkpoint's directory."""
    shutil.copyfile(path / ONE, path.parent / "outside.safetensors")


Z = torch.zeros(4)

HEADERS = [
    pytest.param(
        length(1_000_000), [ONE, "truncated", "1000000"], id="header longer than the file"
    ),
    pytest.param(
        length(100_000_001, size=100_001_000),
        [ONE, "100000000", "100000001"],
        id="header of more than 100 MB",
    ),
    pytest.param(length(2**64 - 1), [ONE, str(2**64 - 1)], id="header of 2^64 - 1 bytes"),
    pytest.param(length(0), [ONE, "header"], id="header of no bytes"),
    pytest.param(bytes_of_one(lambda _: b""), [ONE, "truncated", "found 0"], id="empty file"),
    pytest.param(bytes_of_one(lambda b: b[:7]), [ONE, "truncated", "found 7"], id="seven bytes"),
    pytest.param(bytes_of_one(lambda b: b[:40]), [ONE, "truncated", "40"], id="half a header"),
    pytest.param(
        bytes_of_one(lambda b: b[: len(b) // 2]),
        [ONE, "tensor 'model.", "truncated"],
        id="half-downloaded",
    ),
    pytest.param(
        header(lambda _: None, data=-1), [ONE, "tensor 'model.", "truncated"], id="one byte short"
    ),
    pytest.param(put(ONE, LFS_POINTER), [ONE, "Git LFS", "git lfs pull"], id="LFS pointer"),
    pytest.param(put(ONE, "<!DOCTYPE html>" + " " * 2000), [ONE, "header"], id="a web page"),
    pytest.param(text(b"{", b"["), [ONE, "header"], id="not an object"),
    pytest.param(text(b"}", b""), [ONE, "bad header"], id="broken JSON"),
    pytest.param(text(b": [", b": [[[["), [ONE, "bad header"], id="brackets that never close"),
    pytest.param(text(b'": [', b'": [NaN, '), [ONE, "bad header", "NaN"], id="NaN in the header"),
    pytest.param(text(b"model", b"mod\xff"), [ONE, "bad header"], id="not UTF-8"),
    pytest.param(text(b"model", b"mod\0l"), [ONE, "bad header"], id="raw NUL"),
    pytest.param(
        text(b'"model.layers.0.self_attn.k_proj.', b'"\\ud800'),
        [ONE, "ud800weight", "Unicode"],
        id="lone surrogate in a name",
    ),
    pytest.param(
        text(b'"format": "pt"', b'"format": 1'), [ONE, "__metadata__"], id="metadata of a number"
    ),
    pytest.param(
        text(b'"model.norm.weight"', b'"model.layers.0.self_attn.k_proj.weight"'),
        [ONE, TENSOR, "twice"],
        id="tensor twice in one header",
    ),
    pytest.param(
        text(b'"dtype": "BF16"', b'"dtype": "BF16", "dtype": "F16"'),
        [ONE, "dtype", "twice"],
        id="key twice in one entry",
    ),
]

TENSORS = [
    pytest.param(moved(-2, -2), [ONE, "overlap", "model."], id="overlap"),
    pytest.param(moved(2, 2), [ONE, "model."], id="moved by one element"),
    pytest.param(
        header(lambda entries: entries.pop(TENSOR)), [ONE, "hole", "model."], id="hole between"
    ),
    pytest.param(header(lambda _: None, data=1), [ONE, "hole after"], id="hole at the end"),
    pytest.param(
        header(
            lambda e: e.update(
                {
                    t: {**v, "data_offsets": [o + 2 for o in v["data_offsets"]]}
                    for t, v in e.items()
                    if "dtype" in v
                }
            ),
            data=2,
        ),
        [ONE, "hole before", "model."],
        id="hole at the beginning",
    ),
    pytest.param(
        tensor(shape=[64, 64], data_offsets=[10**9, 10**9 + 8192]),
        [ONE, TENSOR, str(10**9 + 8192)],
        id="past the end",
    ),
    pytest.param(tensor(shape=[64, 63]), [ONE, TENSOR, "8064", "8192"], id="shape too small"),
    pytest.param(tensor(shape=[64, 65]), [ONE, TENSOR, "8320", "8192"], id="shape too large"),
    pytest.param(tensor(shape=[]), [ONE, TENSOR, "8192"], id="a scalar of 8192 bytes"),
    pytest.param(tensor(dtype="F32"), [ONE, TENSOR, "F32", "16384", "8192"], id="dtype too wide"),
    pytest.param(tensor(shape=[-64, -64]), [ONE, TENSOR, "-64"], id="negative dimensions"),
    pytest.param(tensor(shape=[64.0, 64]), [ONE, TENSOR, "64.0"], id="dimension with a point"),
    pytest.param(tensor(shape=[True, 4096]), [ONE, TENSOR, "True"], id="dimension true"),
    pytest.param(tensor(shape="64"), [ONE, TENSOR, "'64'"], id="shape in quotes"),
    pytest.param(tensor(shape=None), [ONE, TENSOR, "None"], id="shape null"),
    pytest.param(
        tensor(shape=[2**32, 2**32]), [ONE, TENSOR, "4294967296"], id="overflowing dimensions"
    ),
    pytest.param(
        tensor(shape=[2**63, 2]), [ONE, TENSOR, "9223372036854775808"], id="dimension of 2^63"
    ),
    pytest.param(
        tensor(shape=[2**32, 2**30, 2**2, 2**12 + 2**60]),
        [ONE, TENSOR],
        id="product that wraps to the right size",
    ),
    pytest.param(
        tensor(shape=[2**60]), [ONE, TENSOR, str(2**60)], id="2^60 elements in 8192 bytes"
    ),
    pytest.param(
        tensor(shape=[2**59], data_offsets=[0, 2**60]),
        [ONE, TENSOR, str(2**60)],
        id="2^59 elements past the end",
    ),
    pytest.param(
        tensor(shape=[0, 2**62, 2**62], data_offsets=[0, 2]),
        [ONE, TENSOR],
        id="nothing of something huge",
    ),
    pytest.param(tensor(shape=[1] * 40_000), [ONE, TENSOR], id="40,000 dimensions"),
    pytest.param(tensor(dtype="F128"), [ONE, TENSOR, "F128"], id="unknown dtype"),
    pytest.param(tensor(dtype=None), [ONE, TENSOR, "None"], id="dtype null"),
    pytest.param(tensor(dtype="x" * 100_000), [ONE, TENSOR], id="dtype of 100,000 letters"),
    pytest.param(
        header(lambda entries: entries[TENSOR].pop("dtype")), [ONE, TENSOR], id="no dtype"
    ),
    pytest.param(
        header(lambda entries: entries.update({TENSOR: 1})), [ONE, TENSOR], id="entry of a number"
    ),
    pytest.param(tensor(data_offsets=[0]), [ONE, TENSOR, "[0]"], id="one offset"),
    pytest.param(tensor(data_offsets=[-2, 8190]), [ONE, TENSOR, "-2"], id="negative offset"),
    pytest.param(tensor(data_offsets=[8192, 0]), [ONE, TENSOR], id="offsets reversed"),
    pytest.param(tensor(data_offsets=[0.0, 8192.0]), [ONE, TENSOR], id="offsets with a point"),
    pytest.param(
        header(lambda e: e.update({"a\nb\x1b[31m\u2028c": {"dtype": "F7"}})),
        [ONE, r"a\nb\x1b[31m"],
        id="control characters in a name",
    ),
]

INDEXES = [
    pytest.param(
        listed("extra.weight", "model-00003-of-00003.safetensors"),
        ["model-00003-of-00003.safetensors", "extra.weight"],
        id="index names a missing file",
    ),
    pytest.param(lose(TWO), [TWO, "tensor '", "index"], id="a file of the index is gone"),
    pytest.param(
        listed("extra.weight", TWO),
        [TWO, "extra.weight", "no such tensor"],
        id="index names a missing tensor",
    ),
    pytest.param(
        listed(TENSOR, TWO), [TWO, TENSOR, ONE], id="index names the wrong file for a tensor"
    ),
    pytest.param(
        in_turn(leave_directory, listed("extra.weight", "../outside.safetensors")),
        [INDEX, "extra.weight", "../outside.safetensors"],
        id="index leaves the directory by ..",
    ),
    pytest.param(
        listed("extra.weight", f"../source/{ONE}"),
        [INDEX, "extra.weight", f"../source/{ONE}"],
        id="index leaves the directory and comes back",
    ),
    pytest.param(
        listed("extra.weight", "/etc/model.safetensors"),
        [INDEX, "extra.weight", "/etc/model.safetensors"],
        id="index with an absolute name",
    ),
    pytest.param(
        listed("extra.weight", "below/model.safetensors"),
        [INDEX, "extra.weight", "below/model.safetensors"],
        id="index names a file below",
    ),
    pytest.param(
        listed("extra.weight", "..\\model.safetensors"),
        [INDEX, "extra.weight", "model.safetensors"],
        id="index with a backslash",
    ),
    pytest.param(
        listed("extra.weight", "C:model.safetensors"),
        [INDEX, "extra.weight", "C:model.safetensors"],
        id="index with a drive",
    ),
    pytest.param(
        listed("extra.weight", "a\0.safetensors"), [INDEX, "extra.weight"], id="index with a NUL"
    ),
    pytest.param(
        listed("extra.weight", "\ud800.safetensors"),
        ["extra.weight"],
        id="index with a lone surrogate in a file's name",
    ),
    pytest.param(
        listed("extra.weight", "x" * 100_000 + ".safetensors"),
        ["extra.weight"],
        id="index with a file name of 100,000 letters",
    ),
    pytest.param(listed("extra.weight", ".."), [INDEX, "extra.weight"], id="index names .."),
    pytest.param(listed("extra.weight", ""), [INDEX, "extra.weight"], id="index names nothing"),
    pytest.param(
        listed("extra.weight", "config.json"),
        [INDEX, "extra.weight", "config.json"],
        id="index names config.json",
    ),
    pytest.param(listed("extra.weight", 3), [INDEX, "extra.weight", "3"], id="index of numbers"),
    pytest.param(put(INDEX, "{"), [INDEX, "bad index"], id="broken index"),
    pytest.param(put(INDEX, "[]"), [INDEX, "weight_map"], id="index that is a list"),
    pytest.param(put(INDEX, "{}"), [INDEX, "weight_map"], id="index without a weight_map"),
    pytest.param(put(INDEX, '{"weight_map": {}}'), [INDEX, "weight_map"], id="empty index"),
    pytest.param(put(INDEX, b'{"weight_map": {"\xff": 1}}'), [INDEX], id="index not UTF-8"),
    pytest.param(
        put(INDEX, f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}'),
        [INDEX, "'a'", "twice"],
        id="tensor twice in the index",
    ),
    pytest.param(put(INDEX, "[" * 100_000), [INDEX, "deep"], id="index 100,000 deep"),
    pytest.param(put(INDEX, LFS_POINTER), [INDEX, "Git LFS"], id="LFS pointer for the index"),
    pytest.param(instead(INDEX, os.mkfifo), [INDEX, "regular file"], id="FIFO for the index"),
    pytest.param(instead(INDEX, os.mkdir), [INDEX, "regular file"], id="directory for the index"),
    pytest.param(
        instead(INDEX, link_to("/dev/zero")), [INDEX, "regular file"], id="device for the index"
    ),
    pytest.param(
        in_turn(
            lose(INDEX),
            put("a.safetensors.index.json", "{}"),
            put("b.safetensors.index.json", "{}"),
        ),
        ["a.safetensors.index.json", "b.safetensors.index.json"],
        id="two indexes",
    ),
]

FILES = [
    pytest.param(
        in_turn(add_file("extra.safetensors", {TENSOR: Z}), listed("new", "extra.safetensors")),
        [ONE, "extra.safetensors", TENSOR],
        id="tensor in two files of the index",
    ),
    pytest.param(
        in_turn(lose(INDEX), lambda d: shutil.copyfile(d / ONE, d / TWO)),
        [ONE, TWO, "model."],
        id="tensor in two files without an index",
    ),
    pytest.param(instead(TWO, os.mkfifo), [TWO, "regular file", "FIFO"], id="FIFO"),
    pytest.param(instead(TWO, os.mkdir), [TWO, "regular file", "directory"], id="directory"),
    pytest.param(instead(TWO, make_socket), [TWO, "regular file", "socket"], id="socket"),
    pytest.param(
        instead(TWO, link_to("/dev/zero")), [TWO, "regular file", "device"], id="link to a device"
    ),
    pytest.param(instead(TWO, link_to(".")), [TWO, "directory"], id="link to a directory"),
    pytest.param(instead(TWO, link_to("../gone")), [TWO], id="dangling link"),
    pytest.param(instead(TWO, link_to(TWO)), [TWO], id="link to itself"),
    pytest.param(
        in_turn(lose(INDEX), instead(TWO, os.mkfifo)), [TWO, "FIFO"], id="FIFO without an index"
    ),
    pytest.param(
        in_turn(lose(INDEX), instead(TWO, link_to("../gone"))),
        [TWO],
        id="dangling link without an index",
    ),
    pytest.param(
        lose(INDEX, TWO), ["shards 1 to 2", "no number 2"], id="a shard missing, no index"
    ),
    pytest.param(
        lose(INDEX, ONE), ["shards 1 to 2", "no number 1"], id="the first shard missing, no index"
    ),
    pytest.param(
        in_turn(lose(INDEX, TWO), add_file("vision-00002-of-00002.safetensors", {"z": Z})),
        ["no number 2"],
        id="a shard missing, one of another model beside",
    ),
    pytest.param(
        in_turn(lose(INDEX), add_file("model-00003-of-00003.safetensors", {"z": Z})),
        ["shards"],
        id="shards of two sets, no index",
    ),
    pytest.param(
        in_turn(lose(INDEX), add_file("model.safetensors", {"z": Z})),
        ["model.safetensors", ONE],
        id="both one file and several, no index",
    ),
    pytest.param(lose(INDEX, ONE, TWO), ["no .safetensors file"], id="no weights at all"),
    pytest.param(
        in_turn(lose(INDEX, ONE, TWO), put("pytorch_model.bin", "")),
        ["no .safetensors file", "pytorch_model.bin", "convert"],
        id="other weights only",
    ),
]

CONFIGS = [
    pytest.param(lose("config.json"), ["config.json", "missing"], id="no config"),
    pytest.param(put("config.json", '{"a": '), ["config.json", "broken"], id="broken config"),
    pytest.param(put("config.json", ""), ["config.json", "broken"], id="empty config"),
    pytest.param(put("config.json", "[]"), ["config.json", "object"], id="config that is a list"),
    pytest.param(put("config.json", b"\xff\xfe{}"), ["config.json"], id="config not UTF-8"),
    pytest.param(put("config.json", "[" * 100_000), ["config.json", "deep"], id="config too deep"),
    pytest.param(
        put("config.json", LFS_POINTER), ["config.json", "Git LFS"], id="LFS pointer for the config"
    ),
    pytest.param(
        instead("config.json", os.mkfifo), ["config.json", "regular file"], id="FIFO for a config"
    ),
    pytest.param(
        instead("config.json", os.mkdir),
        ["config.json", "regular file"],
        id="directory for a config",
    ),
    pytest.param(
        instead("config.json", link_to("/dev/zero")),
        ["config.json", "regular file"],
        id="device for a config",
    ),
    pytest.param(
        instead("config.json", link_to("../gone")),
        ["config.json", "missing"],
        id="dangling link for a config",
    ),
]


@pytest.mark.parametrize("command", ["quantize", "inspect"])
@pytest.mark.parametrize(("damage", "words"), [*HEADERS, *TENSORS, *INDEXES, *FILES, *CONFIGS])
def test_a_damaged_checkpoint_is_refused(
    damage: Break, words: list[str], command: str, source: Path, run: Runner
) -> None:
    damage(source)
    before, beside = fingerprint(source), os.listdir(source.parent)
    output = source.parent / "output"
    result = run(command, source, *([output] if command == "quantize" else []))
    assert_one_line(result, words)
    assert fingerprint(source) == before
    assert sorted(os.listdir(source.parent)) == sorted(beside)


def test_the_checkpoint_that_is_damaged_here_is_good(source: Path, run: Runner) -> None:
    assert run("inspect", source).code == 0
    assert run("quantize", source, source.parent / "output").code == 0


NVFP4 = {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "strategy": "group"}}}}

# Refused by quantize alone: `inspect` shows them.
UNFIT = [
    pytest.param(
        config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ["fp8", "128x128"],
        id="block FP8",
    ),
    pytest.param(
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["gptq", "4 bits"],
        id="GPTQ",
    ),
    pytest.param(
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        ["awq"],
        id="AWQ",
    ),
    pytest.param(
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["bitsandbytes"],
        id="bitsandbytes",
    ),
    pytest.param(
        config(quantization_config={"quant_method": "compressed-tensors", **NVFP4}),
        ["compressed-tensors", "float4", "group"],
        id="compressed-tensors",
    ),
    pytest.param(
        config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        ["modelopt", "NVFP4"],
        id="ModelOpt",
    ),
    pytest.param(
        config(
            compression_config={"quant_method": "compressed-tensors", "format": "int-quantized"}
        ),
        ["compressed-tensors", "int-quantized"],
        id="an older compressed-tensors",
    ),
    pytest.param(
        in_turn(
            add_file("extra.safetensors", {"extra.weight": Z.to(torch.float8_e4m3fn)}),
            listed("extra.weight", "extra.safetensors"),
        ),
        ["F8_E4M3", "extra.weight", "not declared"],
        id="FP8 that config.json does not declare",
    ),
    pytest.param(
        in_turn(
            add_file("extra.safetensors", {"extra.qweight": Z.to(torch.int32)}),
            listed("extra.qweight", "extra.safetensors"),
        ),
        ["extra.qweight", "not declared"],
        id="packed weights that config.json does not declare",
    ),
]


@pytest.mark.parametrize(("damage", "words"), UNFIT)
def test_a_quantized_checkpoint_is_refused_by_name_and_yet_inspected(
    damage: Break, words: list[str], source: Path, run: Runner
) -> None:
    damage(source)
    before = fingerprint(source)
    refused = run("quantize", source, source.parent / "output")
    assert_one_line(refused, [str(source), "already quantized", *words])
    assert fingerprint(source) == before
    assert os.listdir(source.parent) == ["source"]
    shown = run("inspect", source, "--json")
    assert shown.code == 0
    document = json.loads(shown.out)
    assert all(word in document["source"]["quantized_as"] for word in words)
    assert document["plan"]["layers_quantized"] == 0


VALUES = [
    pytest.param(float("nan"), id="NaN"),
    pytest.param(float("inf"), id="infinity"),
    pytest.param(float("-inf"), id="minus infinity"),
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("scheme", ["channel", "block", "tensor"])
def test_a_weight_that_is_not_finite_is_refused(
    value: float, scheme: str, tmp_path: Path, run: Runner
) -> None:
    tensors = llama_tensors(hidden=128, inter=256, layers=1, kv=128, vocab=32)
    tensors[TENSOR][3, 5] = tensors[TENSOR][127, 126] = value
    source = write_checkpoint(tmp_path / "source", tensors)
    before = fingerprint(source)
    result = run("quantize", source, tmp_path / "output", "--scheme", scheme)
    assert_one_line(result, ["model.safetensors", TENSOR, "2 of 16384", "[3, 5]"])
    assert fingerprint(source) == before
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("part", ["forward", "training", "_parameters", "__class__", ""])
def test_a_name_that_a_module_holds_otherwise_is_no_trouble(
    part: str, source: Path, run: Runner
) -> None:
    name = f"model.layers.0.{part}.q_proj.weight"
    add_file("extra.safetensors", {name: torch.ones(64, 64)})(source)
    listed(name, "extra.safetensors")(source)
    result = run("quantize", source, source.parent / "output")
    if result.code == 0:  # as good an answer, if the name is kept
        written = (source.parent / "output").glob("*.safetensors")
        assert any(name in load_file(file) for file in written)
    else:
        assert_one_line(result, ["extra.safetensors", name])
        assert os.listdir(source.parent) == ["source"]


@pytest.mark.parametrize("command", ["quantize", "inspect"])
@pytest.mark.parametrize(
    "name", ["a." + "9" * 5000, "model.layers." + "9" * 5000 + ".q_proj.weight", "1" * 5000 + ".a"]
)
def test_a_name_with_a_number_of_5000_digits_is_no_trouble(
    name: str, command: str, source: Path, run: Runner
) -> None:
    add_file("extra.safetensors", {name: torch.ones(64, 64)})(source)
    listed(name, "extra.safetensors")(source)
    result = run(command, source, *([source.parent / "output"] if command == "quantize" else []))
    if result.code:
        assert_one_line(result, ["extra.safetensors"])


def test_names_that_differ_in_a_number_and_a_letter_are_shown(source: Path, run: Runner) -> None:
    add_file("extra.safetensors", {"a.N.b": Z, "a.7.b": Z.clone()})(source)
    for name in ("a.N.b", "a.7.b"):
        listed(name, "extra.safetensors")(source)
    assert run("inspect", source).code == 0


@pytest.mark.parametrize("count", ["99999999999", "9" * 200])
def test_a_shard_that_claims_to_be_one_of_a_great_many_costs_no_memory(
    count: str, source: Path
) -> None:
    lose(INDEX, TWO)(source)
    (source / ONE).rename(source / f"model-00001-of-{count}.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "fp8stream", "inspect", source],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
    )
    assert_one_line(Run(done.returncode, done.stdout, done.stderr), ["no number 2", count])


# SOURCE itself.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("gone", ["gone", "no such file or directory"], id="absent"),
        pytest.param("source/config.json", ["config.json", ".safetensors"], id="another file"),
        pytest.param(f"source/{INDEX}", [INDEX, ".safetensors"], id="the index"),
        pytest.param(f"source/{ONE}/below", ["below", "no such file"], id="below a file"),
        pytest.param("dangling", ["dangling", "no such file"], id="dangling link"),
        pytest.param("pipe.safetensors", ["config.json", "missing"], id="FIFO"),
        pytest.param("source/pipe.safetensors", ["pipe.safetensors", "FIFO"], id="FIFO inside"),
        pytest.param("x" * 300, ["xxx"], id="a name too long"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_source_that_is_no_checkpoint_is_refused(
    name: str, words: list[str], command: str, source: Path, run: Runner
) -> None:
    (source.parent / "dangling").symlink_to("nowhere")
    os.mkfifo(source.parent / "pipe.safetensors")
    os.mkfifo(source / "pipe.safetensors")
    output = [source.parent / "output"] if command == "quantize" else []
    assert_one_line(run(command, source.parent / name, *output), words)
    assert not (source.parent / "output").exists()


# OUTPUT.


def assert_output_refused(
    result: Run, words: Sequence[str], source: Path, before: dict[str, tuple[int, int, str]]
) -> None:
    """`before` is the fingerprint of all of the source's parent: nothing came, went or changed."""
    assert_one_line(result, words)
    assert fingerprint(source.parent) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("source", ["source", "SOURCE itself"], id="equal to SOURCE"),
        pytest.param("./other/../source/", ["SOURCE itself"], id="equal in other words"),
        pytest.param("link", ["SOURCE itself"], id="a link to SOURCE"),
        pytest.param("source/fp8", ["fp8", "inside SOURCE"], id="inside SOURCE"),
        pytest.param("source/a/b/c", ["inside SOURCE"], id="deep inside SOURCE"),
        pytest.param("link/fp8", ["inside SOURCE"], id="inside SOURCE through a link"),
        pytest.param("", ["contains SOURCE"], id="around SOURCE"),
        pytest.param("other", ["other", "exists already", "--overwrite"], id="exists"),
        pytest.param("file", ["file", "found a file"], id="a file"),
        pytest.param("loop", ["loop", "found a link that leads nowhere"], id="a loop of links"),
        pytest.param("pipe", ["pipe", "expected a new or empty directory"], id="a FIFO"),
        pytest.param("file/below", ["below", "not a writable directory"], id="below a file"),
        pytest.param("x" * 300, ["xxx", "too long"], id="a name too long"),
        pytest.param("x" * 250, ["xxx", "too long"], id="a name too long with our suffix"),
    ],
)
def test_a_bad_output_is_refused(name: str, words: list[str], source: Path, run: Runner) -> None:
    root = source.parent
    (root / "link").symlink_to(source)
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text("{}")
    (root / "file").write_text("")
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    before = fingerprint(root)
    assert_output_refused(run("quantize", source, f"{root}/{name}"), words, source, before)


@pytest.mark.parametrize("name", ["source", "source/fp8", "link", ""])
def test_overwrite_does_not_reach_the_source(name: str, source: Path, run: Runner) -> None:
    (source.parent / "link").symlink_to(source)
    before = fingerprint(source.parent)
    result = run("quantize", source, f"{source.parent}/{name}", "--overwrite")
    assert_output_refused(result, ["SOURCE"], source, before)


def test_overwrite_replaces_checkpoints_only(source: Path, run: Runner) -> None:
    precious = source.parent / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    before = fingerprint(source.parent)
    result = run("quantize", source, precious, "--overwrite")
    assert_output_refused(result, ["precious", "thesis.tex"], source, before)


def test_a_file_as_source_is_not_its_own_output(source: Path, run: Runner) -> None:
    lose(INDEX, TWO)(source)
    (source / ONE).rename(source / "model.safetensors")
    before = fingerprint(source.parent)
    result = run("quantize", source / "model.safetensors", source / "model.safetensors")
    assert_output_refused(result, ["model.safetensors", "SOURCE itself"], source, before)
    result = run("quantize", source / "model.safetensors", source, "--overwrite")
    assert_output_refused(result, ["SOURCE itself"], source, before)


@pytest.mark.parametrize("below", ["", "snapshot"])
def test_a_source_where_the_work_would_be_done_is_refused(
    below: str, tmp_path: Path, run: Runner
) -> None:
    source = write_checkpoint(tmp_path / ("model" + WORK_SUFFIX) / below, small_tensors())
    before = fingerprint(tmp_path)
    result = run("quantize", source, tmp_path / "model")
    assert fingerprint(tmp_path) == before, "the source was destroyed"
    assert_one_line(result, ["SOURCE"])


@pytest.mark.parametrize("target", ["source", "precious", "file", "nowhere"])
def test_a_link_where_the_work_would_be_done_is_not_followed(
    target: str, source: Path, run: Runner
) -> None:
    root = source.parent
    (root / "precious").mkdir()
    (root / "precious" / "thesis.tex").write_text("years of work")
    (root / "file").write_text("")
    (root / ("model" + WORK_SUFFIX)).symlink_to(root / target)
    before = {name: fingerprint(root / name) for name in ("source", "precious")}
    result = run("quantize", source, root / "model")
    after = {name: fingerprint(root / name) for name in ("source", "precious")}
    assert after == before, "what the link points to was destroyed"
    if result.code:
        assert_one_line(result, [WORK_SUFFIX])
    else:
        assert not (root / "model").is_symlink()


def test_an_output_in_a_place_that_the_system_keeps_is_refused(source: Path, run: Runner) -> None:
    before = fingerprint(source.parent)
    result = run("quantize", source, "/proc/fp8stream-output")
    assert_output_refused(result, ["/proc/fp8stream-output"], source, before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_directory_without_permission_is_refused(source: Path, run: Runner) -> None:
    locked = source.parent / "locked"
    locked.mkdir(mode=0o555)
    before = fingerprint(source.parent)
    result = run("quantize", source, locked / "output")
    assert_output_refused(result, ["locked", "not a writable directory"], source, before)


def test_a_source_that_vanishes_after_the_plan_is_one_clear_error(
    source: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CheckpointWriter.copy_side_files

    def vanish(self: CheckpointWriter, checkpoint: Checkpoint) -> None:
        real(self, checkpoint)
        source.rename(source.with_name("elsewhere"))

    monkeypatch.setattr(CheckpointWriter, "copy_side_files", vanish)
    result = run("quantize", source, source.parent / "output")
    assert_one_line(result, [str(source), "cannot be read: No such file or directory"])
    assert not (source.parent / "output").exists()


@pytest.mark.parametrize("name", ["fp8stream-recorder", "fp8stream-memory", "fp8stream-1"])
def test_a_thread_that_cannot_start_is_one_clear_error(
    name: str, source: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    result = run("quantize", source, source.parent / "output", "--threads", 2)
    assert_one_line(result, ["can't start new thread", "fewer --threads"])
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_a_disk_too_small_is_refused_before_any_work(
    source: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(source.parent)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 2048, 2048))
    result = run("quantize", source, source.parent / "output")
    assert_output_refused(result, ["output", "disk space", "2.0 KiB"], source, before)


def test_the_disk_space_asked_for_is_what_the_output_takes(
    source: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = source.parent / "output"
    assert run("quantize", source, output).code == 0
    taken = sum(path.stat().st_size for path in output.iterdir() if path.name != "config.json")
    shutil.rmtree(output)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, taken - 1))
    assert run("quantize", source, output).code == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, taken))
    assert run("quantize", source, output).code == 0


# A real small disk. Only root may mount one.


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a RAM disk with the options given; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def call(options: str) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
        mounted = True
        return place

    yield call
    if mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every disk claim to be large."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 60, 0, 1 << 60))


def test_an_output_on_a_read_only_disk_is_refused(
    source: Path, run: Runner, mount: Callable[[str], Path]
) -> None:
    disk = mount("ro")
    before = fingerprint(source)
    result = run("quantize", source, disk / "output")
    assert_one_line(result, [str(disk), "not a writable directory"])
    assert fingerprint(source) == before


def test_a_mount_point_as_output_is_refused(
    source: Path, run: Runner, mount: Callable[[str], Path]
) -> None:
    disk = mount("size=1m")
    assert_one_line(run("quantize", source, disk), [str(disk), "mount point"])
    assert os.listdir(disk) == []


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("size", ["4k", "16k", "32k", "48k"])
def test_a_disk_that_fills_up_midway_leaves_nothing_behind(
    size: str, source: Path, run: Runner, mount: Callable[[str], Path]
) -> None:
    disk = mount(f"size={size}")
    before = fingerprint(source)
    result = run("quantize", source, disk / "output")
    assert_one_line(result, [str(disk / "output"), "disk is full"])
    assert os.listdir(disk) == []
    assert fingerprint(source) == before


@pytest.mark.usefixtures("unlimited")
def test_a_disk_that_fills_up_with_the_last_side_file_leaves_nothing_behind(
    source: Path, run: Runner, mount: Callable[[str], Path]
) -> None:
    (source / "vocab.txt").write_bytes(b"word\n" * 100_000)
    disk = mount("size=256k")
    before = fingerprint(source)
    result = run("quantize", source, disk / "output")
    assert_one_line(result, [str(disk / "output"), "disk is full"])
    assert os.listdir(disk) == []
    assert fingerprint(source) == before


@pytest.mark.usefixtures("unlimited")
def test_a_disk_that_fills_up_leaves_the_old_output_as_it_was(
    source: Path, run: Runner, mount: Callable[[str], Path]
) -> None:
    disk = mount("size=96k")
    assert run("quantize", source, disk / "output").code == 0
    before = fingerprint(disk)
    result = run("quantize", source, disk / "output", "--overwrite")
    assert_one_line(result, ["disk is full"])
    assert fingerprint(disk) == before
