"""The plan and the result, for the eye as rich tables, for programs as JSON or tab-separated lines.

The JSON keys are a promise: measurements read them. Nothing here decides anything.
"""

import io
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fp8stream.checkpoint import Checkpoint
from fp8stream.memory import MemoryUsage, format_size
from fp8stream.plan import Plan, TensorPlan

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
# Wide enough that nothing a person greps for is cut where there is no terminal to ask.
PIPED_WIDTH = 240
# Below this the table would break names apart.
NARROW = 130


@dataclass(frozen=True)
class Result:
    """What a conversion did. Sizes in bytes; `device_peak` is allocated and reserved."""

    output: str
    seconds: float
    bytes_read: int
    bytes_written: int
    peak: MemoryUsage
    baseline: MemoryUsage
    device_peak: tuple[int, int]

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
        "tensors": [_tensor_json(tensor) for tensor in plan.tensors],
        "warnings": list(plan.warnings),
    }


def _tensor_json(tensor: TensorPlan) -> dict[str, Any]:
    return {
        "name": tensor.spec.name,
        "dtype": tensor.spec.dtype,
        "shape": list(tensor.spec.shape),
        "file": tensor.spec.file,
        "role": tensor.role.value,
        "action": tensor.action,
        "scheme": tensor.granularity.value if tensor.granularity else None,
        "reason": tensor.reason,
        "fused_with": list(tensor.fused_with),
        "outputs": [output.name for output in tensor.outputs],
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
    }


def tensor_lines(plan: Plan) -> Iterator[str]:
    """The lines of `inspect --tensors`, a tab between fields."""
    for tensor in plan.tensors:
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
        _print_source(console, checkpoint)
        _print_patterns(console, plan)
        _print_forecast(console, plan)


def _print_source(console: "Console", checkpoint: Checkpoint) -> None:
    sizes = checkpoint.bytes_by_dtype.items()
    dtypes = ", ".join(f"{dtype} {format_size(size)}" for dtype, size in sizes)
    files = len(checkpoint.shards)
    rows = [
        ("checkpoint", str(checkpoint.path)),
        ("architecture", checkpoint.architecture or checkpoint.model_type or "not named"),
        ("parameters", f"{checkpoint.parameters:,} in {len(checkpoint.tensors):,} tensors"),
        ("bytes", f"{dtypes}; {files} file{'s' if files > 1 else ''}"),
        ("quantized as", checkpoint.quantized_as or "not quantized"),
    ]
    _print_rows(console, rows)


def _print_patterns(console: "Console", plan: Plan) -> None:
    rows = [_pattern_row(pattern, tensors) for pattern, tensors in collapse(plan.tensors)]
    console.print()
    if console.width < NARROW:
        _print_narrow(console, rows)
    else:
        _print_wide(console, rows)


def _pattern_row(pattern: str, tensors: Sequence[TensorPlan]) -> tuple[str, ...]:
    first = tensors[0]
    return (
        escape(pattern),
        f"x{len(tensors)}",
        str(list(first.spec.shape)),
        first.spec.dtype,
        f"FP8 {first.granularity.value}" if first.granularity else "keep",
        format_size(sum(tensor.spec.nbytes for tensor in tensors)),
        escape(_numberless(first.reason)),
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


def collapse(tensors: Sequence[TensorPlan]) -> list[tuple[str, list[TensorPlan]]]:
    """Tensors that differ in layer and expert numbers alone, as `layers.[0-60].mlp...` patterns."""
    groups: dict[tuple[object, ...], list[TensorPlan]] = defaultdict(list)
    for tensor in tensors:
        parts = (None if _is_number(part) else part for part in tensor.spec.name.split("."))
        reason = _numberless(tensor.reason)
        spec = tensor.spec
        key = (*parts, spec.shape, spec.dtype, tensor.granularity, reason)
        groups[key].append(tensor)
    return [(_pattern([t.spec.name for t in group]), group) for group in groups.values()]


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)[0-9]{1,9}(?=\.)", "N", name)


def _is_number(part: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", part) is not None


def _pattern(names: Sequence[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_span(parts) for parts in columns)


def _span(parts: Sequence[str]) -> str:
    """`7` for one number, `[0-3,5]` for several, and any other part as it is."""
    if len(set(parts)) == 1:
        return parts[0]
    numbers = sorted({int(part) for part in parts})
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return "[" + ",".join("-".join(map(str, span)) for span in spans) + "]"


def _print_forecast(console: "Console", plan: Plan) -> None:
    files = len(plan.files)
    scheme = f"{plan.scheme.granularity.value} as {plan.scheme.format.value}"
    rows = [
        ("scheme", scheme),
        ("layers", f"{plan.layers_quantized:,} quantized, {plan.layers_kept:,} kept"),
        ("reads", format_size(plan.bytes_read)),
        ("writes", f"{format_size(plan.bytes_written)} in {files} file{'s' if files > 1 else ''}"),
        ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        ("disk needed", format_size(plan.disk_bytes)),
        ("peak memory", f"{format_size(plan.workspace.total_bytes)} over the baseline"),
    ]
    console.print()
    _print_rows(console, rows)


def print_result(plan: Plan, result: Result, stream: TextIO) -> None:
    """The closing table of `quantize`: what was done, and peak memory beside the prediction."""
    rate = result.bytes_read / max(result.seconds, 1e-9)
    planned = format_size(plan.workspace.host_bytes)
    rows = [
        ("layers", f"{plan.layers_quantized:,} quantized, {plan.layers_kept:,} kept"),
        ("read", format_size(result.bytes_read)),
        (
            "written",
            f"{format_size(result.bytes_written)}, {plan.bits_per_weight:.2f} bits a weight",
        ),
        ("time", f"{result.seconds:.1f} s, {format_size(rate)}/s"),
        ("peak memory", f"{format_size(result.host_bytes)} over the baseline, planned {planned}"),
        ("  baseline", f"{format_size(result.baseline.anonymous)} after start-up"),
        ("  resident", f"{format_size(result.peak.resident)} with mapped files"),
    ]
    if plan.workspace.on_gpu:
        allocated, reserved = map(format_size, result.device_peak)
        planned = format_size(plan.workspace.device_bytes)
        rows.append(("  device", f"{allocated} allocated, {reserved} reserved, planned {planned}"))
    with _console(stream) as console:
        _print_rows(console, rows)


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
