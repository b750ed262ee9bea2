"""What makes a checkpoint: directories, indexes, single files, links, and the files beside them."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8stream import device
from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.errors import CheckpointError
from fp8stream.reader import Reader
from tests.conftest import LLAMA, Run, llama_tensors, write_checkpoint

Runner = Callable[..., Run]
INDEX = "model.safetensors.index.json"


def small_tensors() -> dict[str, torch.Tensor]:
    return llama_tensors(hidden=64, inter=128, layers=1, kv=64, vocab=32)


def assert_holds(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Every tensor once, and its bytes where the checkpoint says that they are."""
    assert sorted(spec.name for spec in checkpoint.tensors) == sorted(tensors)
    for spec in checkpoint.tensors:
        expected = tensors[spec.name]
        assert spec.shape == tuple(expected.shape)
        assert spec.numel == expected.numel()
        assert spec.nbytes == expected.nbytes
        with (checkpoint.directory / spec.file).open("rb") as stream:
            stream.seek(spec.offset)
            found = torch.frombuffer(bytearray(stream.read(spec.nbytes)), dtype=expected.dtype)
        assert torch.equal(found, expected.flatten())


def read_output(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` by name, links followed."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_a_sharded_directory_with_its_index_is_opened(shards: int, tmp_path: Path) -> None:
    tensors = small_tensors()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", tensors, shards))
    assert len(checkpoint.shards) == shards
    assert_holds(checkpoint, tensors)
    assert checkpoint.warnings == ()
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.model_type == "llama"


def test_shards_without_an_index_are_opened(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors, shards=3, index=False)
    checkpoint = open_checkpoint(directory)
    assert len(checkpoint.shards) == 3
    assert_holds(checkpoint, tensors)


def test_files_of_any_name_without_an_index_are_opened_together(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors, shards=2, index=False)
    for number, path in enumerate(sorted(directory.glob("*.safetensors"))):
        path.rename(directory / f"part{number}.safetensors")
    assert_holds(open_checkpoint(directory), tensors)


def test_a_directory_with_one_file_is_opened(tmp_path: Path) -> None:
    tensors = small_tensors()
    assert_holds(open_checkpoint(write_checkpoint(tmp_path / "model", tensors)), tensors)


def test_one_file_is_opened_with_the_config_and_the_side_files_beside_it(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors)
    (directory / "tokenizer.json").write_text("{}")
    save_file({"z": torch.zeros(1)}, directory / "other.safetensors")
    checkpoint = open_checkpoint(directory / "model.safetensors")
    assert_holds(checkpoint, tensors)
    assert checkpoint.config["architectures"] == LLAMA["architectures"]
    assert [side.name for side in checkpoint.side_files] == ["tokenizer.json"]
    assert "other.safetensors" in " ".join(checkpoint.warnings)


def test_an_index_of_another_name_is_found(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors, shards=2)
    (directory / INDEX).rename(directory / "llama.safetensors.index.json")
    assert_holds(open_checkpoint(directory), tensors)


def test_where_there_is_an_index_it_alone_names_the_shards(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors, shards=2)
    (directory / "broken.safetensors").write_bytes(b"nonsense")
    save_file(tensors, directory / "consolidated.safetensors")
    checkpoint = open_checkpoint(directory)
    assert_holds(checkpoint, tensors)
    assert "broken.safetensors" in " ".join(checkpoint.warnings)
    assert "consolidated.safetensors" in " ".join(checkpoint.warnings)


def test_consolidated_files_beside_shards_without_an_index_are_not_read(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors, shards=2, index=False)
    save_file(tensors, directory / "consolidated-00001-of-00001.safetensors")
    save_file(tensors, directory / "consolidated.safetensors")
    checkpoint = open_checkpoint(directory)
    assert_holds(checkpoint, tensors)
    assert "consolidated.safetensors" in " ".join(checkpoint.warnings)


def test_consolidated_files_alone_are_the_checkpoint(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors)
    (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
    assert_holds(open_checkpoint(directory), tensors)


def test_tensors_that_the_index_forgot_are_told(tmp_path: Path) -> None:
    tensors = small_tensors()
    directory = write_checkpoint(tmp_path / "model", tensors, shards=2)
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (directory / INDEX).write_text(json.dumps(index))
    checkpoint = open_checkpoint(directory)
    assert_holds(checkpoint, tensors)
    assert "model.norm.weight" in " ".join(checkpoint.warnings)


@pytest.mark.parametrize(
    ("change", "twice"),
    [
        (lambda text: text.replace('"weight_map":', '"weight_map": {}, "weight_map":'), "weight_m"),
        (lambda text: text.replace('"weight_map":', '"weight_map": "", "weight_map":'), "weight_m"),
        (lambda text: text.replace('"metadata":', '"metadata": 1, "metadata":'), "metadata"),
        (lambda text: text.replace('"total_size":', '"q": {"a": [], "a": {}}, "total":'), "a"),
        (lambda text: text.replace('"model.norm', '"b": "c", "b": "d", "model.norm'), "b"),
        (lambda text: text.replace('"model.norm', '"b": "c", "b": 1, "d": 2, "model.norm'), "b"),
        (lambda text: text.replace('"model.norm', '"b": "c", "\\u0062": "c", "model.norm'), "b"),
        (lambda text: text.replace('"model.norm', '"b": "c", "b": "c", "model.norm') + "}", "b"),
    ],
)
def test_a_key_that_stands_twice_in_an_index_is_refused(
    change: Callable[[str], str], twice: str, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors(), shards=2)
    text = (directory / INDEX).read_text()
    assert change(text) != text
    (directory / INDEX).write_text(change(text))
    with pytest.raises(CheckpointError, match=f"the key '{twice}.* stands twice"):
        open_checkpoint(directory)


def test_an_index_may_be_spelled_with_escapes_and_say_more(tmp_path: Path) -> None:
    tensors = {'a"b': torch.ones(2), "c\\d": torch.ones(3), "é": torch.ones(1)}
    directory = write_checkpoint(tmp_path / "model", tensors, shards=2)
    index = json.loads((directory / INDEX).read_text())
    index["more"] = {"of": ["this", {"and": "that"}, 1.5, None]}
    for indent in (None, 2):
        (directory / INDEX).write_text(json.dumps(index, indent=indent))
        assert_holds(open_checkpoint(directory), tensors)


def test_an_index_that_names_one_tensor_by_another_name_is_refused(tmp_path: Path) -> None:
    """As many tensors as the files hold, but not the same."""
    directory = write_checkpoint(tmp_path / "model", small_tensors(), shards=2)
    index = json.loads((directory / INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.norm.bias"] = file
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.bias'.*found no such tensor"):
        open_checkpoint(directory)


def test_two_files_that_the_index_confuses_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors(), shards=2)
    index = json.loads((directory / INDEX).read_text())
    one, two = sorted(set(index["weight_map"].values()))
    swapped = {name: two if file == one else one for name, file in index["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(CheckpointError, match=f"{two}: tensor .* found it in {one}; the index"):
        open_checkpoint(directory)


def test_a_tensor_in_two_files_is_refused_though_the_index_lists_as_many(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors(), shards=2)
    index = json.loads((directory / INDEX).read_text())
    one, two = sorted(set(index["weight_map"].values()))
    tensors = load_file(directory / two)
    lost = next(iter(tensors))
    tensors[next(iter(load_file(directory / one)))] = tensors.pop(lost)
    save_file(tensors, directory / two)
    with pytest.raises(CheckpointError, match=f"{two}: tensor .* stands in {one} too"):
        open_checkpoint(directory)


def test_forty_thousand_tensors_in_files_that_are_holes_are_opened_at_once(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "scripts" / "make_sparse.py"
    sizes = ["--layers", "14", "--experts", "1000", "--files", "9"]
    subprocess.run([sys.executable, script, tmp_path / "big", *sizes], check=True)
    start = time.process_time()
    checkpoint = open_checkpoint(tmp_path / "big")
    assert time.process_time() - start < 2
    assert checkpoint.warnings == ()
    assert len(checkpoint.tensors) == 3 + 3 + 14 * 9 + 13 * (2 + 3 + 3000)
    assert checkpoint.parameters == sum(math.prod(spec.shape) for spec in checkpoint.tensors)
    assert 2 * checkpoint.parameters < sum(shard.size for shard in checkpoint.shards)


def test_no_tensor_data_is_touched(tmp_path: Path, run: Runner) -> None:
    """A checkpoint of two terabytes, all of it holes: reading them would take an hour."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    header = json.dumps(
        {
            "model.layers.0.mlp.up_proj.weight": {
                "dtype": "BF16",
                "shape": [2**20, 2**19],
                "data_offsets": [0, 2**40],
            }
        }
    ).encode()
    for number in (1, 2):
        path = directory / f"model-0000{number}-of-00002.safetensors"
        shard_header = header.replace(b"layers.0", b"layers.%d" % (number - 1))
        path.write_bytes(len(header).to_bytes(8, "little") + shard_header)
        os.truncate(path, 8 + len(header) + 2**40)
    start = time.perf_counter()
    result = run("inspect", directory, "--json")
    assert time.perf_counter() - start < 5
    assert json.loads(result.out)["source"]["bytes"] == 2 * 2**40


def test_the_headers_agree_with_the_reference_on_every_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", small_tensors(), shards=3))
    for shard in checkpoint.shards:
        with safe_open(checkpoint.directory / shard.name, framework="pt") as opened:
            assert {tensor.name for tensor in shard.tensors} == set(opened.keys())


# Links, as the hub's cache lays snapshots out.


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A checkpoint as `hf download` leaves it in the cache: links to blobs."""
    plain = write_checkpoint(tmp_path / "plain", small_tensors(), shards=2)
    (plain / "tokenizer.json").write_text('{"version": "1.0"}')
    (plain / "sub").mkdir()
    (plain / "sub" / "config.json").write_text("{}")
    repository = tmp_path / "hub" / "models--org--name"
    directory = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    (directory / "sub").mkdir(parents=True)
    for number, (name, content) in enumerate(read_output(plain).items()):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        (directory / name).symlink_to(os.path.relpath(blob, (directory / name).parent))
    return directory


def test_a_snapshot_of_links_gives_the_output_of_the_files_themselves(
    snapshot: Path, tmp_path: Path, run: Runner
) -> None:
    assert run("quantize", tmp_path / "plain", tmp_path / "one").code == 0
    result = run("quantize", snapshot, tmp_path / "two")
    assert result.code == 0, result
    assert read_output(tmp_path / "one") == read_output(tmp_path / "two")
    assert not any(path.is_symlink() for path in (tmp_path / "two").rglob("*"))
    assert (tmp_path / "two" / "sub" / "config.json").read_text() == "{}"


def test_a_snapshot_is_found_through_a_link_to_its_directory(
    snapshot: Path, tmp_path: Path
) -> None:
    (tmp_path / "main").symlink_to(snapshot)
    assert_holds(open_checkpoint(tmp_path / "main"), small_tensors())


def test_one_file_of_a_snapshot_has_the_config_of_the_snapshot(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", small_tensors())
    directory = tmp_path / "snapshots"
    (tmp_path / "blobs").mkdir()
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (plain / name).rename(tmp_path / "blobs" / name[:6])
        (directory / name).symlink_to(f"../blobs/{name[:6]}")
    assert_holds(open_checkpoint(directory / "model.safetensors"), small_tensors())


def test_an_output_inside_the_cache_but_outside_the_snapshot_is_no_trouble(
    snapshot: Path, run: Runner
) -> None:
    assert run("quantize", snapshot, snapshot.parent / "fp8").code == 0


def test_a_link_to_a_directory_above_is_not_followed(tmp_path: Path, run: Runner) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors())
    (directory / "loop").symlink_to(".")
    (directory / "up").symlink_to("..")
    result = run("quantize", directory, tmp_path / "output")
    assert result.code == 0
    assert "loop/" in result.err
    assert "up/" in result.err
    assert set(read_output(tmp_path / "output")) == {"config.json", "model.safetensors"}


# Side files.

COPIED = {
    "README.md": "# a model",
    "LICENSE": "MIT",
    ".gitattributes": "*.safetensors filter=lfs",
    "tokenizer.json": "{}",
    "tokenizer.model": "\0sentencepiece",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": "{}",
    "preprocessor_config.json": "{}",
    "modeling_custom.py": "import torch",
    "figures/accuracy.png": "\x89PNG",
    "chat_templates/tools/default.jinja": "{{ tools }}",
    "1_Pooling/config.json": "{}",
    "empty.txt": "",
}
LEFT = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.00.pth"),
    *("consolidated.safetensors", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx"),
    *("onnx/model.onnx_data", "original/consolidated.00.pth", "original/params.json"),
    *("original/tokenizer.model", "checkpoint.pt", "sub/model.safetensors", "rust_model.ot"),
]
UNSEEN = [".git/config", ".cache/huggingface/download/config.json.metadata"]


def test_side_files_are_copied_and_other_weights_are_not(tmp_path: Path, run: Runner) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors(), shards=2)
    for name in [*COPIED, *LEFT, *UNSEEN]:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(COPIED.get(name, name).encode())
    result = run("quantize", directory, tmp_path / "output")
    assert result.code == 0
    output = read_output(tmp_path / "output")
    assert set(output) == {*COPIED, "config.json", "model.safetensors"}
    assert {name: output[name] for name in COPIED} == {k: v.encode() for k, v in COPIED.items()}
    assert "not copied" in result.err
    assert "original/" in result.err or "..." in result.err


@pytest.mark.parametrize("name", [n for n in LEFT if not n.startswith("original/")])
def test_a_weight_that_is_not_copied_is_named(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors(), shards=2)
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(b"")
    (warning,) = open_checkpoint(directory).warnings
    assert name in warning


@pytest.mark.parametrize("below", ["", "sub"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_directory_that_cannot_be_listed_loses_no_side_file_in_silence(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, below: str, code: int
) -> None:
    """One below that we may not look into is left, with a warning."""
    source = write_checkpoint(tmp_path / "in", llama_tensors())
    (source / "tokenizer.json").write_text("{}")
    (source / "sub").mkdir()
    real = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path) == source / below:
            raise OSError(code, os.strerror(code), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    done = run("quantize", source, tmp_path / "out")
    if below and code == errno.EACCES:
        assert (done.code, "not copied to the output: sub/" in done.err) == (0, True), done
    else:
        assert (done.code, len(done.err.splitlines())) == (1, 1), done
        assert f"{source / below}: cannot be read: {os.strerror(code)}" in done.err


def test_the_old_index_is_not_copied(tmp_path: Path, run: Runner) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors(), shards=2)
    assert run("quantize", directory, tmp_path / "output").code == 0
    assert set(read_output(tmp_path / "output")) == {"config.json", "model.safetensors"}
    assert run("quantize", directory, tmp_path / "many", "--max-shard-size", "50kB").code == 0
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    names = {f for f in read_output(tmp_path / "many") if f.endswith(".safetensors")}
    assert set(index["weight_map"].values()) == names
    assert len(names) > 1


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("gone")])
def test_a_side_file_that_is_no_file_is_left_with_a_warning(
    make: Callable[[Path], None], tmp_path: Path, run: Runner
) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors())
    make(directory / "vocab.txt")
    result = run("quantize", directory, tmp_path / "output")
    assert result.code == 0
    assert "vocab.txt" in result.err
    assert not (tmp_path / "output" / "vocab.txt").exists()


def test_a_side_file_that_is_a_git_lfs_pointer_is_not_passed_over(
    tmp_path: Path, run: Runner
) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors())
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 17209530\n"
    (directory / "tokenizer.json").write_text(pointer)
    result = run("quantize", directory, tmp_path / "output")
    assert "tokenizer.json" in result.err
    assert "Git LFS" in result.err


def test_names_that_are_not_utf_8_go_along(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors())
    (directory / "caf\udce9.txt").write_text("au lait")
    (directory / "model.safetensors").rename(directory / "mod\udce9l.safetensors")
    output = tmp_path / "th\udce9"
    for arguments in (("inspect",), ("inspect", "--tensors"), ("quantize", output)):
        command = [sys.executable, "-m", "fp8stream", arguments[0], directory, *arguments[1:]]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0, done
    assert done.stdout == os.fsencode(output) + b"\n"
    assert (output / "caf\udce9.txt").read_text() == "au lait"


# config.json.


def test_a_config_with_infinity_in_it_is_kept(tmp_path: Path, run: Runner) -> None:
    """As Mamba models have it: Python writes and reads `Infinity`, and so does transformers."""
    config = {**LLAMA, "time_step_limit": [0.0, float("inf")]}
    directory = write_checkpoint(tmp_path / "model", small_tensors(), config=config)
    assert run("quantize", directory, tmp_path / "output").code == 0
    written = json.loads((tmp_path / "output" / "config.json").read_text())
    assert written["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": None, "model_type": None},
        {"architectures": [], "model_type": 3},
        {"architectures": "Llama", "num_hidden_layers": "2"},
        {"architectures": [None], "text_config": [], "quantization_config": None},
        {"num_hidden_layers": None, "text_config": None, "quantization_config": {}},
        {"name": "\ud800 \0 \x1b[31m", "deep": [[[[{}]]]], "big": 10**400},
    ],
    ids=str,
)
def test_a_strange_config_goes_along_as_it_is(
    config: dict[str, Any], tmp_path: Path, run: Runner
) -> None:
    directory = write_checkpoint(tmp_path / "model", small_tensors())
    (directory / "config.json").write_text(json.dumps(config))
    assert run("inspect", directory).code == 0
    result = run("quantize", directory, tmp_path / "output")
    assert result.code == 0, result
    written = json.loads((tmp_path / "output" / "config.json").read_text())
    written.pop("quantization_config")
    assert written == {k: v for k, v in config.items() if k != "quantization_config"}


QUANTIZED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8, blocks of 128x128"),
    ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
    ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "awq, 4 bits"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"quant_method": "mxfp4"}, "mxfp4"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
    ({"bits": 8}, "an unnamed method, 8 bits"),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "g": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
            },
        },
        "compressed-tensors, float-quantized, float8 channel",
    ),
    ({"quant_method": "compressed-tensors", "config_groups": [1]}, "compressed-tensors"),
    ({"quant_method": ["odd"], "config_groups": {"g": {"weights": None}}}, "['odd']"),
]


@pytest.mark.parametrize(("declared", "words"), QUANTIZED, ids=[words for _, words in QUANTIZED])
def test_what_it_is_quantized_as_is_told_in_words(
    declared: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = {**LLAMA, "quantization_config": declared}
    directory = write_checkpoint(tmp_path / "model", small_tensors(), config=config)
    assert open_checkpoint(directory).quantized_as == words


def test_a_plain_checkpoint_is_not_called_quantized(llama: Path) -> None:
    assert open_checkpoint(llama).quantized_as is None


@pytest.mark.parametrize(
    "options", [["--scheme", "channel"], ["--scheme", "block", "--format", "fp8"]]
)
def test_our_own_output_is_recognised_and_refused(
    options: list[str], llama: Path, tmp_path: Path, run: Runner
) -> None:
    assert run("quantize", llama, tmp_path / "once", *options).code == 0
    assert open_checkpoint(tmp_path / "once").quantized_as
    assert run("inspect", tmp_path / "once").code == 0
    again = run("quantize", tmp_path / "once", tmp_path / "twice")
    assert again.code == 1
    assert "already quantized" in again.err
    assert not (tmp_path / "twice").exists()


# A SOURCE that is a name on the hub.


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("https://huggingface.co/meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("https://huggingface.co/meta-llama/Llama-3.1-8B/", "meta-llama/Llama-3.1-8B"),
        ("https://huggingface.co/org/name.v2/tree/main", "org/name.v2"),
        ("https://huggingface.co/org/name/blob/main/config.json", "org/name"),
        ("https://huggingface.co/org/name/resolve/main/model.safetensors", "org/name"),
        ("https://huggingface.co/org/name?library=transformers", "org/name"),
        ("huggingface.co/org/name", "org/name"),
        ("hf://org/name", "org/name"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_hub_id_or_url_as_source_gives_the_command_to_download_it(
    source: str, name: str, command: str, tmp_path: Path, run: Runner
) -> None:
    output = [tmp_path / "output"] if command == "quantize" else []
    result = run(command, source, *output)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert f"hf download {name} --local-dir {name.rpartition('/')[2]}" in result.err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("source", ["./org/name", "/org/name", "../name", "name", "a/b/c"])
def test_a_local_path_that_is_absent_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert "hf download" not in str(caught.value)


def test_a_directory_named_like_a_hub_id_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "org" / "name", small_tensors())
    monkeypatch.chdir(tmp_path)
    assert_holds(open_checkpoint("org/name"), small_tensors())


# Changes while a run goes on.


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What to do between the plan and the first read of data."""
    actions: list[Callable[[], None]] = []
    warm_up = device.warm_up

    def act_then_warm_up(devices: Sequence[torch.device]) -> None:
        for action in actions:
            action()
        warm_up(devices)

    monkeypatch.setattr(device, "warm_up", act_then_warm_up)
    return actions


@pytest.mark.parametrize("how", ["shrinks", "grows", "is replaced", "vanishes"])
def test_a_file_that_changes_after_the_plan_is_refused(
    how: str, planned: list[Callable[[], None]], tmp_path: Path, run: Runner
) -> None:
    source = write_checkpoint(tmp_path / "model", small_tensors())
    file = source / "model.safetensors"

    def change() -> None:
        content = file.read_bytes()
        if how in ("vanishes", "is replaced"):
            file.unlink()
        if how != "vanishes":
            file.write_bytes({"shrinks": content[:-1], "grows": content + b"\0"}.get(how, content))
            os.utime(file, (1, 1))

    planned.append(change)
    result = run("quantize", source, tmp_path / "output")
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert "model.safetensors" in result.err
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_that_became_a_fifo_after_the_plan_is_refused_at_once(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", small_tensors())
    reader = Reader(source, open_checkpoint(source).shards)
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")

    def ring(number: int, frame: FrameType | None) -> NoReturn:
        pytest.fail("waits for whoever writes to the FIFO")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        with (
            pytest.raises(CheckpointError, match=r"model\.safetensors"),
            reader.open("model.safetensors"),
        ):
            pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_side_file_that_vanishes_after_the_plan_is_refused(
    planned: list[Callable[[], None]], tmp_path: Path, run: Runner
) -> None:
    source = write_checkpoint(tmp_path / "model", small_tensors())
    (source / "tokenizer.json").write_text("{}")
    planned.append((source / "tokenizer.json").unlink)
    result = run("quantize", source, tmp_path / "output")
    assert result.code == 1
    assert "tokenizer.json" in result.err
    assert os.listdir(tmp_path) == ["model"]


def test_a_copy_of_the_checkpoint_gives_the_same_output(
    llama: Path, tmp_path: Path, run: Runner
) -> None:
    """Nothing of a file's place or time gets into the output."""
    shutil.copytree(llama, tmp_path / "copy")
    assert run("quantize", llama, tmp_path / "one").code == 0
    assert run("quantize", tmp_path / "copy", tmp_path / "two").code == 0
    assert read_output(tmp_path / "one") == read_output(tmp_path / "two")
    assert load_file(tmp_path / "one" / "model.safetensors")
