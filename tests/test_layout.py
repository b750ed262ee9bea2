"""Files planned from names and sizes alone, against the real parser."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fp8stream.header import MAX_HEADER_BYTES
from fp8stream.layout import (
    CHECKSUM_KEY,
    PAGE,
    OutputFile,
    OutputTensor,
    entry_room,
    has_its_checksum,
    index_bytes,
    pack,
)

# What JSON escapes, what it need not, and what is more than one UTF-16 unit.
hostile = st.text(st.sampled_from('"\\/\b\f\n\r\t\0\x1f\x7f\x85\u2028é中😀*{}:,'), min_size=1)
plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
names = st.one_of(hostile, plain).filter(lambda name: name != "__metadata__")
tensors = st.builds(
    OutputTensor,
    names,
    st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "I64"]),
    st.lists(st.integers(0, 40), max_size=3).map(tuple),
)
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Weight:
    """Tensors that are made together, as those of one source tensor are."""

    made: Sequence[OutputTensor]

    @property
    def room(self) -> int:
        return sum(entry_room(tensor.name, len(tensor.shape)) for tensor in self.made)

    @property
    def output_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.made)

    def outputs(self) -> list[OutputTensor]:
        return list(self.made)


@st.composite
def modules(draw: st.DrawFn) -> list[list[Weight]]:
    """Weights in layers, no name twice."""
    unique = st.lists(tensors, min_size=1, max_size=12, unique_by=lambda tensor: tensor.name)
    return _cut(draw, [Weight(part) for part in _cut(draw, draw(unique))])


def _cut(draw: st.DrawFn, items: list[Any]) -> list[list[Any]]:
    ends = sorted(draw(st.sets(st.integers(1, len(items)))) | {len(items)})
    return [items[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def write_zeros(file: OutputFile, directory: Path) -> Path:
    path = directory / file.name
    with path.open("wb") as stream:
        stream.write(file.header)
        stream.truncate(file.size)
    return path


@settings(max_examples=100, deadline=None)
@given(layers=modules(), limit=st.integers(1, 60_000))
def test_the_real_parser_reads_every_layout(
    tmp_path_factory: pytest.TempPathFactory, layers: list[list[Weight]], limit: int
) -> None:
    directory = tmp_path_factory.mktemp("layout")
    found = {}
    for file in pack(layers, limit, METADATA):
        path = write_zeros(file, directory)
        with safe_open(path, framework="np") as opened:
            assert opened.metadata().keys() == {*METADATA, CHECKSUM_KEY}
            for name in opened.keys():  # noqa: SIM118
                view = opened.get_slice(name)
                found[name] = view.get_dtype(), tuple(view.get_shape())
        assert file.tensors
        assert file.size <= limit or len(file.tensors) == 1
        assert len(file.header) == file.data_begin
        assert file.data_begin % PAGE == 0
        for tensor, offset in zip(file.tensors, file.offsets, strict=True):
            assert offset % min(8, max(1, tensor.nbytes and itemsize(tensor))) == 0
    assert found == {tensor.name: (tensor.dtype, tensor.shape) for tensor in every(layers)}


def every(layers: Sequence[Sequence[Weight]]) -> list[OutputTensor]:
    return [tensor for layer in layers for weight in layer for tensor in weight.made]


@settings(max_examples=100, deadline=None)
@given(layers=modules(), limit=st.integers(1, 60_000))
def test_layers_are_in_order_and_whole_where_they_fit(
    layers: list[list[Weight]], limit: int
) -> None:
    files = pack(layers, limit, METADATA)
    place = {tensor.name: number for number, file in enumerate(files) for tensor in file.tensors}
    numbers = [place[tensor.name] for tensor in every(layers)]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(len(files)))
    for layer in layers:
        alone = pack([layer], 10**9, METADATA)[0].size
        together = {place[tensor.name] for weight in layer for tensor in weight.made}
        # A page to spare: room in a header is counted before it is rounded up.
        assert len(together) == 1 or alone > limit - PAGE


@given(layers=modules(), limit=st.integers(1, 60_000), note=plain)
def test_headers_and_index_are_what_json_writes(
    layers: list[list[Weight]], limit: int, note: str
) -> None:
    metadata = {"format": "pt", note: note}
    files = pack(layers, limit, metadata)
    metadata |= {CHECKSUM_KEY: "00000000"}
    for file in files:
        text = json.dumps(header_of(file, metadata), separators=(",", ":")).encode()
        digits = f"{zlib.crc32(text):08x}".encode()
        assert file.header[8:].rstrip(b" ") == text.replace(b"00000000", digits, 1)
        assert int.from_bytes(file.header[:8], "little") == len(file.header) - 8
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for tensor in every(layers))
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    assert index_bytes(files) == (json.dumps(index, indent=2) + "\n").encode()


def header_of(file: OutputFile, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What must stand in the header, by the format alone."""
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for tensor in file.tensors:
        end = begin + tensor.nbytes
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name] = entry
        begin = end
    assert begin == file.size - file.data_begin
    return header


@given(layers=modules(), limit=st.integers(1, 60_000))
def test_an_index_takes_no_more_than_the_headers(layers: list[list[Weight]], limit: int) -> None:
    """The check of the disk counts on it: an index is not made before it is written."""
    files = pack(layers, limit, METADATA)
    assert len(index_bytes(files)) <= sum(file.data_begin for file in files)


@given(name=names, sides=st.lists(st.integers(0, 10**12), max_size=8))
def test_no_entry_takes_more_than_its_room(name: str, sides: list[int]) -> None:
    tensor = OutputTensor(name, "F8_E4M3", (*sides, 0))
    (file,) = pack([[Weight([tensor])]], 10**9, {})
    metadata = b'{"__metadata__":{"crc32":"00000000"}'
    entry = file.header[8:].rstrip(b" ")[len(metadata) :].removesuffix(b"}")
    # Offsets are the only numbers left: 20 digits each are more than any file has bytes.
    assert len(entry) + 2 * 19 <= entry_room(name, len(tensor.shape))


def itemsize(tensor: OutputTensor) -> int:
    return {"F32": 4, "BF16": 2, "I64": 8}.get(tensor.dtype, 1)


def layer(name: str, size: int) -> list[Weight]:
    codes = OutputTensor(f"{name}.weight", "F8_E4M3", (size,))
    return [Weight([codes, OutputTensor(f"{name}.weight_scale", "F32", (1,))])]


def test_a_weight_and_its_scale_share_a_file() -> None:
    files = pack([layer(str(n), 10_000) for n in range(5)], 40_000, METADATA)
    assert [len(file.tensors) for file in files] == [6, 4]
    assert files[0].name == "model-00001-of-00002.safetensors"


def test_no_file_is_empty_when_the_first_tensor_is_larger_than_a_file() -> None:
    files = pack([layer("a", 90_000), layer("b", 10)], 40_000, METADATA)
    assert [file.tensors[-1].name for file in files] == ["a.weight", "b.weight"]


def test_a_layer_that_is_larger_than_a_file_is_cut_between_its_weights() -> None:
    weights = [weight for name in "abc" for weight in layer(name, 20_000)]
    files = pack([weights], 50_000, METADATA)
    assert [[tensor.name for tensor in file.tensors] for file in files] == [
        ["a.weight_scale", "b.weight_scale", "a.weight", "b.weight"],
        ["c.weight_scale", "c.weight"],
    ]


def test_one_file_has_the_plain_name() -> None:
    (file,) = pack([layer("a", 10)], 10**9, METADATA)
    assert file.name == "model.safetensors"


def test_the_header_stands_in_the_order_of_the_data() -> None:
    (file,) = pack([layer("a", 10), layer("b", 7)], 10**9, METADATA)
    entries = json.loads(file.header[8:])
    assert list(entries) == [
        "__metadata__",
        "a.weight_scale",
        "b.weight_scale",
        "a.weight",
        "b.weight",
    ]
    assert [e["data_offsets"] for n, e in entries.items() if n != "__metadata__"] == [
        [0, 4],
        [4, 8],
        [8, 18],
        [18, 25],
    ]


def test_the_index_counts_tensor_bytes() -> None:
    files = pack([layer(str(n), 10_000) for n in range(5)], 40_000, METADATA)
    index = json.loads(index_bytes(files))
    assert index["metadata"] == {"total_size": 5 * 10_004}
    assert index["weight_map"]["4.weight"] == "model-00002-of-00002.safetensors"
    assert list(index["weight_map"]) == sorted(index["weight_map"])


@dataclass(frozen=True)
class _Wordy:
    """A part with little data and a very long entry."""

    room: int = 40_000_000
    output_bytes: int = 1

    def outputs(self) -> list[OutputTensor]:
        return []


def test_no_header_grows_longer_than_readers_take() -> None:
    files = pack([[_Wordy()] for _ in range(5)], 10**12, {})
    assert [len(file.parts) for file in files] == [2, 2, 1]
    assert all(file.data_begin <= MAX_HEADER_BYTES for file in files)


@settings(max_examples=50, deadline=None)
@given(layers=modules(), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_leaves_a_header_with_its_checksum(
    layers: list[list[Weight]], at: float, bit: int
) -> None:
    header = bytearray(pack(layers, 60_000, METADATA)[0].header[8:])
    assert has_its_checksum(bytes(header))
    length = len(header.rstrip(b" "))
    header[int(at * length)] ^= 1 << bit
    assert not has_its_checksum(bytes(header))
