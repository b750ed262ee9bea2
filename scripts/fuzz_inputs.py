"""Hostile inputs, each made from a good one by a seeded generator. Pure: a `Random` in, bytes out.

JSON is kept as a tree that can say what a dict cannot (a key twice, a number as it is spelled), is
changed in a few places, spelled one way or another, and then perhaps changed once more as bytes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Raw:
    """What stands in the text as it is, JSON or not."""

    text: bytes


@dataclass
class Pairs:
    """A JSON object: keys may repeat, and a key may be Raw."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


def tree(value: Any) -> Any:
    """`value`, with every dict in it as Pairs."""
    if isinstance(value, Mapping):
        return Pairs([(key, tree(inner)) for key, inner in value.items()])
    return [tree(inner) for inner in value] if isinstance(value, (list, tuple)) else value


NUMBERS: tuple[object, ...] = (
    *(0, 1, 2, 3, -1, 255, 2**31, 2**32, 2**53, 2**53 + 1, 2**60, 2**62, 2**63 - 1, 2**63),
    *(2**64 - 1, 2**64, 2**64 + 1, 10**19, 10**20, 10**40, -(2**63), 10**400),
    *(Raw(text) for text in (b"-0", b"0.0", b"1.0", b"1e0", b"1e3", b"1E+2", b"-1", b"-0.0")),
    *(Raw(text) for text in (b"1e999", b"-1e999", b"1e-999", b"NaN", b"Infinity", b"-Infinity")),
    *(Raw(text) for text in (b"01", b"+1", b"1.", b".5", b"0x10", b"1_000", b"1e", b"--1")),
    *(Raw(b"9" * 4301), Raw(b"9" * 4000), Raw(b"1" + b"0" * 25), Raw(b"\xef\xbc\x91")),
    *(Raw(b"1." + b"3" * 1000), Raw(b"1e" + b"9" * 500)),
)
STRINGS: tuple[object, ...] = (
    *("", " ", ".", "..", "a", "b", "weight", "dtype", "shape", "data_offsets", "__metadata__"),
    *("\0", "a\0b", "\n", "a\tb\r\nc", "\x1b[31m", "\x7f", "\x9b", "\u2028", "\u202e", "\ufeff"),
    *("é", "e\u0301", "K", "\u212a", "ﬁ", "\u0000é", "😀", "\U0010ffff", "\ufffe", "ß", "İ"),
    *("a/b", "../a", "/a", "a\\b", "re:.*", "a" * 300, '"', "\\", "F32", "f32", "F128", "true"),
    *(Raw(b'"' + text + b'"') for text in (b"\\ud800", b"\\udc00\\ud800", b"\\ud83d\\ude00")),
    *(Raw(b'"' + text + b'"') for text in (b"a\\u0000", b"\\u0061", b"\\/", b"\\x61", b"\\u12")),
    *(Raw(b'"' + text + b'"') for text in (b"a\0", b"a\n", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80")),
    *(Raw(b'"' + text + b'"') for text in (b"\xf4\x90\x80\x80", b"a\\", b"\xef\xbb\xbf", b"\\")),
    *(Raw(b"'a'"), Raw(b"a"), Raw(b'"a'), Raw(b'"a""b"')),
)
VALUES: tuple[object, ...] = (
    *(True, False, None, Raw(b"{}"), Raw(b"[]"), Raw(b"[[]]"), Raw(b"[1,]"), Raw(b"{,}"), Raw(b"")),
    *(Raw(b"[" * 60 + b"]" * 60), Raw(b"[" * 130 + b"]" * 130), Raw(b"[" * 2000)),
    *(Raw(b'{"a":' * 100 + b"1" + b"}" * 100), Raw(b'{"a":' * 1500 + b"1" + b"}" * 1500)),
    *(Raw(b"nul"), Raw(b"//"), Raw(b"/**/1"), Raw(b"undefined"), Raw(b"\x00"), Raw(b"\x0c")),
)
BYTES = (
    *(b"\0", b"\xff", b"\x1f", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"\\", b",", b":", b"{"),
    *(b"}", b"[", b"]", b" ", b"\t", b"\n", b"\r", b"\f", b"\xa0", b"-", b"0", b"9", b"1e0", b"."),
    *(b"null", b"true", b"\\u0000", b"\\ud800", b'"__metadata__":', b'"dtype":', b"{}", b"[]"),
)
Change = Callable[[Random, Any], Any]


def odd_value(random: Random) -> Any:
    """Something that hardly belongs where it will stand."""
    return random.choice(random.choice((NUMBERS, NUMBERS, STRINGS, VALUES)))


def changed(random: Random, value: Any, odd: Callable[[Random], Any] = odd_value) -> Any:
    """`value` changed in one place, chosen by going down at random."""
    inner = value.items if isinstance(value, Pairs) else value
    if isinstance(inner, list) and inner and random.random() < 0.85:
        at = random.randrange(len(inner))
        return _changed_within(random, value, at, odd)
    if type(value) is int and random.random() < 0.5:
        return value + random.choice((-2, -1, 1, 2, 8, value, -value))
    wrap = random.random()
    if wrap < 0.05:
        return [value]
    return Pairs([("a", value)]) if wrap < 0.1 else odd(random)


def _changed_within(random: Random, value: Any, at: int, odd: Callable[[Random], Any]) -> Any:
    """A list or an object, changed at or below its place `at`."""
    pairs = isinstance(value, Pairs)
    inner = list(value.items if pairs else value)
    act = random.random()
    if act < 0.6:
        item = inner[at]
        inner[at] = (item[0], changed(random, item[1], odd)) if pairs else changed(random, item)
    elif act < 0.68:
        del inner[at]
    elif act < 0.78:
        other = inner[random.randrange(len(inner))]
        inner.insert(random.randrange(len(inner) + 1), other)
    elif act < 0.86:
        other_at = random.randrange(len(inner))
        inner[at], inner[other_at] = inner[other_at], inner[at]
    elif pairs and act < 0.93:
        other = inner[random.randrange(len(inner))]
        inner[at] = (inner[at][0], other[1])
    elif pairs:
        inner[at] = (random.choice(STRINGS), inner[at][1])
    else:
        inner.insert(at, odd(random))
    return Pairs(inner) if pairs else inner


def spelled(random: Random, value: Any) -> bytes:
    """`value` as JSON in one of many spellings, blanks behind it."""
    blank = random.choice((b"", b"", b"", b" ", b"\n\t ", b"\r"))
    ascii_ = random.random() < 0.5
    parts: list[bytes] = []
    _spell(value, blank, ascii_, parts)
    return b"".join(parts) + random.choice((b"", b"", b" " * random.randrange(9)))


def _spell(value: Any, blank: bytes, ascii_: bool, parts: list[bytes]) -> None:
    if isinstance(value, Raw):
        parts.append(value.text)
    elif isinstance(value, Pairs):
        for number, (key, inner) in enumerate(value.items):
            parts.append(b"," + blank if number else b"{" + blank)
            _spell(key, blank, ascii_, parts)
            parts.append(blank + b":")
            _spell(inner, blank, ascii_, parts)
        parts.append(b"}" if value.items else b"{}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            parts.append(b"," + blank if number else b"[")
            _spell(inner, blank, ascii_, parts)
        parts.append(blank + b"]" if value else b"[]")
    elif isinstance(value, str):
        parts.append(_quoted(value, ascii_))
    elif value is None or isinstance(value, bool):
        parts.append({True: b"true", False: b"false", None: b"null"}[value])
    else:
        parts.append(repr(value).encode())


def _quoted(text: str, ascii_: bool) -> bytes:
    def letter(sign: str) -> str:
        code = ord(sign)
        if sign in '"\\':
            return "\\" + sign
        if code < 0x20 or (ascii_ and 0x7F <= code < 0x10000) or 0xD800 <= code < 0xE000:
            return f"\\u{code:04x}"
        return sign

    return f'"{"".join(map(letter, text))}"'.encode()


def changed_bytes(random: Random, data: bytes, until: int | None = None) -> bytes:
    """`data` changed in one place before `until`: a bit, some bytes, or a piece of itself."""
    content = bytearray(data)
    until = min(until or len(content), len(content))
    at = random.randrange(until + 1)
    act = random.randrange(6)
    if act == 0 and content:
        content[min(at, len(content) - 1)] ^= 1 << random.randrange(8)
    elif act == 1:
        content[at:at] = random.choice(BYTES)
    elif act == 2:
        del content[at : at + random.choice((1, 1, 2, 7, 40))]
    elif act == 3:
        piece = content[at : at + random.randrange(60)]
        where = random.randrange(until + 1)
        content[where:where] = piece
    elif act == 4:
        content[at : at + 1] = random.randbytes(random.randrange(1, 5))
    else:
        content[at : at + random.randrange(1, 9)] = random.choice(BYTES)
    return bytes(content)


# Headers.

DTYPES = {"BOOL": 8, "U8": 8, "F8_E4M3": 8, "F4": 4, "F6_E2M3": 6, "BF16": 16, "F32": 32, "I64": 64}
NAMES = (
    *("a", "b", "model.layers.0.q_proj.weight", "model.layers.10.q_proj.weight", "é", "e\u0301"),
    *("", "a\0", "a\n", "x" * 200, "model.embed_tokens.weight", "\u202egnp.a", "😀", "__metadata_"),
)


def framed(random: Random, text: bytes, data: bytes) -> bytes:
    """A file with the header `text`; its length word now and then a lie."""
    length = len(text)
    if random.random() < 0.03:
        length = random.choice(
            (0, 1, 7, length - 1, length + 1, length + len(data), 2**63, 2**64 - 1)
        )
    return max(0, length).to_bytes(8, "little") + text + data


def _entries(random: Random) -> tuple[Pairs, int]:
    """The entries of a good header, in any order, and the size of the data."""
    entries: list[tuple[Any, Any]] = []
    position = 0
    for name in random.sample(NAMES, random.randrange(5)):
        dtype = random.choice(list(DTYPES))
        shape = [random.randrange(5) for _ in range(random.randrange(4))]
        bits = DTYPES[dtype] * math.prod(shape)
        if bits % 8:
            shape, bits = [*shape, 4], 4 * bits
        end = position + bits // 8
        entries.append((name, _entry(dtype, shape, position, end)))
        position = end
    if random.random() < 0.4:
        texts = random.sample(("format", "pt", "", "é", "a\nb"), 2)
        entries.append(("__metadata__", Pairs([(texts[0], texts[1])])))
    random.shuffle(entries)
    return Pairs(entries), position


def _entry(dtype: str, shape: list[Any], begin: int, end: int) -> Pairs:
    return Pairs([("dtype", dtype), ("shape", shape), ("data_offsets", [begin, end])])


def header_file(random: Random) -> bytes:
    """A whole .safetensors file that was good before it was changed in up to three places."""
    if random.random() < 0.01:
        return large_header_file(random)
    header, size = _entries(random)
    level = random.choice(("nothing", "tree", "tree", "tree", "tree", "bytes", "both"))
    value: Any = header
    if level in ("tree", "both"):
        for _ in range(random.choice((1, 1, 2, 3))):
            value = changed(random, value)
    text = spelled(random, value)
    size = max(0, size + (random.choice((-1, 1, 8)) if random.random() < 0.03 else 0))
    content = framed(random, text, bytes(at % 251 for at in range(size)))
    if level not in ("bytes", "both"):
        return content
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = changed_bytes(random, content, 8 + len(text))
        if random.random() < 0.8:  # else hardly any has a length that is true
            content = _with_true_length(content, len(text), size)
    return content


def _with_true_length(content: bytes, length: int, size: int) -> bytes:
    body = content[8:]
    return max(0, len(body) - size).to_bytes(8, "little") + body if length else content


def large_header_file(random: Random) -> bytes:
    """A file with a header of some hundred KB up to 1 MB, of one of many bulky kinds."""
    room = random.choice((100_000, 300_000, MEGABYTE - 1000))
    text, size = random.choice(BULKY)(random, room)
    text = text[: MEGABYTE - 100] if len(text) > MEGABYTE else text
    content = framed(random, text, bytes(size))
    if random.random() < 0.4:
        content = changed_bytes(random, content, 8 + len(text))
        content = _with_true_length(content, len(text), size)
    return content


Bulky = Callable[[Random, int], tuple[bytes, int]]


def many_tensors(random: Random, room: int) -> tuple[bytes, int]:
    """Thousands of tensors of a byte, in one spelling or another."""
    count = room // 90
    items = [(f"model.layers.{n}.weight", _entry("U8", [1], n, n + 1)) for n in range(count)]
    if random.random() < 0.3:
        random.shuffle(items)
    if random.random() < 0.3:
        items[random.randrange(count)] = random.choice(items)
    if random.random() < 0.3:
        items.append(("\\", _entry("U8", [0], count, count)))  # an escape: read value by value
    return spelled(random, Pairs(items)), count


def _one(value: bytes, name: bytes = b"a") -> bytes:
    return b'{"' + name + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]' + value + b"}}"


def _bulk(random: Random, room: int) -> tuple[bytes, int]:
    """One tensor, and something very long at one place or another."""
    long = random.choice(
        (
            *(b"9" * room, b"[" * room, b"[" * (room // 2) + b"]" * (room // 2), b" " * room),
            *(
                b'{"a":' * (room // 5),
                b"[" + b"1," * (room // 2) + b"1]",
                b'"' + b"a" * room + b'"',
            ),
            *(
                b'"' + b"\\u0061" * (room // 6) + b'"',
                b"[" + b"9223372036854775807," * (room // 20),
            ),
            *(b"[" + b"9" * 4200 + b"," + b"9" * 4200 + b"]", b"1." + b"0" * room, b"\0" * room),
            *(
                b"[" + b",".join([b"8" * 4000] * (room // 4001)) + b"]",
                b'"' + b"\xff" * room + b'"',
            ),
            *(b"{" + b'"a":1,' * (room // 6) + b'"b":2}', b"1e" + b"9" * room, b"-" * room),
        )
    )
    where = random.randrange(5)
    if where == 0:
        return _one(b',"q":' + long), 1
    if where == 1:
        return b'{"a":{"dtype":"U8","shape":' + long + b',"data_offsets":[0,1]}}', 1
    if where == 2:
        return b'{"a":{"dtype":' + long + b',"shape":[1],"data_offsets":[0,1]}}', 1
    if where == 3:
        return b'{"a":{"dtype":"U8","shape":[1],"data_offsets":' + long + b"}}", 1
    return b'{"__metadata__":' + long + b"," + _one(b"")[1:], 1


def _long_name(random: Random, room: int) -> tuple[bytes, int]:
    piece = random.choice((b"a", b".", b"a.", b"1.", b"\xc3\xa9", b"*.", b"layers.0."))
    return _one(b"", piece * (room // len(piece)) + b"weight"), 1


def _metadata(random: Random, room: int) -> tuple[bytes, int]:
    texts = b",".join(b'"%d":"%d"' % (n, n) for n in range(room // 16))
    return b'{"__metadata__":{' + texts + b"}," + _one(b"")[1:], 1


def _long_shapes(random: Random, room: int) -> tuple[bytes, int]:
    sides = random.choice((b"1,", b"0,", b"2,", b"1, "))
    shape = b"[" + sides * (room // len(sides)) + b"1]"
    return b'{"a":{"dtype":"U8","shape":' + shape + b',"data_offsets":[0,1]}}', 1


BULKY: tuple[Bulky, ...] = (many_tensors, _bulk, _bulk, _long_name, _metadata, _long_shapes)


# Indexes.


def index_bytes(random: Random, weight_map: Mapping[str, str], files: Sequence[str]) -> bytes:
    """An index that was `weight_map` before; `files` are names that may come into it."""
    if random.random() < 0.01:
        return _large_index(random, weight_map)

    def odd(random: Random) -> Any:
        return random.choice(files) if random.random() < 0.6 else odd_value(random)

    value = tree({"metadata": {"total_size": 0}, "weight_map": weight_map})
    for _ in range(random.choice((0, 1, 1, 1, 2, 4))):
        value = changed(random, value, odd)
    content = spelled(random, value)
    return changed_bytes(random, content) if random.random() < 0.2 else content


def _large_index(random: Random, weight_map: Mapping[str, str]) -> bytes:
    room = random.choice((100_000, 900_000))
    file = next(iter(weight_map.values())).encode()
    listed = b",".join(b'"t%d":"%s"' % (n, file) for n in range(room // (len(file) + 12)))
    bulk = random.choice(
        (
            *(b'{"weight_map":{' + listed + b"}}", b"[" * room, b'{"weight_map":' * (room // 15)),
            *(b'{"weight_map":{"a":"' + b"x" * room + b'.safetensors"}}', b"9" * room),
            b'{"weight_map":{"' + b"a." * (room // 2) + b'":"' + file + b'"}}',
            b'{"metadata":[' + b"1," * (room // 2) + b'1],"weight_map":{"a":"' + file + b'"}}',
            b'{"weight_map":{' + b'"a":"%s",' % file * (room // (len(file) + 7)) + b'"a":1}}',
        )
    )
    return changed_bytes(random, bulk) if random.random() < 0.3 else bulk


# Configs.

MODEL_TYPES = (
    *("llama", "qwen3_moe", "llama4", "llama4_text", "qwen3_vl_moe", "mistral4", "granitemoe"),
    *("gpt_oss", "aria", "step3p5", "inkling_mm_model", "glm5_next", "gpt2", "mamba", "llava"),
    *("nemotron_h", "bailing_v3", "gemma4", "qwen3_5_moe", "deepseek_v3", ""),
)
CONFIG_KEYS = (
    *("architectures", "model_type", "hidden_size", "n_embd", "d_model", "dim", "vocab_size"),
    *("num_hidden_layers", "n_layers", "num_layers", "encoder_layers", "tie_word_embeddings"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_topk"),
    *("intermediate_size", "moe_intermediate_size", "ffn_dim", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "text_config", "vision_config", "thinker_config", "audio_config"),
    *("quantization_config", "compression_config", "torch_dtype", "type_vocab_size", "auto_map"),
    *("text_vocab_size", "llm_config", "language_config", "head_dim"),
)
QUANTIZED: tuple[Mapping[str, Any], ...] = (
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "format": "x"},
    {"config_groups": {"g": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}},
)


def config_bytes(random: Random, config: Mapping[str, Any]) -> bytes:
    """A config.json that was `config` before."""
    if random.random() < 0.01:
        return _large_config(random)
    value = tree(config)
    for _ in range(random.choice((0, 1, 1, 2, 4, 8))):
        if random.random() < 0.6:
            _set_key(random, value)
        else:
            value = changed(random, value)
            if not isinstance(value, Pairs):
                break
    content = spelled(random, value)
    return changed_bytes(random, content) if random.random() < 0.1 else content


def _set_key(random: Random, value: Pairs) -> None:
    """Sets a key that is read, here or in a config inside, to something good, odd or nested."""
    inside = [inner for _, inner in value.items if isinstance(inner, Pairs) and inner is not value]
    target = random.choice(inside) if inside and random.random() < 0.3 else value
    key = random.choice(CONFIG_KEYS)
    what = random.random()
    if key == "model_type" and what < 0.8:
        new: Any = random.choice(MODEL_TYPES)
    elif key.startswith(("quantization", "compression")) and what < 0.6:
        new = tree(random.choice(QUANTIZED))
        new = changed(random, new) if random.random() < 0.7 else new
    elif what < 0.15:
        new = Pairs([(random.choice(CONFIG_KEYS), odd_value(random)) for _ in range(3)])
    elif what < 0.25:
        new = [odd_value(random) for _ in range(random.randrange(4))]
    elif what < 0.45:
        new = random.choice((1, 2, 4, 8, 16, 64, 96, 128, 256))
    else:
        new = odd_value(random)
    target.items[:] = [item for item in target.items if item[0] != key] + [(key, new)]


def _large_config(random: Random) -> bytes:
    room = random.choice((100_000, 900_000))
    key = random.choice(CONFIG_KEYS).encode()
    bulk = random.choice(
        (
            *(b"[" * room, b'{"a":' * (room // 5), b'"' + b"a" * room + b'"', b"9" * room),
            *(b"[" * 900 + b"]" * 900, b'{"text_config":' * 300 + b"1" + b"}" * 300),
            b"[" * 300 + b"1," * (room // 2) + b"1" + b"]" * 300,
            b"[" + b",".join([b"8" * 4000] * (room // 4001)) + b"]",
            b"{" + b",".join(b'"num_experts_%d":%d' % (n, n) for n in range(room // 26)) + b"}",
            b"{"
            + b",".join(b'"c%d":{"num_experts":%d}' % (n, n + 1) for n in range(room // 28))
            + b"}",
            b'{"quant_method":"' + b"a" * room + b'"}',
            b'{"quant_method":' + b"[" * 400 + b"]" * 400 + b"}",
            b'{"config_groups":{'
            + b",".join(b'"%d":{"weights":{}}' % n for n in range(room // 24))
            + b"}}",
        )
    )
    return b'{"model_type":"llama","hidden_size":128,"vocab_size":96,"' + key + b'":' + bulk + b"}"


# Whole plans, from names and shapes.

_PARTS = (
    *("model", "layers", "0", "1", "2", "10", "self_attn", "mlp", "experts", "moe", "q_proj"),
    *("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "gate"),
    *("router", "norm", "input_layernorm", "embed_tokens", "lm_head", "vision_tower", "conv1d"),
    *("weight", "bias", "mtp", "shared_experts", "A_log", "D", "dt_proj", "w1", "w2", "w3", "fc1"),
    *("expert_3", "999999999", "1000000000", "٣", "*", "?", "-1", "", "re:.*", "é", "e\u0301"),
    *("a b", "a\nb", "\x1b[31m", "(", "[", "\\", "a" * 80, "weight_scale", "weight_scale_inv"),
)


def journal_bytes(random: Random) -> bytes:
    """A journal of an unfinished run, whose lines may be changed and carry the checksum all the
    same, or be cut, joined or changed behind it."""
    first = {"journal": 1, "fp8stream": "1", "--ignore": ["a"], "a.safetensors": [1, 2, "c"]}
    records: list[Any] = [
        {"layers": [[at, at + random.randint(1, 9)]]} for at in range(random.randint(0, 60))
    ]
    values: list[Any] = [first, *records, {"inode": random.randint(0, 1 << 40)}]
    if random.random() < 0.02:
        wide = [[at, at + 1] for at in range(random.randint(1, 60_000))]
        deep = Raw(b'{"layers": ' + b"[" * random.randint(1, 10**6))
        values.append(random.choice((deep, {"layers": wide}, {"layers": Raw(b"9" * 10**6)})))
    lines = []
    for value in values:
        kept = tree(value)
        if random.random() < 0.03:
            kept = changed(random, kept)
        text = spelled(random, kept)
        lines.append(b"%08x %s\n" % (zlib.crc32(text), text))
    content = b"".join(lines)
    return changed_bytes(random, content) if random.random() < 0.4 else content


def model_header(random: Random) -> bytes:
    """The header of a good file of tensors with odd names and shapes that a model might have."""
    names = _model_names(random)
    sides = (1, 2, 3, 16, 63, 64, 96, 128, 192, 256)
    items: list[tuple[Any, Any]] = []
    position = 0
    for name in dict.fromkeys(names):
        dtype = random.choice(("BF16", "BF16", "BF16", "F16", "F32", "U8", "F8_E4M3", "I64"))
        dims = random.choice((0, 1, 1, 2, 2, 2, 2, 3, 3, 4))
        shape: list[Any] = [
            random.choice((*sides, 0)) if random.random() < 0.1 else random.choice(sides[2:])
            for _ in range(dims)
        ]
        end = position + DTYPES.get(dtype, 16) * math.prod(shape) // 8
        items.append((name, _entry(dtype, shape, position, end)))
        position = end
    return spelled(random, Pairs(items))


def _model_names(random: Random) -> list[str]:
    act = random.random()
    if act < 0.01:
        return _bulky_names(random)
    names = [".".join(random.choices(_PARTS, k=random.randrange(1, 8))) for _ in range(12)]
    for layer in range(random.randrange(3)):
        for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.0.w1"):
            names.append(f"model.layers.{layer}.{leaf}.weight")
    return names


def _bulky_names(random: Random) -> list[str]:
    """Some hundred KB of names: deep ones, or thousands that differ in more than numbers."""
    count = random.choice((300, 1000, 4000))
    part = random.choice(_PARTS[:36])
    return random.choice(
        (
            ["a." * random.choice((70, 1000, 100_000)) + "weight"],
            [f"a{n}." * 300 + "weight" for n in range(count // 10)],
            [f"e{n}.embed_tokens.weight" for n in range(count)]
            + [f"a{n}.0.w" for n in range(count)],
            [f"model.layers.0.x{n}.weight" for n in range(count)],
            [f"model.layers.{n}.{part}.{p}" for n in range(count) for p in ("weight", "bias")],
            [f"model.layers.0.experts.x{n}" for n in range(count)],
            [f"model.layers.{n}.{part}{n}.weight" for n in range(count)],
            [f"h{n}.weight" for n in range(count)] + ["layers.0.w.weight"],
        )
    )
