"""A checkpoint is its headers: everything about it is known before any data is read.

A directory with an index, shards without one, or a single file; the config and the side files
beside them. Names that come from an index are hostile until checked. No torch, no tensor data.
"""

import json
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fp8stream.errors import CheckpointError
from fp8stream.header import (
    LFS_ADVICE,
    LFS_POINTER,
    MAX_HEADER_BYTES,
    Shard,
    TensorSpec,
    is_unicode,
    open_regular,
    parse_json,
    read_at_most,
    read_shard,
    reading,
    shorten,
    show,
)

INDEX_SUFFIX = ".safetensors.index.json"
DEFAULT_INDEX = "model" + INDEX_SUFFIX
# Ten million tensors.
_MAX_INDEX_BYTES = 10 * MAX_HEADER_BYTES
# No config of a model has a third of these; it is written with an indent, whose blanks would be
# many times the file where it is nested to the limit of the parser.
_DEEPEST_CONFIG = 32

_OTHER_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pth?|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|tflite|ot|npz|llamafile)$"
    r"|\.(bin|safetensors)\.index\.json$",
    re.IGNORECASE,  # as some file systems are, on which it would stand where ours is to
)
# What ends the name of the directory in which a run makes its output.
WORK_SUFFIX = ".fp8stream-partial"
_SKIPPED_DIRECTORIES = {".git", ".cache", "original"}
_SHARD_NUMBER = re.compile(r"-([0-9]{5,})-of-([0-9]{5,})\.safetensors$")


@dataclass(frozen=True)
class SideFile:
    """A file that is copied as bytes; `name` is relative to the checkpoint's directory."""

    name: str
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers, config and side files. `directory` holds all of them."""

    path: Path
    directory: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    side_files: tuple[SideFile, ...] = ()
    warnings: tuple[str, ...] = ()
    tensors: tuple[TensorSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        every = chain.from_iterable(shard.tensors for shard in self.shards)
        object.__setattr__(self, "tensors", tuple(every))

    @property
    def file_names(self) -> tuple[str, ...]:
        """Every file that is read, shards and side files, relative to `directory`."""
        return (*(shard.name for shard in self.shards), *(side.name for side in self.side_files))

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Tensor bytes under each of the dtypes that occur, in the order of their first tensor."""
        sizes: dict[str, int] = defaultdict(int)
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.nbytes
        return dict(sizes)

    @property
    def model_type(self) -> str | None:
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None

    @cached_property
    def quantized_as(self) -> str | None:
        """What the checkpoint is already quantized as, in words, or None."""
        return _quantized_as(self.config, self.tensors)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Reads the headers of the checkpoint at `path`: a directory or one `.safetensors` file.

    Raises CheckpointError for anything that is not a whole checkpoint, naming file and tensor.
    """
    source = Path(path)
    single = _is_one_file(source, str(path))
    with reading(source):
        return _open(source, single)


def open_weights(path: str | Path, config: Mapping[str, Any]) -> Checkpoint:
    """As `open_checkpoint`, but only for the weights: of what lies beside them nothing is looked at
    but a config.json, instead of which there may be `config`."""
    source = Path(path)
    single = _is_one_file(source, str(path))
    with reading(source):
        directory = source.parent if single else source
        there = (directory / "config.json").exists()
        shards, _ = _open_shards(source, single)
        found = _read_config(directory) if there else config
        return Checkpoint(source, directory, found, shards)


def _open(source: Path, single: bool) -> Checkpoint:
    directory = source.parent if single else source
    config = _read_config(directory)
    shards, warnings = _open_shards(source, single)
    names = {shard.name for shard in shards}
    side_files = _find_side_files(directory, names, warnings, recursive=not single)
    return Checkpoint(source, directory, config, shards, side_files, tuple(warnings))


def _open_shards(source: Path, single: bool) -> tuple[tuple[Shard, ...], list[str]]:
    """The shards, and what is to be said of them."""
    directory = source.parent if single else source
    warnings: list[str] = []
    if single:
        names, weight_map = [source.name], None
    else:
        names, weight_map = _find_shards(directory, warnings)
    shards = tuple(read_shard(directory / name) for name in names)
    if weight_map is None or not _is_as_listed(shards, weight_map):
        owners = _find_owners(shards)
        if weight_map is not None:
            _check_weight_map(directory, weight_map, owners, warnings)
    return shards, warnings


@dataclass(frozen=True)
class Fault:
    """What is wrong with a file of a checkpoint; `file` is empty where it is all of them."""

    file: str
    message: str


def open_damaged(path: str | Path) -> tuple[Checkpoint, tuple[Fault, ...]]:
    """As `open_checkpoint`, of a directory that may be damaged: what can be read of it, and what
    cannot, file by file.

    Raises CheckpointError where there is no directory, or nothing like a checkpoint in it.
    """
    try:
        return open_checkpoint(path), ()
    except CheckpointError as error:
        first = error
    directory = Path(path)
    with reading(directory):
        if not os.path.isdir(directory) or not _weight_files(directory):
            raise first
        return _open_damaged(directory, first)


def _open_damaged(directory: Path, first: CheckpointError) -> tuple[Checkpoint, tuple[Fault, ...]]:
    """As `open_damaged`; `first` is what a whole one failed at. Raises OSError as well."""
    faults: list[Fault] = []
    config: Mapping[str, Any] = {}
    shards: list[Shard] = []
    try:
        config = _read_config(directory)
    except CheckpointError as error:
        faults.append(Fault("config.json", str(error)))
    files = _weight_files(directory)
    for file in files:
        try:
            shards.append(read_shard(file))
        except CheckpointError as error:
            faults.append(Fault(file.name, str(error)))
    faults += [Fault(name, f"{directory / name}: missing") for name in _lost(files)]
    indexes = sorted(file.name for file in directory.iterdir() if file.name.endswith(INDEX_SUFFIX))
    if not faults:
        faults.append(Fault(indexes[0] if indexes else "", str(first)))
    names = {file.name for file in files}
    side_files = _find_side_files(directory, names, [], recursive=True)
    return Checkpoint(directory, directory, config, tuple(shards), side_files), tuple(faults)


_MOST_FILES = 10_000


def _weight_files(directory: Path) -> list[Path]:
    """Its safetensors files. Raises OSError, where `glob` would find none."""
    return sorted(path for path in directory.iterdir() if path.name.endswith(".safetensors"))


def _lost(files: Sequence[Path]) -> Iterator[str]:
    """The files that others of the same numbered set tell of, and that are not there."""
    for file in files:
        number = _SHARD_NUMBER.search(file.name)
        if number and int(number[2]) <= _MOST_FILES:
            prefix, total = _SHARD_NUMBER.sub("", file.name), number[2]
            width = len(number[1])
            every = (f"{n:0{width}d}-of-{total}.safetensors" for n in range(1, int(total) + 1))
            names = (f"{prefix}-{numbers}" for numbers in every)
            yield from (name for name in names if not file.with_name(name).exists())
            return


def _is_one_file(source: Path, given: str) -> bool:
    """Whether `source` is one file, not a directory. Raises CheckpointError where it is neither."""
    try:
        mode = os.stat(source).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(_absent(given)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shorten(given)}: cannot be read: {error}") from error
    if stat.S_ISDIR(mode):
        return False
    if source.suffix != ".safetensors":
        raise CheckpointError(
            f"{source}: neither a checkpoint directory nor a .safetensors file; "
            "give the directory that holds config.json"
        )
    if (number := _SHARD_NUMBER.search(source.name)) and int(number[2]) > 1:
        raise CheckpointError(
            f"{source}: one shard of {int(number[2])}, not a whole checkpoint; give the directory"
        )
    return True


def _is_as_listed(shards: Sequence[Shard], weight_map: Mapping[str, str]) -> bool:
    """Whether the files hold what the index lists and no more: then no name stands in two."""
    count = sum(len(shard.tensors) for shard in shards)
    return count == len(weight_map) and all(
        {weight_map.get(tensor.name) for tensor in shard.tensors} == {shard.name}
        for shard in shards
    )


def _find_owners(shards: Sequence[Shard]) -> dict[str, str]:
    """The file of every tensor. Raises CheckpointError for a tensor that stands in two."""
    owners: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in owners:
                raise CheckpointError(
                    f"{shard.name}: tensor {show(tensor.name)} stands in {owners[tensor.name]} "
                    "too; remove the file that does not belong to the checkpoint"
                )
            owners[tensor.name] = shard.name
    return owners


def _find_shards(
    directory: Path, warnings: list[str]
) -> tuple[list[str], Mapping[str, str] | None]:
    """File names of the checkpoint in `directory`, and the index's weight_map if it has one."""
    indexes = sorted(p.name for p in directory.iterdir() if p.name.endswith(INDEX_SUFFIX))
    if DEFAULT_INDEX in indexes:
        indexes = [DEFAULT_INDEX]
    if len(indexes) > 1:
        raise CheckpointError(
            f"{directory}: expected one index, found {', '.join(indexes)}; give one .safetensors "
            "file, or remove the index that does not belong"
        )
    if indexes:
        weight_map = _read_weight_map(directory / indexes[0])
        return sorted(set(weight_map.values())), weight_map
    return _shards_without_index(directory, warnings), None


def _shards_without_index(directory: Path, warnings: list[str]) -> list[str]:
    found = sorted(p.name for p in directory.iterdir() if p.name.endswith(".safetensors"))
    if not found:
        others = sorted(p.name for p in directory.iterdir() if _OTHER_WEIGHTS.search(p.name))
        raise CheckpointError(
            f"{directory}: no .safetensors file in it"
            + (f", only {', '.join(others[:3])}; convert it to safetensors first" if others else "")
        )
    numbered: dict[str, list[str]] = defaultdict(list)
    for name in found:
        prefix = _SHARD_NUMBER.sub("", name)
        if prefix not in (name, "consolidated"):
            numbered[prefix].append(name)
    single = [name for name in found if name == "model.safetensors"]
    models = [names for names in (single, numbered.get("model", [])) if names]
    models = models or list(numbered.values())
    if len(models) > 1:
        raise CheckpointError(
            f"{directory}: {models[0][0]} and {models[1][0]}, and no index to tell which is the "
            "model; give one file as SOURCE, or remove the other"
        )
    if models:
        names = models[0]
        if names != single:
            _check_numbers(directory, names)
    else:
        names = [n for n in found if not n.startswith("consolidated")] or found
    unread = [name for name in found if name not in names]
    if unread:
        warnings.append(f"not part of the checkpoint, not read: {', '.join(unread)}")
    return names


def _check_numbers(directory: Path, names: Sequence[str]) -> None:
    """Refuses a set of -00001-of-00005 files that lacks one: a download that was cut short."""
    numbers = [match for name in names if (match := _SHARD_NUMBER.search(name))]
    totals = sorted({int(match[2]) for match in numbers})
    found = sorted(int(match[1]) for match in numbers)
    first = min(found[0], 1)  # some count from zero
    expected = range(first, totals[-1] + first)
    missing = next((n for n, m in zip(expected, [*found, -1], strict=False) if n != m), None)
    if len(totals) > 1 or missing is not None:
        raise CheckpointError(
            f"{directory}: expected shards {first} to {expected[-1]}, found {len(names)} files"
            + (f" of sets of {totals}" if missing is None else f", no number {missing}")
            + "; download the rest"
        )


def _read_weight_map(path: Path) -> Mapping[str, str]:
    index = _parse_index(_read_bytes(path, _MAX_INDEX_BYTES), f"{path}: bad index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: bad index: expected a weight_map with tensors in it")
    good: set[str] = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or file not in good:
            _check_listed(path, name, file)
            good.add(file)
    return weight_map


def _parse_index(data: bytes, where: str) -> Any:
    """As `parse_json`, which holds every pair of a large index where it looks for keys twice."""
    with suppress(CheckpointError, RecursionError):
        index = parse_json(data, where, unique=False)
        if _has_all(index, data):
            return index
    return parse_json(data, where)


def _has_all(index: Any, data: bytes) -> bool:
    """Whether it is plain that no key of `data` stands twice, which would have lost a string."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} != {str}:
        return False
    rest = json.dumps({**index, "weight_map": None})
    # Without escapes every quote bounds a string: a name and a file for each tensor.
    quotes = rest.count('"') + 4 * len(weight_map)
    return b"\\" not in data and data.count(b'"') == quotes


def _check_listed(index: Path, name: str, file: object) -> None:
    """Refuses a `file` that is none, or none beside the index, which lists it for tensor `name`."""
    where = f"{index}: tensor {show(name)}"
    if not isinstance(file, str) or not _is_plain_name(file):
        raise CheckpointError(
            f"{where}: expected the name of a .safetensors file in the same directory, found "
            f"{show(file)}"
        )
    if not os.path.lexists(index.with_name(file)):
        raise CheckpointError(
            f"{where}: expected in {shorten(file)}, found no such file; download it"
        )


def _is_plain_name(file: str) -> bool:
    """Whether `file` names something directly in the directory, on any system's reading of it."""
    plain = len(file) < 256 and is_unicode(file) and not re.search(r"[/\\:\x00-\x1f]", file)
    return plain and file.endswith(".safetensors")


def _check_weight_map(
    directory: Path, weight_map: Mapping[str, str], owners: Mapping[str, str], warnings: list[str]
) -> None:
    for name, file in weight_map.items():
        if owners.get(name) != file:
            found = f"it in {owners[name]}" if name in owners else "no such tensor"
            raise CheckpointError(
                f"{directory / file}: tensor {show(name)}: expected in this file by the index, "
                f"found {found}; the index and the files are not of one checkpoint"
            )
    unlisted = [name for name in owners if name not in weight_map]
    if unlisted:
        warnings.append(
            f"{len(unlisted)} tensors are in the files but not in the index, such as "
            f"{shorten(unlisted[0])}"
        )


def _read_config(directory: Path) -> Mapping[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path}: missing; a checkpoint needs the config.json that it was published with"
        )
    config = parse_json(_read_bytes(path, MAX_HEADER_BYTES), f"{path}: broken", strict=False)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: broken: expected a JSON object")
    if _is_deeper(config, _DEEPEST_CONFIG):
        raise CheckpointError(f"{path}: broken: nested too deep, over {_DEEPEST_CONFIG} levels")
    return config


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than so many levels."""
    level = [value]
    for _ in range(levels + 1):
        level = [inner for outer in level for inner in _held(outer)]
    return bool(level)


def _held(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _read_bytes(path: Path, limit: int) -> bytes:
    """The file as large as it is found to be: what grows meanwhile is not run after."""
    with reading(path), open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise CheckpointError(
                f"{path}: too large: expected at most {limit} bytes, found {size}"
            )
        return read_at_most(stream, size)


def _find_side_files(
    directory: Path, shards: set[str], warnings: list[str], recursive: bool
) -> tuple[SideFile, ...]:
    """Everything beside the weights that goes along as it is.

    What lies in directories beside a single file need not belong to it, so that is left alone.
    """
    copied: list[SideFile] = []
    left: list[str] = []
    outside: list[str] = []
    for path in files_below(directory, left) if recursive else _files(directory):
        name = str(path.relative_to(directory))
        if name in shards or name == "config.json" or name.endswith(INDEX_SUFFIX):
            continue
        if _is_left(name) or not path.is_file():
            left.append(name)
        else:
            copied.append(SideFile(name, path.stat().st_size))
            if path.is_symlink() and not _is_beside(path, directory):
                outside.append(f"{name} -> {os.path.realpath(path)}")
            if _is_pointer(path):
                warnings.append(f"{name}: {LFS_ADVICE}; it is copied as it is")
    if left:
        warnings.append(f"not copied to the output: {_some(left)}")
    if outside:
        warnings.append(f"copied from outside the checkpoint, through links: {_some(outside)}")
    return tuple(sorted(copied, key=lambda file: file.name))


def _is_left(name: str) -> bool:
    """Whether a file or directory holds other weights, or is what an unfinished run left."""
    return bool(_OTHER_WEIGHTS.search(name)) or name.endswith(WORK_SUFFIX)


def _is_beside(path: Path, directory: Path) -> bool:
    """Whether a link leads to a file of the checkpoint: in it, or a blob of the hub's cache."""
    target = Path(os.path.realpath(path))
    return target.parent.name == "blobs" or Path(os.path.realpath(directory)) in target.parents


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


def _is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer; one that cannot be read is not known to be."""
    with suppress(OSError, CheckpointError), open_regular(path) as stream:
        small = os.fstat(stream.fileno()).st_size < 1024
        return small and read_at_most(stream, len(LFS_POINTER)) == LFS_POINTER
    return False


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.iterdir() if not path.is_dir())


def files_below(directory: Path, left: list[str]) -> Iterator[Path]:
    """Files below `directory`; what is not looked into comes to be `left`.

    A link to a directory is not followed, so that no loop can form. One that may not be looked into
    is left; raises CheckpointError where one cannot be listed for another reason.
    """

    def leave(error: OSError) -> None:
        path = Path(error.filename)
        if path == directory or not isinstance(error, PermissionError):
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        left.append(f"{path.relative_to(directory)}/")

    for root, folders, files in os.walk(directory, onerror=leave):
        for folder in list(folders):
            path = Path(root) / folder
            if folder in _SKIPPED_DIRECTORIES or path.is_symlink() or _is_left(folder):
                folders.remove(folder)
                if folder not in {".git", ".cache"}:
                    left.append(f"{path.relative_to(directory)}/")
        yield from (Path(root) / name for name in files)


def _quantized_as(config: Mapping[str, Any], tensors: Sequence[TensorSpec]) -> str | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        declared = part.get("quantization_config") or part.get("compression_config")
        if declared:
            known = isinstance(declared, dict)
            return _describe_quantization(declared) if known else "something not recognised"
    for tensor in tensors:
        if tensor.dtype.startswith(("F8_", "F4", "F6_")):
            weights = f"{tensor.dtype} weights such as {shorten(tensor.name)}"
            return f"{weights}, not declared in config.json"
        if tensor.name.endswith((".qweight", ".weight_packed", ".weight_scale_inv")):
            return f"packed weights such as {shorten(tensor.name)}, not declared in config.json"
    return None


def _describe_quantization(declared: Mapping[str, Any]) -> str:
    return shorten(", ".join(_words_of(declared)))


def _words_of(declared: Mapping[str, Any]) -> list[str]:
    words = [str(declared.get("quant_method", "an unnamed method"))]
    if declared.get("format"):
        words.append(str(declared["format"]))
    if declared.get("quant_algo"):
        words.append(str(declared["quant_algo"]))
    if isinstance(declared.get("weight_block_size"), list):
        words.append("blocks of " + "x".join(map(str, declared["weight_block_size"])))
    elif declared.get("bits"):
        words.append(f"{declared['bits']} bits")
    groups = declared.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            kind = f"{weights.get('type')}{weights.get('num_bits')}"
            words.append(f"{kind} {weights.get('strategy')}")
    return words


def _absent(path: str) -> str:
    """What to say of a SOURCE that is not there: perhaps it is the name of a model on the hub."""
    hub = re.fullmatch(
        r"(?:https?://[^/]+/|hf://|huggingface\.co/)?([\w.-]+/[\w.-]+)"
        r"(?:/(?:tree|blob|resolve)/.*)?/?(?:\?.*)?",
        path,
    )
    if hub and not path.startswith((".", "/")):
        name = hub[1].rpartition("/")[2]
        return (
            f"{path}: no such file or directory; fp8stream reads local checkpoints: if this is a "
            f"model on the hub, run 'hf download {hub[1]} --local-dir {name}' and give {name}"
        )
    return f"{shorten(path)}: no such file or directory"
