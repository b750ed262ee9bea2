"""The plan and the result, for the eye as rich tables, for programs as JSON or tab-separated lines.

The JSON keys are a promise: measurements read them. Nothing here decides anything.
"""

import io
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fp8stream.checkpoint import Checkpoint
from fp8stream.clock import Clock
from fp8stream.expectation import LayerError, Problem
from fp8stream.memory import MemoryUsage, format_size
from fp8stream.names import numbers_in, spans
from fp8stream.parallel import safe_sizes
from fp8stream.plan import Plan, TensorPlan
from fp8stream.roles import Role
from fp8stream.scheme import Granularity
from fp8stream.structure import Config
from fp8stream.summary import active_parameters, largest_layer, spread_modules
from fp8stream.weights import Kind

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
# Wide enough that nothing a person greps for is cut where there is no terminal to ask.
PIPED_WIDTH = 240
# Below this the table would break names apart.
NARROW = 130
# What of the layers and problems that verify found is shown; --json has all.
WORST = 10
BINS = 12
BAR = 50
PROBLEMS = 50


@dataclass(frozen=True)
class Result:
    """What a conversion did. Sizes in bytes; `device_peak` is allocated and reserved. Of the units
    of work `layers_there` were on disk already, and what was read is what the others took."""

    output: str
    seconds: float
    bytes_read: int
    bytes_written: int
    layers_there: int
    peak: MemoryUsage
    baseline: MemoryUsage
    device_peak: tuple[int, int]
    clock: Clock

    @property
    def host_bytes(self) -> int:
        """Peak anonymous host memory over the baseline."""
        return self.peak.anonymous - self.baseline.anonymous


@dataclass(frozen=True)
class Verdict:
    """What `verify` found. `planned` is the sum of the buffers, in bytes; `not_compared` names
    tensors, `added_files` the files that are not either."""

    output: str
    exact: bool
    tensors: int
    bytes_read: int
    seconds: float
    peak: MemoryUsage
    baseline: MemoryUsage
    planned: int
    problems: tuple[Problem, ...]
    layers: tuple[LayerError, ...]
    not_compared: tuple[str, ...]
    added_files: tuple[str, ...]

    @property
    def host_bytes(self) -> int:
        """Peak anonymous host memory over the baseline."""
        return self.peak.anonymous - self.baseline.anonymous


def plan_json(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The document of `inspect --json` and `quantize --dry-run --json`."""
    dtypes = checkpoint.bytes_by_dtype
    return {
        "schema": SCHEMA,
        "source": {
            "path": str(checkpoint.path),
            "architecture": checkpoint.architecture,
            "model_type": checkpoint.model_type,
            "files": len(checkpoint.shards),
            "tensors": len(checkpoint.tensors),
            "parameters": checkpoint.parameters,
            "bytes": sum(dtypes.values()),
            "dtypes": dtypes,
            "quantized_as": checkpoint.quantized_as,
        },
        "plan": {
            "scheme": plan.scheme.granularity.value,
            "format": plan.scheme.format.value,
            "layers_quantized": plan.layers_quantized,
            "layers_kept": plan.layers_kept,
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
            "output_files": len(plan.files),
            "peak_memory_bytes": plan.workspace.total_bytes,
        },
        "tensors": [_tensor_json(tensor, plan.fused_with) for tensor in plan.tensors],
        "warnings": list(plan.warnings),
    }


def _tensor_json(tensor: TensorPlan, fused: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {
        "name": tensor.spec.name,
        "dtype": tensor.spec.dtype,
        "shape": list(tensor.spec.shape),
        "file": tensor.spec.file,
        "role": tensor.role.value,
        "action": tensor.action,
        "scheme": tensor.granularity.value if tensor.granularity else None,
        "reason": tensor.reason,
        "fused_with": list(fused.get(tensor.spec.name, ())),
        "outputs": tensor.output_names,
    }


def result_json(plan: Plan, result: Result) -> dict[str, Any]:
    """The document of `quantize --json`."""
    return {
        "schema": SCHEMA,
        "output": result.output,
        "seconds": round(result.seconds, 3),
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "layers_quantized": plan.layers_quantized,
        "layers_kept": plan.layers_kept,
        "peak_memory": {
            "host_anonymous_bytes": result.peak.anonymous,
            "host_resident_bytes": result.peak.resident,
            "baseline_anonymous_bytes": result.baseline.anonymous,
            "device_allocated_bytes": result.device_peak[0],
            "device_reserved_bytes": result.device_peak[1],
        },
        "layers_continued": result.layers_there,
        "workers": plan.workspace.workers,
        "stages": {
            stage.value: {"busy": round(spent.busy, 3), "blocked": round(spent.blocked, 3)}
            for stage, spent in result.clock.stages.items()
        },
    }


def tensor_lines(
    plan: Plan, wanted: "re.Pattern[str] | None" = None, by_size: bool = False
) -> Iterator[str]:
    """The lines of `inspect --tensors`, a tab between fields.

    Those alone in whose names `wanted` is found, in the plan's order or the largest first.
    """
    tensors = [t for t in plan.tensors if wanted is None or wanted.search(t.spec.name)]
    if by_size:
        tensors.sort(key=lambda tensor: -tensor.spec.nbytes)
    for tensor in tensors:
        fields = (
            tensor.spec.name,
            tensor.action,
            tensor.granularity.value if tensor.granularity else "-",
            tensor.spec.dtype,
            "x".join(map(str, tensor.spec.shape)) or "scalar",
            str(tensor.spec.nbytes),
            tensor.spec.file,
            tensor.reason,
        )
        yield "\t".join(map(escape, fields))


def escape(text: str) -> str:
    """Control characters as JSON writes them, so that a name is never more than one field."""
    return re.sub(
        "[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text
    )


def print_plan(checkpoint: Checkpoint, plan: Plan, stream: TextIO) -> None:
    """What the checkpoint holds, what would happen to it and why, and the forecast."""
    with _console(stream) as console:
        _print_rows(console, _source_rows(checkpoint, plan))
        _print_patterns(console, plan)
        console.print()
        _print_rows(console, _forecast_rows(checkpoint, plan))


def _source_rows(checkpoint: Checkpoint, plan: Plan) -> list[tuple[str, str]]:
    sizes = checkpoint.bytes_by_dtype.items()
    active = active_parameters(plan, Config(checkpoint.config))
    for_each = f", {active:,} of them for each token" if active else ""
    return [
        ("checkpoint", str(checkpoint.path)),
        ("architecture", _architecture(checkpoint)),
        ("parameters", f"{checkpoint.parameters:,}{for_each}"),
        ("tensors", f"{len(checkpoint.tensors):,} in {_files(checkpoint, plan)}"),
        ("bytes", ", ".join(f"{dtype} {format_size(size)}" for dtype, size in sizes)),
        ("output head", _head(plan, Config(checkpoint.config))),
        ("quantized as", _quantized_as(checkpoint)),
    ]


def _architecture(checkpoint: Checkpoint) -> str:
    named = [name for name in (checkpoint.architecture, checkpoint.model_type) if name]
    return f"{named[0]} ({named[-1]})" if len(named) > 1 else (named or ["not named"])[0]


def _files(checkpoint: Checkpoint, plan: Plan) -> str:
    sizes = [shard.size for shard in checkpoint.shards]
    if len(sizes) == 1:
        return "1 file"
    spread = spread_modules(plan)
    across = f", {spread:,} layers in more than one" if spread else ""
    return f"{len(sizes)} files of {format_size(min(sizes))} to {format_size(max(sizes))}{across}"


def _quantized_as(checkpoint: Checkpoint) -> str:
    if not checkpoint.quantized_as:
        return "not quantized"
    narrow = [t for t in checkpoint.tensors if t.itemsize == 1 and len(t.shape) > 1]
    share = 100 * sum(t.nbytes for t in narrow) / max(1, sum(t.nbytes for t in checkpoint.tensors))
    return f"{checkpoint.quantized_as}: {len(narrow):,} weights, {share:.0f} % of bytes"


def _head(plan: Plan, config: Config) -> str:
    if plan.tied:
        missing = config.ties_head is False
        return "not in the files" if missing else "tied to the embedding, written once"
    heads = [tensor.spec for tensor in plan.tensors if tensor.role is Role.LM_HEAD]
    return ", ".join(f"{head.name} {list(head.shape)}" for head in heads) or "none"


def _print_patterns(console: "Console", plan: Plan) -> None:
    rows = [_pattern_row(pattern, kinds) for pattern, kinds in collapse(plan.kinds)]
    console.print()
    if console.width < NARROW:
        _print_narrow(console, rows)
    else:
        _print_wide(console, rows)


def _pattern_row(pattern: str, kinds: Sequence[Kind]) -> tuple[str, ...]:
    spec, treatment = kinds[0].first, kinds[0].treatment
    return (
        escape(pattern),
        f"x{sum(len(kind.members) for kind in kinds)}",
        str(list(spec.shape)),
        spec.dtype,
        f"FP8 {treatment.granularity.value}" if treatment.granularity else "keep",
        format_size(sum(kind.nbytes for kind in kinds)),
        escape(_numberless(treatment.known.reason)),
    )


def _print_wide(console: "Console", rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for header in ("tensors", "count", "shape", "dtype", "action", "bytes", "reason"):
        justify: Literal["left", "right"] = "right" if header in ("count", "bytes") else "left"
        table.add_column(header, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_narrow(console: "Console", rows: Sequence[tuple[str, ...]]) -> None:
    """A line for the names, which are the widest, and an indented one for the rest."""
    from rich.text import Text

    for pattern, count, shape, dtype, action, size, reason in rows:
        console.print(Text(pattern, style="bold"))
        console.print(Text(f"    {count} {shape} {dtype} {size} -> {action}: {reason}"))


def collapse(kinds: Sequence[Kind]) -> list[tuple[str, list[Kind]]]:
    """Tensors that differ in layer and expert numbers alone, as `layers.[0-60].mlp...` patterns."""
    rows: dict[tuple[object, ...], list[Kind]] = defaultdict(list)
    for kind in kinds:
        spec, treatment = kind.first, kind.treatment
        reason = _numberless(treatment.known.reason)
        rows[kind.template, spec.shape, spec.dtype, treatment.granularity, reason].append(kind)
    return [(_pattern(found), found) for found in rows.values()]


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)[0-9]{1,9}(?=\.)", "N", name)


def _pattern(kinds: Sequence[Kind]) -> str:
    """The template with a span for every `*`: `7` for one number, `[0-3,5]` for several."""
    numbers = (numbers_in(spec.name) for kind in kinds for spec in kind.members)
    columns = [spans(column) for column in zip(*numbers, strict=True)]
    texts = (f"[{','.join(c)}]" if len(c) > 1 or "-" in c[0] else c[0] for c in columns)
    return re.sub(r"\*", lambda _: next(texts), kinds[0].template)


def _forecast_rows(checkpoint: Checkpoint, plan: Plan) -> list[tuple[str, str]]:
    files = len(plan.files)
    scheme = f"{plan.scheme.granularity.value} as {plan.scheme.format.value}"
    name, size = largest_layer(plan)
    rows = [
        ("scheme", scheme),
        ("layers", f"{plan.layers_quantized:,} quantized, {plan.layers_kept:,} kept"),
        ("reads", format_size(plan.bytes_read)),
        ("writes", f"{format_size(plan.bytes_written)} in {files} file{'s' if files > 1 else ''}"),
        ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        ("disk needed", format_size(plan.disk_bytes)),
        ("largest layer", f"{format_size(size)}, {name}"),
        ("peak memory", f"{format_size(plan.workspace.total_bytes)} over the baseline"),
    ]
    if any(kind.treatment.granularity is Granularity.BLOCK for kind in plan.kinds):
        rows.append(("tensor parallel", _ranks(safe_sizes(plan, Config(checkpoint.config)))))
    return rows


def _ranks(sizes: Sequence[int]) -> str:
    most = max(sizes)
    return f"up to {most} ranks: {', '.join(map(str, sizes))}" if most > 1 else "1 rank"


def print_result(plan: Plan, result: Result, stream: TextIO) -> None:
    """The closing table of `quantize`: what was done, and peak memory beside the prediction."""
    rate = result.bytes_read / max(result.seconds, 1e-9)
    planned = format_size(plan.workspace.host_bytes)
    rows = [
        ("layers", f"{plan.layers_quantized:,} quantized, {plan.layers_kept:,} kept"),
        ("read", _read(result, len(plan.layers))),
        (
            "written",
            f"{format_size(result.bytes_written)}, {plan.bits_per_weight:.2f} bits a weight",
        ),
        ("time", f"{result.seconds:.1f} s, {format_size(rate)}/s"),
        ("peak memory", f"{format_size(result.host_bytes)} over the baseline, planned {planned}"),
        ("  baseline", f"{format_size(result.baseline.anonymous)} after start-up"),
        ("  resident", f"{format_size(result.peak.resident)} with mapped files"),
    ]
    if plan.workspace.gpus:
        allocated, reserved = map(format_size, result.device_peak)
        planned = format_size(plan.workspace.device_bytes)
        rows.append(("  device", f"{allocated} allocated, {reserved} reserved, planned {planned}"))
    with _console(stream) as console:
        _print_rows(console, rows)


def _read(result: Result, layers: int) -> str:
    size = format_size(result.bytes_read)
    if not result.layers_there:
        return size
    return f"{size}; {result.layers_there:,} of {layers:,} steps were done by an unfinished run"


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """The document of `verify --json`."""
    return {
        "schema": SCHEMA,
        "ok": not verdict.problems,
        "compared": "exact" if verdict.exact else "bound",
        "tensors": verdict.tensors,
        "bytes_read": verdict.bytes_read,
        "seconds": round(verdict.seconds, 3),
        "peak_memory": {
            "host_anonymous_bytes": verdict.peak.anonymous,
            "host_resident_bytes": verdict.peak.resident,
            "baseline_anonymous_bytes": verdict.baseline.anonymous,
            "device_allocated_bytes": 0,
            "device_reserved_bytes": 0,
        },
        "problems": [asdict(problem) for problem in verdict.problems],
        "layers": [asdict(layer) for layer in verdict.layers],
        "not_compared": [*verdict.not_compared, *verdict.added_files],
    }


def print_verdict(verdict: Verdict, stream: TextIO) -> None:
    """What was compared, the worst layers, how errors are spread, and every problem."""
    with _console(stream) as console:
        _print_rows(console, _verdict_rows(verdict))
        if verdict.layers:
            console.print()
            _print_worst(console, verdict.layers)
            console.print()
            for line in _histogram([layer.relative_error for layer in verdict.layers]):
                console.print(line, markup=False, highlight=False)
        if verdict.problems:
            console.print()
        for problem in verdict.problems[:PROBLEMS]:
            console.print(_problem_line(problem), markup=False, highlight=False, soft_wrap=True)
        if len(verdict.problems) > PROBLEMS:
            console.print(f"and {len(verdict.problems) - PROBLEMS} more: see --json")


def _verdict_rows(verdict: Verdict) -> list[tuple[str, str]]:
    how = "to the bit" if verdict.exact else "within the bound of the format: written by another"
    rate = format_size(verdict.bytes_read / max(verdict.seconds, 1e-9))
    planned = format_size(verdict.planned)
    rows = [
        ("compared", how),
        ("tensors", f"{verdict.tensors:,}, of them {len(verdict.layers):,} weights in FP8"),
        ("read", f"{format_size(verdict.bytes_read)} of both"),
        ("time", f"{verdict.seconds:.1f} s, {rate}/s"),
        ("peak memory", f"{format_size(verdict.host_bytes)} over the baseline, planned {planned}"),
        ("problems", f"{len(verdict.problems):,}" if verdict.problems else "none"),
    ]
    for names, one, what in (
        (verdict.not_compared, "tensor", "without a source"),
        (verdict.added_files, "file", "that the source does not have"),
    ):
        if names:
            count = f"{len(names):,} {one}{'s' if len(names) > 1 else ''}"
            rows.append(("not compared", f"{count} {what}, such as {escape(names[0])}"))
    return rows


def _print_worst(console: "Console", layers: Sequence[LayerError]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    headers = ("worst layers", "relative error", "largest error", "zeros", "saturated", "scales 1")
    for header in headers:
        table.add_column(header, justify="left" if header == headers[0] else "right")
    for layer in sorted(layers, key=lambda layer: -_size(layer.relative_error))[:WORST]:
        cells = (
            escape(layer.name),
            _figure(layer.relative_error, ".5f"),
            _figure(layer.max_error, ".3g"),
            f"{100 * layer.zeros:.2f} %",
            f"{100 * layer.saturated:.2f} %",
            str(layer.rows_scale_one),
        )
        table.add_row(*map(Text, cells))
    console.print(table)


def _size(value: float | None) -> float:
    """For an order in which what is no number comes last of all."""
    return float("inf") if value is None else value


def _figure(value: float | None, form: str) -> str:
    return "not a number" if value is None else format(value, form)


def _histogram(values: Sequence[float | None]) -> Iterator[str]:
    """How many of `values` lie in each of a few ranges of equal width."""
    known = [value for value in values if value is not None]
    if not known:
        return
    low, high = min(known), max(known)
    bins = BINS if high > low else 1
    width = (high - low) / bins
    places = Counter(min(bins - 1, int((v - low) / width)) if width else 0 for v in known)
    most = max(places.values())
    yield "relative error        layers"
    for place in range(bins):
        begin, end, count = low + place * width, low + (place + 1) * width, places[place]
        bar = "#" * -(-BAR * count // most)
        yield f"{begin:.5f} - {end:.5f}  {count:>6}  {bar}".rstrip()


def _problem_line(problem: Problem) -> str:
    where = ": ".join(escape(part) for part in (problem.file, problem.tensor) if part)
    return f"{where or 'the output'}: {escape(problem.problem)}"


def _print_rows(console: "Console", rows: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in rows:
        table.add_row(Text(label, style="bold"), Text(escape(value)))
    console.print(table)


@contextmanager
def _console(stream: TextIO) -> Iterator["Console"]:
    """Renders for `stream` and writes at the end, so that a closed pipe is an error like others."""
    from rich.console import Console

    terminal = stream.isatty()
    width = shutil.get_terminal_size().columns if terminal else PIPED_WIDTH
    text = io.StringIO()
    yield Console(file=text, force_terminal=terminal, width=width)
    stream.writelines(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
    stream.flush()


def dump(document: dict[str, Any], pretty: bool) -> str:
    """`document` as JSON text: indented for a person, on one line for a pipe."""
    return json.dumps(document, indent=2 if pretty else None)
