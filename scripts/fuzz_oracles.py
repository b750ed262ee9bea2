"""What every hostile input must come to: a value that an independent reader confirms, or our error.

A kind of input is a maker of bytes and a function of bytes under test, which returns a value or
raises Fp8StreamError. Only that call is measured; `judge` then looks at what came of it.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NoReturn

import safetensors
from fuzz_inputs import config_bytes, header_file, index_bytes, journal_bytes, model_header

from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.errors import Fp8StreamError, SchemeError
from fp8stream.experts import ExpertForm, ExpertLayout, ExpertOptions
from fp8stream.header import Shard, read_shard
from fp8stream.journal import parse_journal
from fp8stream.parallel import edges
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.report import dump, plan_json, print_plan, tensor_lines
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from fp8stream.structure import Config

LONGEST_MESSAGE = 1000
# Seconds after which an input counts as one that never ends.
HUNG = 20
# What grep, awk and a terminal take for the end of a line.
LINE_ENDS = set("\n\r\v\f\x1c\x1d\x1e\x85")
Listing = list[tuple[str, str, list[int], bytes]]
deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


@dataclass(frozen=True)
class Verdict:
    """What came of an input: what is wrong, if anything, and why it was refused by us alone."""

    problem: str = ""
    alone: str = ""


def is_ours(data: bytes, found: object) -> Verdict:
    """No more to say than that there was a value or one of our errors."""
    return Verdict()


@dataclass(frozen=True)
class Kind:
    """`make` gives an input, `subject` is tested and measured, `judge` says whether it is right."""

    make: Callable[[Random], bytes]
    subject: Callable[[bytes], object]
    judge: Callable[[bytes, object], Verdict] = is_ours


@dataclass(frozen=True)
class Result:
    """One input: seconds and bytes of memory at most, whether a value came, and what was wrong."""

    seconds: float
    memory: int
    accepted: bool
    verdict: Verdict


class Hung(BaseException):
    """An input took so long that it was given up."""


def examine(kind: Kind, data: bytes) -> Result:
    """Puts one input through the subject, measured, and has it judged."""
    crash = ""
    before = _start_peak()
    start = time.perf_counter()
    try:
        with _alarm():
            found: object = kind.subject(data)
    except Fp8StreamError as error:
        found = error
    except Hung:
        found, crash = None, f"given up after {HUNG} s"
    except Exception as error:
        found, crash = None, f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.perf_counter() - start
    memory = _memory("VmHWM") - before
    accepted = not crash and not isinstance(found, Fp8StreamError)
    if crash:
        return Result(seconds, memory, False, Verdict(f"crash: {crash}"))
    if isinstance(found, Fp8StreamError) and (problem := wrong_message(found)):
        return Result(seconds, memory, False, Verdict(problem))
    return Result(seconds, memory, accepted, kind.judge(data, found))


def wrong_message(error: Fp8StreamError) -> str:
    """What is wrong with an error's message; empty if nothing is."""
    text = str(error)
    if len(text) > LONGEST_MESSAGE:
        return f"a message of {len(text)} characters: {text[:100]}"
    return "advice for a Python programmer" if "sys.set" in text else ""


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> NoReturn:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HUNG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _start_peak() -> int:
    """Sets the peak of resident memory back to what there is now, and tells that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _memory("VmHWM")  # not allowed: the peak of all before counts
    return _memory("VmRSS")


def _memory(field: str) -> int:
    with open("/proc/self/status", "rb") as stream:
        found = re.search(rf"{field}:\s+(\d+) kB".encode(), stream.read())
    return 1024 * int(found[1]) if found else 0


# Headers: what is accepted, the reference accepts and reads the same.


def reference(content: bytes) -> Listing | None:
    """Name, dtype, shape and bytes of every tensor by the reference parser; None if it refuses."""
    try:
        found = deserialize(content)
    except safetensors.SafetensorError:
        return None
    return sorted((name, t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in found)


def listing(shard: Shard, content: bytes) -> Listing:
    return sorted(
        (t.name, t.dtype, list(t.shape), content[t.offset : t.offset + t.nbytes])
        for t in shard.tensors
    )


def headers(directory: Path) -> Kind:
    """Whole .safetensors files."""
    path = directory / "fuzz.safetensors"

    def subject(data: bytes) -> Shard:
        path.write_bytes(data)
        return read_shard(path)

    def judge(data: bytes, found: object) -> Verdict:
        expected = reference(data)
        if isinstance(found, Shard):
            if expected is None:
                return Verdict("accepted what safetensors refuses")
            if listing(found, data) != expected or not _opens_alike(path, found):
                return Verdict("read otherwise than safetensors reads it")
            return Verdict()
        return Verdict(alone=message_class(found, path)) if expected is not None else Verdict()

    return Kind(header_file, subject, judge)


def _opens_alike(path: Path, shard: Shard) -> bool:
    """Whether `safe_open`, which maps the file, finds the same names, dtypes and shapes."""
    with safetensors.safe_open(str(path), framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    return found == {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}


def message_class(error: object, path: Path) -> str:
    """The message without what differs from input to input."""
    text = str(error).replace(str(path), "FILE")
    text = re.sub(r"tensor ('.*?'|\".*?\"|\S+ characters\)):", "tensor NAME:", text)
    text = re.sub(r"the key .* stands", "the key NAME stands", text)
    return re.sub(r"found .*", "found ...", re.sub(r"\d+", "N", text))[:110]


# Indexes: what is read is what they name, and it lies beside them.


class _Watch:
    """The paths that are opened while it looks. An audit hook stays for good, so there is one."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.opened is not None and isinstance(arguments[0], (str, bytes)):
            self.opened.append(os.fsdecode(arguments[0]))


def tensor_file(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """A good file of `name: (dtype, shape, bytes)`, all zeros."""
    header: dict[str, Any] = {}
    position = 0
    for name, (dtype, shape, size) in tensors.items():
        offsets = [position, position + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(position)


GOOD = ("one.safetensors", "two.safetensors")
ZOO = (
    *("third.safetensors", "again.safetensors", "broken.safetensors", "empty.safetensors"),
    *("fifo.safetensors", "folder.safetensors", "loop.safetensors", "zero.safetensors"),
    *("stdin.safetensors", "gone.safetensors", "outside.safetensors", "caf\u00e9.safetensors"),
    *("cafe\u0301.safetensors", "up.safetensors", ".safetensors"),
)
PATHS = (
    *("../outside/out.safetensors", "./one.safetensors", "/etc/passwd", "/dev/zero", "..", "."),
    *(
        "folder.safetensors/in.safetensors",
        "one.safetensors\0",
        "one.safetensors/",
        "",
        "config.json",
    ),
    *("..\\one.safetensors", "C:one.safetensors", "one.SAFETENSORS", " one.safetensors"),
    *("x" * 260 + ".safetensors", "é" * 200 + ".safetensors", "model.safetensors.index.json"),
    *("absent.safetensors", "/dev/fd/0", "/proc/self/mem", "~/.ssh/id_rsa", "one.safetensors\n"),
)


def make_zoo(directory: Path) -> dict[str, str]:
    """A checkpoint with all kinds of things in place of files. The weight_map of its good files."""
    outside, source = directory / "outside", directory / "source"
    for path in (outside, source, source / "folder.safetensors"):
        path.mkdir(parents=True)
    tensors = {file: {f"{file[:3]}.{n}.weight": ("U8", [n], n) for n in range(4)} for file in GOOD}
    for file, declared in tensors.items():
        (source / file).write_bytes(tensor_file(declared))
    files = {
        "third.safetensors": tensor_file({"third": ("F32", [1], 4)}),
        "again.safetensors": tensor_file({"one.0.weight": ("U8", [0], 0)}),
        "caf\u00e9.safetensors": tensor_file({"caf\u00e9": ("U8", [1], 1)}),
        "cafe\u0301.safetensors": tensor_file({"cafe\u0301": ("U8", [1], 1)}),
        "folder.safetensors/in.safetensors": tensor_file({"in": ("U8", [1], 1)}),
        ".safetensors": tensor_file({"dot": ("U8", [1], 1)}),
        "broken.safetensors": b"\xff" * 40,
        "empty.safetensors": b"",
        "config.json": b'{"model_type": "llama"}',
    }
    for file, content in files.items():
        (source / file).write_bytes(content)
    (outside / "out.safetensors").write_bytes(tensor_file({"out": ("U8", [1], 1)}))
    os.mkfifo(source / "fifo.safetensors")
    links = {"loop": "loop.safetensors", "zero": "/dev/zero", "stdin": "/dev/stdin", "up": ".."}
    links |= {"gone": "nowhere", "outside": "../outside/out.safetensors"}
    for name, target in links.items():
        (source / f"{name}.safetensors").symlink_to(target)
    return {name: file for file, declared in tensors.items() for name in declared}


def indexes(directory: Path) -> Kind:
    """Indexes, in a directory of good files and others."""
    weight_map = make_zoo(directory / "zoo")
    source = directory / "zoo" / "source"
    index = source / "model.safetensors.index.json"
    watch = _Watch()

    def make(random: Random) -> bytes:
        return index_bytes(random, weight_map, (*GOOD, *ZOO, *ZOO, *PATHS))

    def subject(data: bytes) -> Checkpoint:
        index.write_bytes(data)
        watch.opened = []
        return open_checkpoint(source)

    def judge(data: bytes, found: object) -> Verdict:
        opened, watch.opened = watch.opened or [], None
        if strange := [p for p in opened if not _may_be_opened(p, source)]:
            return Verdict(f"opened {strange[0]}")
        return (
            Verdict(_misread_index(data, found, source))
            if isinstance(found, Checkpoint)
            else Verdict()
        )

    return Kind(make, subject, judge)


def _may_be_opened(path: str, source: Path) -> bool:
    """Whether `path` is a regular file in the directory itself, or a directory of it."""
    if path.startswith(("/proc/self/", "/sys/")):
        return True
    beside = Path(path).parent == source and Path(path).is_file()
    return beside or Path(path).is_dir()


def _misread_index(data: bytes, found: Checkpoint, source: Path) -> str:
    """Whether the checkpoint is the files that the index names, as the reference reads them."""
    listed = json.loads(data)["weight_map"]
    if {shard.name for shard in found.shards} != set(listed.values()):
        return "other files than those of the index"
    owners: dict[str, str] = {}
    for file in set(listed.values()):
        with safetensors.safe_open(str(source / file), framework="numpy") as opened:
            owners |= dict.fromkeys(opened.keys(), file)
    if any(owners.get(name) != file for name, file in listed.items()):
        return "a tensor is not in the file that the index says"
    if sorted(tensor.name for tensor in found.tensors) != sorted(owners):
        return "other tensors than those of the files"
    return ""


# Configs and names: whatever they say, a plan or our error.

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
MOE = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 1}
STACKED = {**LLAMA, "model_type": "llama4_text", "num_local_experts": 2}
NESTED = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"hidden_size": 64}}
RESOURCES = Resources(1 << 30, 2, 5 * 10**9)
SCHEMES = [
    Scheme(g, f)
    for g in Granularity
    for f in OutputFormat
    if (g, f) != (Granularity.CHANNEL, OutputFormat.FP8)
]
FORMS = [
    *(ExpertOptions(form) for form in (ExpertForm.AUTO, ExpertForm.AUTO, *ExpertForm)),
    *(ExpertOptions(ExpertForm.AUTO, layout) for layout in ExpertLayout),
    *(ExpertOptions(ExpertForm.PER_EXPERT, layout) for layout in ExpertLayout),
]


def _llama(prefix: str = "model") -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {
        f"{prefix}.embed_tokens.weight": [96, 128],
        "lm_head.weight": [96, 128],
    }
    for layer in range(2):
        at = f"{prefix}.layers.{layer}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": [128, 128] for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": [256, 128] for p in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": [128, 256], f"{at}.input_layernorm.weight": [128]}
    return shapes


def _models() -> list[tuple[Mapping[str, Any], dict[str, list[int]]]]:
    plain = _llama()
    dense = {name: shape for name, shape in plain.items() if ".mlp." not in name}
    at = "model.layers.0"
    moe = {
        f"{at}.mlp.experts.{n}.{leaf}.weight": shape
        for n in range(4)
        for leaf, shape in (
            ("gate_proj", [256, 128]),
            ("up_proj", [256, 128]),
            ("down_proj", [128, 256]),
        )
    }
    stacked = {
        f"{at}.feed_forward.experts.gate_up_proj": [2, 128, 512],
        f"{at}.feed_forward.experts.down_proj": [2, 256, 128],
        f"{at}.feed_forward.router.weight": [2, 128],
    }
    tower = {
        "vision_tower.layers.0.fc1.weight": [64, 64],
        "vision_tower.patch.weight": [64, 3, 2, 2],
    }
    return [
        (LLAMA, plain),
        (MOE, {**dense, **moe, f"{at}.mlp.gate.weight": [4, 128]}),
        (STACKED, {**dense, **stacked}),
        (NESTED, {**_llama("language_model.model"), **tower}),
        ({**LLAMA, "model_type": "gpt2"}, {**plain, f"{at}.attn.qkv_proj.weight": [384, 128]}),
    ]


def plan_everything(source: Path, choice: int) -> Plan | SchemeError:
    """The plan of the checkpoint at `source` and all that is shown of it, under one scheme."""
    checkpoint = open_checkpoint(source)
    scheme, experts = SCHEMES[choice % len(SCHEMES)], FORMS[choice // 7 % len(FORMS)]
    plan = plan_quantization(checkpoint, scheme, Patterns(), RESOURCES, experts)
    json.dumps(plan.config, indent=2)  # as config.json is written
    edges(plan, Config(checkpoint.config), 1 + choice // 5 % 8)
    dump(plan_json(checkpoint, plan), pretty=False)
    if choice % 8 == 0 and len(plan.kinds) < 500:  # a large table takes rich its time
        print_plan(checkpoint, plan, io.StringIO())
        lines = list(tensor_lines(plan))
        if len(lines) != len(plan.tensors) or any(line.count("\t") != 7 for line in lines):
            raise ValueError("a tensor whose line is not eight fields")
        if any(set(line) & LINE_ENDS for line in lines):
            raise ValueError("a tensor whose line is not one line")
    return plan


def configs(directory: Path) -> Kind:
    """Values of config.json, beside small models of several kinds."""
    models = _models()
    for number, (_, shapes) in enumerate(models):
        place = directory / f"model-{number}"
        place.mkdir()
        sizes = {n: ("BF16", shape, 2 * _product(shape)) for n, shape in shapes.items()}
        (place / "model.safetensors").write_bytes(tensor_file(sizes))

    def make(random: Random) -> bytes:
        return config_bytes(random, random.choice(models)[0])

    def subject(data: bytes) -> object:
        choice = zlib.crc32(data)
        place = directory / f"model-{choice % len(models)}"
        (place / "config.json").write_bytes(data)
        return plan_everything(place, choice // len(models))

    return Kind(make, subject)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result


def names(directory: Path) -> Kind:
    """Good headers of tensors with odd names and shapes, all the way to a plan."""
    place = directory / "names"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**MOE, "hidden_size": 64}))

    def subject(data: bytes) -> object:
        ends = [int(end) for end in re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d+)', data)]
        with (place / "model.safetensors").open("wb") as stream:
            stream.write(len(data).to_bytes(8, "little") + data)
            stream.truncate(8 + len(data) + max(ends, default=0))  # holes take no room
        return plan_everything(place, zlib.crc32(data))

    return Kind(model_header, subject)


def journals(directory: Path) -> Kind:
    """Journals of unfinished runs: no more is believed than lines that are whole say."""

    def subject(data: bytes) -> object:
        journal = parse_journal(data)
        return journal, journal.done(1000)

    return Kind(journal_bytes, subject, _judge_journal)


def _judge_journal(data: bytes, found: object) -> Verdict:
    if isinstance(found, Fp8StreamError):
        return Verdict()
    assert isinstance(found, tuple)
    journal, done = found
    expected: set[int] = set()
    for line in data[: journal.size].split(b"\n")[:-1]:
        if b"%08x " % zlib.crc32(line[9:]) != line[:9]:
            return Verdict("a line was believed whose checksum is wrong")
        for begin, end in json.loads(line[9:]).get("layers", []):
            expected |= set(range(begin, end))
    return Verdict() if done == expected else Verdict("other layers than the lines tell")


KINDS: Mapping[str, Callable[[Path], Kind]] = {
    "headers": headers,
    "indexes": indexes,
    "configs": configs,
    "names": names,
    "journals": journals,
}
