"""Headers against the reference parser: what we accept it reads, and reads the same."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fp8stream.errors import CheckpointError
from fp8stream.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    Shard,
    TensorSpec,
    _read_plain,
    _read_strictly,
    parse_header,
    read_shard,
)

deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize
# Name, dtype, shape and bytes of every tensor, sorted.
Listing = list[tuple[str, str, list[int], bytes]]

SECONDS = 2.0
LONGEST_MESSAGE = 1000


def file_bytes(header: object, data: bytes = b"", claimed: int | None = None) -> bytes:
    """A safetensors file: `header` as it is, or as JSON; its length, unless `claimed` lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_entry(text: bytes) -> bytes:
    """A file of four bytes of data whose one tensor is declared by `text`."""
    return file_bytes(b'{"a":' + text + b"}", bytes(4))


def with_extra(value: bytes) -> bytes:
    """A good file, but for `value` in a field that nobody reads."""
    return with_entry(b'{"dtype":"F32","shape":[1],"data_offsets":[0,4],"q":' + value + b"}")


def with_shape(shape: bytes, data: int = 4) -> bytes:
    offsets = b'"data_offsets":[0,%d]' % data
    text = b'{"a":{"dtype":"F32","shape":' + shape + b"," + offsets + b"}}"
    return file_bytes(text, bytes(data))


def with_name(name: bytes) -> bytes:
    return file_bytes(
        b'{"' + name + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    )


def reference(content: bytes) -> Listing | None:
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    return sorted((name, t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in found)


def ours(content: bytes, path: Path) -> Listing | None:
    path.write_bytes(content)
    try:
        shard = read_shard(path)
    except CheckpointError:
        return None
    return listing(shard, content)


def listing(shard: Shard, content: bytes) -> Listing:
    return sorted(
        (t.name, t.dtype, list(t.shape), content[t.offset : t.offset + t.nbytes])
        for t in shard.tensors
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example overwrites."""
    return tmp_path_factory.mktemp("header") / "model.safetensors"


shapes = st.lists(st.integers(0, 5), max_size=4)
letters = st.text("ab.", max_size=3)
names = letters | st.text(st.characters(codec="utf-8"), max_size=8).filter(
    lambda name: name != "__metadata__"
)
# What JSON can say in place of a size, a name or a list of sizes.
odd = st.recursive(
    st.one_of(
        st.integers(-(2**70), 2**70),
        st.integers(-2, 12),
        st.sampled_from([2**31, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, 0, 10**40]),
        st.floats(),
        st.booleans(),
        st.none(),
        st.text(max_size=3),
        st.sampled_from([*DTYPE_BITS, "F128", "f32", "\ud800", ""]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
fragments = st.sampled_from(
    [
        *(b"-0", b"-", b"0", b"00", b"1e0", b"1e999", b"1.0", b"1e-999", b"NaN", b"Infinity"),
        *(b"true", b"null", b'"', b",", b":", b"{", b"}", b"[", b"]", b" ", b"\n", b"\t", b"\f"),
        *(b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\\udc00\\ud800", b"\x00", b"\x1f"),
        *(b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"4611686018427387904,"),
        *(b'"__metadata__":', b'"dtype":', b"//", b"[" * 130 + b"]" * 130),
    ]
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """The entries of a good file, in any order, and its data."""
    entries: list[tuple[str, Any]] = []
    position = 0
    for name in draw(st.lists(names, unique=True, max_size=5)):
        dtype = draw(st.sampled_from(list(DTYPE_BITS)))
        shape = draw(shapes)
        bits = DTYPE_BITS[dtype]
        for side in shape:
            bits *= side
        if bits % 8:
            shape, bits = [*shape, 4], bits * 4
        entries.append((name, entry(dtype, shape, position, position + bits // 8)))
        position += bits // 8
    if draw(st.booleans()):
        metadata = draw(st.dictionaries(names, names, max_size=2))
        entries.append(("__metadata__", metadata))
    data = bytes(index % 251 for index in range(position))
    return dict(draw(st.permutations(entries))), data


@st.composite
def spelled(draw: st.DrawFn, header: object) -> bytes:
    """`header` as JSON, one way or another, padded with spaces."""
    text = json.dumps(
        header,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, None, 1])),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r")])),
    )
    return text.encode("utf-8", "surrogatepass") + b" " * draw(st.integers(0, 9))


@st.composite
def good_files(draw: st.DrawFn) -> bytes:
    header, data = draw(layouts())
    return file_bytes(draw(spelled(header)), data)


@st.composite
def misdeclared_files(draw: st.DrawFn) -> bytes:
    """A good file of which one declaration, or the amount of data, was changed."""
    header, data = draw(layouts())
    tensors = [key for key in header if key != "__metadata__"]
    what = draw(st.sampled_from(["dtype", "shape", "data_offsets", "side", "offset", "entry"]))
    if what == "entry" or not tensors:
        header[draw(names | st.just("__metadata__"))] = draw(odd)
    else:
        tensor = header[draw(st.sampled_from(tensors))]
        if what == "side":
            at = draw(st.integers(0, len(tensor["shape"])))
            tensor["shape"][at : at + draw(st.integers(0, 1))] = [draw(odd)]
        elif what == "offset":
            at = draw(st.integers(0, 1))
            moved = st.integers(-3, 3).map(lambda step: tensor["data_offsets"][at] + step)
            tensor["data_offsets"][at] = draw(moved | odd)
        else:
            tensor[what] = draw(odd | st.sampled_from([*DTYPE_BITS]) | shapes)
    data = data[: len(data) - draw(st.integers(0, 2))] + bytes(draw(st.integers(0, 2)))
    return file_bytes(draw(spelled(header)), data)


@st.composite
def miswritten_files(draw: st.DrawFn) -> bytes:
    """A good file of which some bytes were flipped, inserted or lost."""
    header, data = draw(layouts())
    text = draw(spelled(header))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        lost = draw(st.integers(0, 2))
        new = draw(st.one_of(fragments, fragments, st.binary(max_size=2)))
        text = text[:at] + new + text[at + lost :]
    claimed = len(text) + draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    return file_bytes(text, data, max(0, claimed))


@st.composite
def repeating_files(draw: st.DrawFn) -> bytes:
    """A good file but for one key too many, which may be one that its object has."""
    header, data = draw(layouts())
    changed = draw(st.sampled_from([header, *header.values()]))
    keys = st.sampled_from([*changed, "dtype", "shape", "data_offsets", "__metadata__", "-0"])
    values = st.sampled_from([*changed.values(), None, {}, "F32", [], [0, 0]]) | odd
    changed["\ue000"] = draw(values)
    text = draw(spelled(dict(draw(st.permutations(list(header.items()))))))
    key = json.dumps(draw(keys | names)).encode()
    for mark in (b'"\\ue000"', '"\ue000"'.encode()):
        text = text.replace(mark, key, 1)
    return file_bytes(text, data)


@settings(max_examples=200, deadline=None)
@given(content=good_files())
def test_every_good_file_is_read_as_the_reference_reads_it(content: bytes, path: Path) -> None:
    expected = reference(content)
    assert expected is not None
    assert ours(content, path) == expected


@settings(max_examples=500, deadline=None)
@given(content=st.one_of(misdeclared_files(), miswritten_files()))
def test_what_we_accept_the_reference_accepts_and_reads_the_same(
    content: bytes, path: Path
) -> None:
    found = ours(content, path)
    assert found is None or found == reference(content)


@settings(max_examples=200, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=64),
        st.binary(max_size=64).map(file_bytes),
        odd.map(lambda value: file_bytes(json.dumps(value).encode())),
        st.dictionaries(names, odd, max_size=3).map(file_bytes),
    )
)
def test_any_bytes_at_all_are_read_alike_or_refused(content: bytes, path: Path) -> None:
    found = ours(content, path)
    assert found is None or found == reference(content)


Parsed = tuple[TensorSpec, ...]
Parser = Callable[[bytes, Path, int, int], Parsed]


def outcome(parse: Parser, content: bytes) -> Parsed | str:
    """What `parse` makes of the header of `content`: tensors, or why there are none."""
    header, data_bytes, data_begin = split(content)
    try:
        return parse(header, Path("a"), data_bytes, data_begin)
    except CheckpointError as error:
        return str(error)


def read_plain(content: bytes) -> Parsed:
    header, data_bytes, data_begin = split(content)
    return _read_plain(header, "a", data_bytes, data_begin)


def split(content: bytes) -> tuple[bytes, int, int]:
    """The header of `content`, the size of its data and where that begins."""
    begin = 8 + int.from_bytes(content[:8], "little")
    return content[8:begin], max(0, len(content) - begin), begin


@settings(max_examples=1000, deadline=None)
@given(content=st.one_of(good_files(), misdeclared_files(), miswritten_files(), repeating_files()))
def test_the_fast_way_through_a_header_changes_nothing(content: bytes) -> None:
    assume(split(content)[0].startswith(b"{"))
    assert outcome(parse_header, content) == outcome(_read_strictly, content)


A = b'"a":{"dtype":"U8","shape":[1,1],"data_offsets":[0,1]}'


def with_second(shape: bytes = b"[1,1]", offsets: bytes = b"[1,2]", data: int = 2) -> bytes:
    """A good tensor, then another whose shape and offsets may equal good ones in Python's eyes."""
    second = b'"b":{"dtype":"U8","shape":' + shape + b',"data_offsets":' + offsets + b"}"
    return file_bytes(b"{" + A + b"," + second + b"}", bytes(data))


def with_scalar(shape: bytes) -> bytes:
    """A good scalar, then a tensor as large."""
    content = with_second(shape)
    return file_bytes(content[8:-2].replace(b"[1,1]", b"[]", 1), bytes(2))


NOT_PLAIN = [
    pytest.param(file_bytes(b"{" + A + b"," + A + b"}", bytes(1)), id="a tensor twice"),
    pytest.param(
        file_bytes(b"{" + A + b"," + A.replace(b'"a"', b'"\\u0061"') + b"}", bytes(1)),
        id="a tensor twice in two spellings",
    ),
    pytest.param(
        file_bytes(b'{"a":0,' + A + b"}", bytes(1)), id="a tensor twice, the first a number"
    ),
    pytest.param(
        with_entry(b'{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}'),
        id="dtype twice",
    ),
    pytest.param(
        with_entry(b'{"dtype":4,"dtype":"F32","shape":[1],"data_offsets":[0,4]}'),
        id="dtype twice, first a number",
    ),
    pytest.param(
        with_entry(b'{"dtype":"F32","dtype":4,"shape":[1],"data_offsets":[0,4]}'),
        id="dtype twice, last a number",
    ),
    pytest.param(
        with_entry(b'{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,4]}'),
        id="shape twice",
    ),
    pytest.param(
        with_entry(b'{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offsets":[0,4]}'),
        id="data_offsets twice",
    ),
    pytest.param(
        with_entry(b'{"dtype":"F32","shape":[1],"data_offsets":[0,4],"data_offset":[0,4]}'),
        id="a field too many",
    ),
    pytest.param(with_entry(b'{"dtype":"F32","shape":[1],"q":[0,4]}'), id="a field's name wrong"),
    pytest.param(
        file_bytes(b'{"__metadata__":{},"__metadata__":{},' + A + b"}", bytes(1)),
        id="metadata twice",
    ),
    pytest.param(
        file_bytes(b'{"__metadata__":{"a":"1","a":"1"},' + A + b"}", bytes(1)),
        id="metadata with a key twice",
    ),
    pytest.param(
        file_bytes(b'{"__metadata__":{"a":"1","a":1,"b":1},' + A + b"}", bytes(1)),
        id="metadata with a key twice, and as many strings as keys",
    ),
    pytest.param(file_bytes(b'{"__metadata__":null,' + A + b"}", bytes(1)), id="metadata null"),
    pytest.param(
        file_bytes(b'{"__metadata__":[[],[]],' + A + b"}", bytes(1)), id="metadata a list"
    ),
    pytest.param(
        file_bytes(b'{"__metadata__":{"a":"\\ud800"},' + A + b"}", bytes(1)),
        id="a lone surrogate in the metadata",
    ),
    pytest.param(with_name(b"\\udc00"), id="a lone surrogate for a name"),
    pytest.param(with_second(b"[true,1]"), id="true for a side of 1"),
    pytest.param(with_second(b"[1.0,1]"), id="a float for a side of 1"),
    pytest.param(with_second(b"[1e0,1]"), id="an exponent in a side of 1"),
    pytest.param(with_second(b"[NaN,1]"), id="NaN for a side"),
    pytest.param(with_second(b"[-1,-1]"), id="two negative sides"),
    pytest.param(with_second(b"[18446744073709551617,1]"), id="a side of 2^64 + 1"),
    pytest.param(with_second(b"[1" + b"0" * 25 + b",0]", b"[1,1]", 1), id="a side of 26 digits"),
    pytest.param(with_second(b"[" + b"1" * 5000 + b"]"), id="a side of 5000 digits"),
    pytest.param(with_second(b"[0,-0]", b"[1,1]", 1), id="minus zero for a side"),
    pytest.param(with_second(b"[9223372036854775808,0]", b"[1,1]", 1), id="nothing of 2^63"),
    pytest.param(with_scalar(b"{}"), id="an object for the shape of a scalar"),
    pytest.param(with_scalar(b'""'), id="a string for the shape of a scalar"),
    pytest.param(with_second(b"[1,2]"), id="a shape of more bytes"),
    pytest.param(with_second(b"[0]"), id="a shape of fewer bytes"),
    pytest.param(with_second(b"null"), id="null for a shape"),
    pytest.param(with_second(b"[[1],1]"), id="a list for a side"),
    pytest.param(with_second(offsets=b"[true,2]"), id="true for an offset of 1"),
    pytest.param(with_second(offsets=b"[1,2.0]"), id="a float for an offset"),
    pytest.param(with_second(offsets=b"[1,2,3]"), id="three offsets"),
    pytest.param(with_second(offsets=b"[1]"), id="one offset"),
    pytest.param(with_second(offsets=b"12"), id="a number for offsets"),
    pytest.param(with_second(offsets=b'{"1":1,"2":2}'), id="an object for offsets"),
    pytest.param(with_second(offsets=b"[0,1]"), id="the same place twice"),
    pytest.param(with_second(offsets=b"[2,3]"), id="a hole"),
    pytest.param(with_second(b"[2]", b"[1,3]"), id="past the end"),
    pytest.param(with_second(b"[0]", b"[1,1]"), id="a hole at the end"),
    pytest.param(
        file_bytes(b"{" + A.replace(b"[0,1]", b"[-0,1]") + b"}", bytes(1)), id="an offset of -0"
    ),
    pytest.param(with_entry(b'["dtype","shape","data_offsets"]'), id="an entry that is a list"),
    pytest.param(
        with_entry(b'{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}'), id="dtype list"
    ),
    pytest.param(
        with_entry(b'{"dtype":"F7","shape":[1],"data_offsets":[0,4]}'), id="dtype unknown"
    ),
    pytest.param(file_bytes(b"{" * 100_000), id="objects without end"),
    pytest.param(file_bytes(b"{}\0"), id="NUL after the header"),
    pytest.param(file_bytes("{}".encode("utf-16-le")), id="UTF-16"),
]


@pytest.mark.parametrize("content", NOT_PLAIN)
def test_what_is_not_plainly_right_is_left_to_the_strict_way(content: bytes) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011
        read_plain(content)
    refused = outcome(_read_strictly, content)
    assert isinstance(refused, str)
    assert outcome(parse_header, content) == refused


PLAIN = [
    pytest.param({"data_offsets": entry("F32", [1], 0, 4)}, id="a tensor called data_offsets"),
    pytest.param({"dtype": entry("F32", [1], 0, 4)}, id="a tensor called dtype"),
    pytest.param({"a,data_offsets:[0,0]{": entry("F32", [1], 0, 4)}, id="JSON in a name"),
    pytest.param({"gewicht.größe.重み": entry("F32", [1], 0, 4)}, id="a name in other letters"),
    pytest.param({"a": dict(reversed(entry("F32", [1], 0, 4).items()))}, id="fields in any order"),
    pytest.param({"a": entry("F32", [], 0, 4)}, id="a scalar"),
    pytest.param({"a": entry("F4", [8], 0, 4)}, id="less than a byte an element"),
    pytest.param({"a": entry("U8", [4], 0, 4), "__metadata__": {}}, id="metadata of nothing"),
    pytest.param(
        {"__metadata__": {"format": "pt", "b": "{"}, "a": entry("U8", [4], 0, 4)}, id="metadata"
    ),
    pytest.param(
        {"z": entry("U8", [2], 2, 4), "a": entry("U8", [2], 0, 2), "b": entry("U8", [0], 2, 2)},
        id="not in the order of data",
    ),
    pytest.param(
        {"b": entry("F32", [0], 4, 4), "a": entry("U8", [0], 4, 4), "c": entry("F32", [1], 0, 4)},
        id="two of no bytes in one place",
    ),
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("header", PLAIN)
def test_what_is_plainly_right_is_read_the_fast_way(
    header: dict[str, Any], indent: int | None
) -> None:
    text = json.dumps(header, ensure_ascii=False, indent=indent).encode() + b"  "
    content = file_bytes(text, bytes(4))
    assert read_plain(content) == outcome(_read_strictly, content)


def test_what_save_file_writes_is_read_the_fast_way(path: Path) -> None:
    tensors = {f"layers.{n}.weight": torch.zeros(n, 2, dtype=torch.float16) for n in range(20)}
    save_file({**tensors, "bias": torch.zeros(3)}, path, metadata={"format": "pt"})
    content = path.read_bytes()
    assert read_plain(content) == outcome(_read_strictly, content)
    assert len(read_plain(content)) == 21


dtypes = st.sampled_from(
    [
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8),
        *(torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
    ]
)


@settings(max_examples=100, deadline=None)
@given(
    declared=st.dictionaries(names, st.tuples(dtypes, shapes), max_size=5),
    metadata=st.none() | st.dictionaries(names, names, min_size=1, max_size=2),
)
def test_every_file_that_save_file_writes_is_accepted(
    declared: dict[str, tuple[torch.dtype, list[int]]],
    metadata: dict[str, str] | None,
    path: Path,
) -> None:
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in declared.items()}
    path.unlink(missing_ok=True)
    save_file(tensors, path, metadata=metadata)
    found = {t.name: (t.dtype, t.shape) for t in read_shard(path).tensors}
    with safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        expected = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    assert found == expected


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", "a\0b", "a\tb\r\nc", "\x7f\x9b31m", '"', "\\", "é", "😀"),
        *("\u2028", "re:.*", "__metadata__ ", "-", "model.layers.\u0663.weight", "a" * 10_000),
    ],
    ids=ascii,
)
def test_a_strange_name_is_read_as_it_stands(name: str, path: Path) -> None:
    content = file_bytes({name: entry("F32", [1], 0, 4)}, b"\1\2\3\4")
    assert ours(content, path) == reference(content) == [(name, "F32", [1], b"\1\2\3\4")]


def test_empty_tensors_may_lie_between_and_at_the_ends(path: Path) -> None:
    header = {
        "last": entry("F32", [0, 7], 8, 8),
        "b": entry("F32", [1], 4, 8),
        "between": entry("BF16", [3, 0], 4, 4),
        "a": entry("F32", [], 0, 4),
        "first": entry("U8", [0], 0, 0),
    }
    content = file_bytes(header, b"abcdefgh")
    found = ours(content, path)
    assert found is not None
    assert found == reference(content)


def test_a_file_of_no_tensors_is_one(path: Path) -> None:
    assert ours(file_bytes({}), path) == []


def test_a_header_of_the_largest_size_is_read(path: Path) -> None:
    text = json.dumps({"a": entry("F32", [1], 0, 4)}).encode()
    path.write_bytes(file_bytes(text + b" " * (MAX_HEADER_BYTES - len(text)), bytes(4)))
    assert [tensor.name for tensor in read_shard(path).tensors] == ["a"]
    with safe_open(path, framework="pt") as opened:
        assert list(opened.keys()) == ["a"]
    path.unlink()


def test_forty_thousand_tensors_are_read_at_once(path: Path) -> None:
    header = {f"model.layers.{n}.weight": entry("U8", [1], n, n + 1) for n in range(40_000)}
    path.write_bytes(file_bytes(header, bytes(len(header))))
    start = time.process_time()
    assert len(read_shard(path).tensors) == len(header)
    assert time.process_time() - start < SECONDS


REFUSED_BY_BOTH = [
    pytest.param(with_shape(b"[-0]", 0), id="minus zero"),
    pytest.param(with_shape(b"[-1]"), id="a negative side"),
    pytest.param(with_shape(b"[1.0]"), id="a side with a point"),
    pytest.param(with_shape(b"[1e0]"), id="a side with an exponent"),
    pytest.param(with_shape(b"[true]"), id="a side that is true"),
    pytest.param(with_shape(b'["1"]'), id="a side in quotes"),
    pytest.param(with_shape(b"1"), id="a shape that is a number"),
    pytest.param(with_shape(b"null"), id="a shape that is null"),
    pytest.param(with_shape(b"[1152921504606846976]"), id="2^60 elements"),
    pytest.param(with_shape(b"[4294967296,4294967296]"), id="2^64 elements"),
    pytest.param(with_shape(b"[18446744073709551616]"), id="a side of 2^64"),
    pytest.param(with_shape(b"[4294967296,4294967296,4294967297]"), id="overflow to a small size"),
    pytest.param(
        file_bytes({"a": entry("F32", [2**62, 2**62, 0], 0, 0)}), id="overflow, then a zero"
    ),
    pytest.param(with_shape(b"[" + b"9" * 5000 + b"]"), id="a side of 5000 digits"),
    pytest.param(with_shape(b"[" + b"9" * 4000 + b"]"), id="a side of 4000 digits"),
    pytest.param(
        with_shape(b"[" + b",".join([b"9223372036854775807"] * 40_000) + b"]"),
        id="40,000 huge sides",
    ),
    pytest.param(
        with_shape(b"[" + b",".join([b"1"] * 40_000) + b"]", 2), id="40,000 sides, a wrong size"
    ),
    pytest.param(with_extra(b"9" * 5000), id="5000 digits in a field nobody reads"),
    pytest.param(with_extra(b"9" * 4000), id="4000 digits in a field nobody reads"),
    pytest.param(with_extra(b"1e999"), id="a float out of range"),
    pytest.param(with_extra(b"NaN"), id="NaN"),
    pytest.param(with_extra(b"Infinity"), id="Infinity"),
    pytest.param(with_extra(b"-Infinity"), id="-Infinity"),
    pytest.param(with_extra(b"01"), id="a leading zero"),
    pytest.param(with_extra(b"'a'"), id="single quotes"),
    pytest.param(with_extra(b"1,"), id="a trailing comma"),
    pytest.param(with_extra(b"[" * 500 + b"]" * 500), id="500 deep in a field nobody reads"),
    pytest.param(with_extra(b"[" * 100_000 + b"]" * 100_000), id="100,000 deep"),
    pytest.param(file_bytes(b'{"a":' * 100_000), id="100,000 objects deep"),
    pytest.param(file_bytes(b"[" * 1_000_000), id="a million brackets"),
    pytest.param(with_name(b"\\ud800"), id="a lone surrogate as a name"),
    pytest.param(with_name(b"\\udc00\\ud800"), id="surrogates the wrong way round"),
    pytest.param(with_name(b"\xed\xa0\x80"), id="a surrogate in UTF-8"),
    pytest.param(with_extra(b'"\\ud800"'), id="a lone surrogate in a field nobody reads"),
    pytest.param(
        file_bytes(b'{"__metadata__":{"a":"\\ud800"}}'), id="a lone surrogate in the metadata"
    ),
    pytest.param(
        file_bytes(b'{"__metadata__":{"\\ud800":"a"}}'), id="a lone surrogate as a metadata key"
    ),
    pytest.param(with_name(b"a\0b"), id="a raw NUL in a name"),
    pytest.param(with_name(b"a\nb"), id="a raw newline in a name"),
    pytest.param(with_name(b"a\xff"), id="a name that is not UTF-8"),
    pytest.param(with_name(b"\xc0\xaf"), id="an overlong UTF-8 sequence"),
    pytest.param(file_bytes(b""), id="no header"),
    pytest.param(file_bytes(b"[]"), id="a list"),
    pytest.param(file_bytes(b'"a"'), id="a string"),
    pytest.param(file_bytes(b"{"), id="an open brace"),
    pytest.param(file_bytes(b"{}\0"), id="NUL after the header"),
    pytest.param(file_bytes(b"{}{}"), id="two headers"),
    pytest.param(file_bytes(b"\xef\xbb\xbf{}"), id="a byte-order mark"),
    pytest.param(file_bytes("{}".encode("utf-16")), id="UTF-16"),
    pytest.param(file_bytes({"a": entry("F7", [1], 0, 4)}, bytes(4)), id="an unknown dtype"),
    pytest.param(file_bytes({"a": entry("f32", [1], 0, 4)}, bytes(4)), id="a small-letter dtype"),
    pytest.param(file_bytes({"a": entry("F4", [3], 0, 1)}, bytes(1)), id="half a byte"),
    pytest.param(file_bytes({"a": entry("U8", [1], 1, 0)}, bytes(1)), id="offsets reversed"),
    pytest.param(file_bytes({"a": entry("U8", [1], -1, 0)}, bytes(1)), id="a negative offset"),
    pytest.param(
        file_bytes({"a": entry("U8", [0], 2**64 - 1, 2**64 - 1)}), id="an offset of 2^64 - 1"
    ),
    pytest.param(
        file_bytes({"a": entry("U8", [2], 0, 2), "z": entry("U8", [0], 1, 1)}, bytes(2)),
        id="an empty tensor inside another",
    ),
    pytest.param(file_bytes({"__metadata__": {"a": 1}}), id="metadata that is no string"),
    pytest.param(file_bytes({"__metadata__": []}), id="metadata that is a list"),
    pytest.param(file_bytes({}, bytes(1)), id="data of no tensor"),
    pytest.param(file_bytes({}, claimed=3), id="a header past the end"),
    pytest.param(file_bytes({}, claimed=2**64 - 1), id="a header of 2^64 - 1 bytes"),
    pytest.param(b"", id="an empty file"),
    pytest.param(b"\2\0\0\0\0\0\0", id="seven bytes"),
]

# The reference takes the last of two, or reads what no writer writes; two readers could disagree.
REFUSED_BY_US = [
    pytest.param(
        file_bytes(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            bytes(1),
        ),
        id="a tensor named twice",
    ),
    pytest.param(
        file_bytes(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"\\u0061":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            bytes(1),
        ),
        id="a tensor named twice in two spellings",
    ),
    pytest.param(
        with_entry(b'{"dtype":"F32","shape":[1],"data_offsets":[0,4],"q":1,"q":2}'),
        id="a field named twice",
    ),
    pytest.param(file_bytes(b'{"__metadata__":{"a":"1","a":"2"}}'), id="metadata named twice"),
    pytest.param(file_bytes(b" {}"), id="a space before the header"),
    pytest.param(with_entry(b'["F32",[1],[0,4]]'), id="an entry that is a list"),
]


@pytest.mark.parametrize("content", REFUSED_BY_BOTH)
def test_a_hostile_header_is_refused_as_the_reference_does(content: bytes, path: Path) -> None:
    assert reference(content) is None
    _assert_refused_in_a_line(content, path)


@pytest.mark.parametrize("content", REFUSED_BY_US)
def test_an_ambiguous_header_is_refused(content: bytes, path: Path) -> None:
    _assert_refused_in_a_line(content, path)


def _assert_refused_in_a_line(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_shard(path)
    seconds = time.process_time() - start
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < LONGEST_MESSAGE
    assert "sys." not in message, "advice for a Python programmer"
    assert seconds < SECONDS


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Path]:
    """A file of 200 MB that takes no room."""
    file = tmp_path / "model.safetensors"
    file.touch()
    os.truncate(file, 200_000_000)
    yield file
    file.unlink()


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_of_more_than_100_megabytes_is_refused_unread(sparse: Path, length: int) -> None:
    with sparse.open("r+b") as stream:
        stream.write(length.to_bytes(8, "little") + b"{")
    start = time.process_time()
    with pytest.raises(CheckpointError, match=f"at most 100000000 bytes, found {length}"):
        read_shard(sparse)
    assert time.process_time() - start < 0.1
