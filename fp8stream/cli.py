"""The command line: parse, call, render.

stdout carries data, stderr everything for the eye. This is the only module with progress bars, and
`main` the only place that turns an error into an exit code: 0 done, 1 failed, 2 wrong usage, 130
and 143 interrupted.
"""

import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click

from fp8stream import __version__
from fp8stream.advice import kept_bytes
from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.clock import Clock
from fp8stream.errors import (
    BudgetError,
    CheckpointError,
    DeviceError,
    DeviceMemoryError,
    Fp8StreamError,
    OutputError,
    SchemeError,
    VerifyError,
)
from fp8stream.expectation import LayerError
from fp8stream.experts import ExpertForm, ExpertLayout, ExpertOptions
from fp8stream.journal import Fingerprint, fingerprint
from fp8stream.memory import MemoryUsage, PeakMeter, format_size, parse_size
from fp8stream.names import template_and_key
from fp8stream.output import OutputDirectory, check_output, unfinished_run
from fp8stream.parallel import edges
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.report import (
    Result,
    Verdict,
    dump,
    escape,
    plan_json,
    print_plan,
    print_result,
    print_verdict,
    result_json,
    tensor_lines,
    verdict_json,
)
from fp8stream.scheme import Granularity, OutputFormat, Scheme
from fp8stream.signals import Signalled, Signals
from fp8stream.structure import Config
from fp8stream.system import may_have_gpu

if TYPE_CHECKING:
    import torch

    from fp8stream.stream import LayerDone
    from fp8stream.verify import Checked, Comparison

F = TypeVar("F", bound=Callable[..., object])

DEFAULT_BUDGET = "1GiB"
DEFAULT_SHARD_SIZE = "5GB"
SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class Process:
    """What a command shares with `main`: `notes` are for whoever reads of a failure."""

    signals: Signals
    notes: list[str] = field(default_factory=list)


def _size(context: click.Context, option: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _not_empty(context: click.Context, option: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("is empty; was a variable not set?")
    return value


def _device(context: click.Context, option: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu, cuda or cuda:N")
    return value


def _expression(
    context: click.Context, option: click.Parameter, value: str | None
) -> "re.Pattern[str] | None":
    try:
        return re.compile(value) if value is not None else None
    except (re.error, OverflowError, RecursionError) as error:
        raise click.BadParameter(f"{value!r} is not a regular expression: {error}") from None


def _expert_layout(what: str) -> Callable[[F], F]:
    layouts = click.Choice([layout.value for layout in ExpertLayout])
    return click.option("--expert-layout", type=layouts, help=what)


def _memory_budget(what: str) -> Callable[[F], F]:
    return click.option(
        "--memory-budget",
        callback=_size,
        metavar="SIZE",
        default=DEFAULT_BUDGET,
        show_default=True,
        help=what,
    )


def _threads(what: str) -> Callable[[F], F]:
    workers = click.IntRange(1, 1024)
    return click.option(
        "--threads", type=workers, metavar="N", help=f"{what}  [default: all cores]"
    )


def _json(command: F) -> F:
    words = "The result as one JSON object on stdout."
    return click.option("--json", "as_json", is_flag=True, help=words)(command)


def _quiet(command: F) -> F:
    return click.option("-q", "--no-progress", is_flag=True, help="No progress on stderr.")(command)


def _scheme_options(command: F) -> F:
    """The options that say what would be done: the same for `quantize` and `inspect`."""
    for option in reversed(
        [
            click.option(
                "--scheme",
                type=click.Choice([g.value for g in Granularity]),
                default=Granularity.CHANNEL.value,
                show_default=True,
                help="What shares one scale.",
            ),
            click.option(
                "--format",
                "output_format",
                type=click.Choice([f.value for f in OutputFormat]),
                default=OutputFormat.COMPRESSED_TENSORS.value,
                show_default=True,
                help="The output's dialect; fp8 has block and tensor scales.",
            ),
            click.option(
                "--ignore",
                multiple=True,
                metavar="PATTERN",
                help="Keep what matches: the exact name of a module or tensor, or re:REGEX. "
                "Repeatable; wins over --include.",
            ),
            click.option(
                "--include",
                multiple=True,
                metavar="PATTERN",
                help="Quantize what matches although the defaults keep it. Repeatable.",
            ),
            click.option(
                "--ignore-from",
                type=click.File("r", encoding="utf-8"),
                metavar="FILE",
                help="Patterns to ignore, one a line (# comments); - reads standard input.",
            ),
            click.option(
                "--experts",
                type=click.Choice([form.value for form in ExpertForm]),
                default=ExpertForm.AUTO.value,
                show_default=True,
                help="How experts that lie in one tensor are written; keep leaves all in 16 bit.",
            ),
            _expert_layout(
                "How they lie there, if the model type does not tell: [experts, out, in] or "
                "[experts, in, out], gate and up in halves or interleaved."
            ),
        ]
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fp8stream")
def cli() -> None:
    """Turn a bf16 checkpoint into an FP8 one, inside a memory budget.

    \b
    Example:
      fp8stream inspect Llama-3.1-8B
      fp8stream quantize Llama-3.1-8B Llama-3.1-8B-FP8
      fp8stream verify Llama-3.1-8B-FP8 --against Llama-3.1-8B
    """


@cli.command()
@click.argument("source", callback=_not_empty)
@_scheme_options
@click.option(
    "--tp",
    "ranks",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Warn of blocks that N tensor-parallel ranks would cut.",
)
@click.option("--tensors", is_flag=True, help="One tab-separated line a tensor, for grep and awk.")
@click.option(
    "--filter",
    "wanted",
    callback=_expression,
    metavar="RE",
    help="With --tensors: those whose name the regular expression is found in.",
)
@click.option(
    "--sort",
    type=click.Choice(["name", "size"]),
    help="With --tensors: by name, or the largest first.  [default: name]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def inspect(
    source: str,
    ranks: int | None,
    tensors: bool,
    wanted: "re.Pattern[str] | None",
    sort: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tell what SOURCE holds, what quantize would do to it, and why.

    SOURCE is a checkpoint directory or one .safetensors file; only headers are read.

    \b
    Example:
      fp8stream inspect Llama-3.1-8B
      fp8stream inspect Llama-3.1-8B --tensors | grep keep
      fp8stream inspect Llama-3.1-8B --scheme block --tp 8
      fp8stream inspect Llama-3.1-8B --json | jq .plan
    """
    if tensors and as_json:
        raise click.UsageError("--tensors and --json exclude each other")
    if (wanted or sort) and not tensors:
        raise click.UsageError("--filter and --sort go with --tensors")
    checkpoint = open_checkpoint(source)
    resources = Resources(parse_size(DEFAULT_BUDGET), _cores(), parse_size(DEFAULT_SHARD_SIZE))
    plan = _asked(**options).plan(checkpoint, resources)
    if ranks:
        cut = map(str, edges(plan, Config(checkpoint.config), ranks))
        plan = replace(plan, warnings=(*plan.warnings, *cut))
    if tensors:
        with _stdout():
            for line in tensor_lines(plan, wanted, by_size=sort == "size"):
                click.echo(line)
    else:
        _show_plan(checkpoint, plan, as_json)
    if not as_json:
        _warn(plan.warnings)


@cli.command()
@click.argument("source", callback=_not_empty)
@click.argument("output", callback=_not_empty)
@_scheme_options
@click.option(
    "--device",
    callback=_device,
    default="auto",
    show_default=True,
    help="Where to compute: auto, cpu, cuda (all GPUs) or cuda:N.",
)
@_memory_budget("Host staging and device buffers together.")
@click.option(
    "--max-shard-size",
    callback=_size,
    metavar="SIZE",
    default=DEFAULT_SHARD_SIZE,
    show_default=True,
    help="The largest file to write.",
)
@_threads("Workers that read, quantize and write.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the reasons; write nothing.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an existing checkpoint OUTPUT, and all that is in it, once the new one is whole.",
)
@click.option(
    "--restart", is_flag=True, help="Discard an unfinished run to OUTPUT instead of going on."
)
@_json
@_quiet
@click.pass_obj
def quantize(
    process: Process,
    /,
    source: str,
    output: str,
    device: str,
    memory_budget: int,
    max_shard_size: int,
    threads: int | None,
    dry_run: bool,
    overwrite: bool,
    restart: bool,
    as_json: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Write SOURCE, quantized to FP8, as the new directory OUTPUT, and print its path.

    SOURCE is a checkpoint directory or one .safetensors file with its config.json beside it.
    OUTPUT appears in one step when it is whole; SOURCE is never touched. A run that was stopped,
    however it was, goes on when the same command is given again.

    \b
    Example:
      fp8stream quantize Llama-3.1-8B Llama-3.1-8B-FP8
      fp8stream quantize Llama-3.1-8B out --scheme block --format fp8
      vllm serve "$(fp8stream quantize Llama-3.1-8B Llama-3.1-8B-FP8)"
    """
    checkpoint = open_checkpoint(source)
    resources = Resources(memory_budget, threads or _cores(), max_shard_size)
    asked = _asked(**options)
    plan = asked.plan(checkpoint, resources)
    now = partial(fingerprint, checkpoint, plan, asked.options(max_shard_size))
    if dry_run:
        _dry_run(checkpoint, plan, resources, device, as_json)
        with _complaining():
            target = _check(checkpoint, plan, Path(output), overwrite, now)
            _warn(filter(None, [None if restart else unfinished_run(target, now)]))
        return
    target = _check(checkpoint, plan, Path(output), overwrite, now)
    directory = OutputDirectory(target, now(), overwrite, restart)
    with _kept_on_failure(directory, process.notes):
        plan, resources, devices = _for_device(plan, resources, device)
        process.signals.check()  # torch was imported
        _warn(plan.warnings)
        job = _Job(checkpoint, plan, resources, devices, directory, process.signals)
        there = directory.in_place
        plan, result = job.run(output, no_progress)
    if there:
        _tell(f"{output}: finished by the run before this one, which was stopped as it tidied up")
    else:
        with suppress(OSError):
            print_result(plan, result, sys.stderr)
    with _stdout():
        if as_json:
            click.echo(dump(result_json(plan, result), sys.stdout.isatty()))
        else:
            click.echo(os.fsencode(result.output))


def _check(
    checkpoint: Checkpoint,
    plan: Plan,
    output: Path,
    overwrite: bool,
    now: Callable[[], Fingerprint],
) -> Path:
    """Everything that can be refused before any work; the directory to write to."""
    if checkpoint.quantized_as:
        raise CheckpointError(
            f"{checkpoint.path}: already quantized ({checkpoint.quantized_as}); expected a "
            "checkpoint in BF16, F16 or F32: give the model that it was made from"
        )
    if not plan.layers_quantized:
        reasons = [
            f"{reason} ({format_size(size)})"
            for reason, size in kept_bytes(plan.kinds).most_common(4)
        ]
        raise SchemeError(
            f"{checkpoint.path}: nothing to quantize: {'; '.join(reasons)}; "
            "'fp8stream inspect' tells more, --include asks for layers by name"
        )
    return check_output(output, checkpoint, plan.disk_bytes, overwrite, now)


@contextmanager
def _complaining() -> Iterator[None]:
    """What would be refused, as a warning: a dry run tells it and goes on."""
    try:
        yield
    except Fp8StreamError as error:
        _warn([str(error)])


def _dry_run(
    checkpoint: Checkpoint, plan: Plan, resources: Resources, device: str, as_json: bool
) -> None:
    # A plan for the CPU is a plan already: torch takes longer to load than everything before.
    if device != "cpu" and (device != "auto" or may_have_gpu()):
        plan, _, _ = _for_device(plan, resources, device)
    _show_plan(checkpoint, plan, as_json)
    if not as_json:
        _warn(plan.warnings)


def _for_device(
    plan: Plan, resources: Resources, name: str
) -> "tuple[Plan, Resources, tuple[torch.device, ...]]":
    """The devices called `name`, the resources with them, and the plan with buffers for those."""
    from fp8stream.device import find_devices

    devices = find_devices(name)
    resources = replace(resources, gpus=sum(device.type == "cuda" for device in devices))
    return plan.with_resources(resources) if resources.gpus else plan, resources, devices


@contextmanager
def _kept_on_failure(directory: OutputDirectory, notes: list[str]) -> Iterator[None]:
    """Opens the directory. Notes for whoever reads of a failure what is kept of the run."""
    try:
        with directory:
            if not directory.locked:
                what = "this file system has no locks; let no second run write the same output"
                _warn([f"{directory.work}: {what}"])
            try:
                yield
            except BaseException as error:
                notes += _kept(directory, error)
                raise
    finally:
        _warn(filter(None, [directory.left]))


def _kept(directory: OutputDirectory, error: BaseException) -> Iterator[str]:
    """What to say of a run that ended so, if it left anything."""
    # Whoever is told to discard it is not told that it goes on.
    if not directory.kept or directory.placed or "--restart" in str(error):
        return
    what = f"what is done is kept in {directory.work}"
    if isinstance(error, Fp8StreamError) and not error.curable:
        yield f"{what}, but whatever mends this makes another conversion, which needs --restart"
    else:
        yield f"{what}: the same command goes on, --restart discards it"


@dataclass
class _Tally:
    """What a conversion did so far, whatever its buffers were: the layers that were on disk when it
    began, and the bytes and the time since."""

    there: Set[int]
    start: float
    read: int = 0
    clock: Clock = field(default_factory=Clock)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


@dataclass(frozen=True)
class _Job:
    """One conversion, measured."""

    checkpoint: Checkpoint
    plan: Plan
    resources: Resources
    devices: "tuple[torch.device, ...]"
    directory: OutputDirectory
    signals: Signals

    def run(self, output: str, no_progress: bool) -> tuple[Plan, Result]:
        """Converts what is not on disk yet, with smaller buffers where memory runs out: the plan
        with those that did, and what was done."""
        start, layers = time.perf_counter(), len(self.plan.layers)
        if self.directory.in_place:
            tally, now = _Tally(frozenset(range(layers)), start), MemoryUsage.now()
            return self.plan, self._result(output, tally, now, now)
        tally = _Tally(self.directory.done(layers), start)
        if tally.there and not no_progress:
            share = 100 * self._bytes(tally.there) / max(1, self.plan.bytes_read)
            _tell(f"going on with an unfinished run, of which {share:.0f} % is on disk")
        job = self
        while True:
            try:
                return job.plan, job._convert(output, no_progress, tally)
            except DeviceMemoryError as error:
                job = job._smaller(error)
            _warn([f"{self.devices[0]}: out of memory; going on with smaller buffers"])

    def _smaller(self, error: DeviceMemoryError) -> "_Job":
        """The same job with half the memory. Raises DeviceError where that is too little."""
        budget = self.plan.workspace.total_bytes // 2
        try:
            resources = replace(self.resources, memory_budget=budget)
            return replace(self, plan=self.plan.with_resources(resources), resources=resources)
        except BudgetError:
            raise DeviceError(
                f"--device {self.devices[0]}: out of memory with the smallest buffers that work "
                f"({format_size(2 * budget)}); free some, or use another device"
            ) from error

    def _convert(self, output: str, no_progress: bool, tally: _Tally) -> Result:
        import torch

        from fp8stream.device import running_out_of_memory, warm_up
        from fp8stream.stream import stream_layers
        from fp8stream.writer import CheckpointWriter

        # Workers are the parallelism: threads inside torch would only get in their way.
        torch.set_num_threads(1)
        done = self.directory.done(len(self.plan.layers))
        tasks = self.plan.tasks(done)
        with running_out_of_memory():
            warm_up(self.devices)
        with (
            closing(_progress(self.plan.bytes_read, self._bytes(done), no_progress)) as progress,
            CheckpointWriter(self.directory, self.plan.files, self.plan.written(done)) as writer,
            PeakMeter() as meter,
        ):
            writer.copy_side_files(self.checkpoint)
            layers = stream_layers(
                self.checkpoint, self.plan, writer, self.devices, tally.clock, tasks
            )
            with closing(layers):
                for layer in layers:
                    tally.read += layer.bytes_read
                    progress(layer)
                    self.signals.check()
            meter.sample()
            writer.commit(self.plan.config, self.signals.too_late)
        return self._result(output, tally, meter.peak, meter.baseline)

    def _bytes(self, layers: Set[int]) -> int:
        """What is read for them."""
        slab = self.plan.workspace.slab_bytes
        return sum(self.plan.layers[number].bytes_read(slab) for number in layers)

    def _result(
        self, output: str, tally: _Tally, peak: MemoryUsage, baseline: MemoryUsage
    ) -> Result:
        from fp8stream.device import device_peak

        return Result(
            output,
            tally.seconds,
            tally.read,
            self.plan.bytes_written,
            len(tally.there),
            peak,
            baseline,
            device_peak(self.devices),
            tally.clock,
        )


@cli.command()
@click.argument("output", callback=_not_empty)
@click.option(
    "--against",
    "source",
    callback=_not_empty,
    required=True,
    metavar="SOURCE",
    help="What OUTPUT was made from: a checkpoint directory or one .safetensors file.",
)
@_expert_layout("How experts lie in one tensor of SOURCE, if it was stated when OUTPUT was made.")
@_memory_budget("All buffers together.")
@_threads("Workers that read and compare.")
@_json
@_quiet
def verify(
    output: str,
    source: str,
    expert_layout: str | None,
    memory_budget: int,
    threads: int | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    """Compare OUTPUT with the SOURCE that it was made from: structure, config and every value.

    What fp8stream wrote must be equal to the bit; what others wrote, within the format's bound.
    Works on the CPU. Exits with 1 where something is wrong, and names it.

    \b
    Example:
      fp8stream verify Llama-3.1-8B-FP8 --against Llama-3.1-8B
      fp8stream verify out --against in --json | jq -r '.problems[] | .file + " " + .tensor'
    """
    from fp8stream.verify import prepare

    start = time.perf_counter()
    checkpoint = open_checkpoint(source)
    layout = ExpertLayout(expert_layout) if expert_layout else None
    comparison = prepare(checkpoint, output, layout, memory_budget, threads or _cores())
    with closing(_progress(comparison.bytes_read, 0, no_progress)) as progress:
        verdict = _verdict(comparison, output, start, progress)
    with _stdout():
        if as_json:
            click.echo(dump(verdict_json(verdict), sys.stdout.isatty()))
        else:
            print_verdict(verdict, sys.stdout)
    if verdict.problems:
        count, first = len(verdict.problems), verdict.problems[0]
        where = " ".join(part for part in (first.file, first.tensor) if part) or output
        problems = "1 problem" if count == 1 else f"{count} problems, the first"
        raise VerifyError(f"{output}: {problems} in {where}: not what {source} makes")


def _verdict(comparison: "Comparison", output: str, start: float, progress: "Progress") -> Verdict:
    """Compares all values, measured."""
    import torch

    from fp8stream.device import warm_up
    from fp8stream.verify import compare_values

    torch.set_num_threads(1)
    warm_up([torch.device("cpu")])
    problems, read = list(comparison.problems), 0
    layers: list[LayerError] = []
    with PeakMeter() as meter, closing(compare_values(comparison)) as checked:
        for done in checked:
            problems += done.problems
            layers += done.layers
            read += done.bytes_read
            progress(done)
        meter.sample()
    expectation = comparison.expectation
    return Verdict(
        output,
        comparison.exact,
        len(expectation.found),
        read,
        time.perf_counter() - start,
        meter.peak,
        meter.baseline,
        comparison.workspace.host_bytes,
        tuple(sorted(problems, key=lambda p: (p.file, p.tensor, p.problem))),
        tuple(sorted(layers, key=lambda layer: template_and_key(layer.name))),
        expectation.not_compared,
        comparison.added_files,
    )


@dataclass(frozen=True)
class _Asked:
    """What `quantize` and `inspect` share the options of: what would be done."""

    scheme: Scheme
    patterns: Patterns
    experts: ExpertOptions

    def plan(self, checkpoint: Checkpoint, resources: Resources) -> Plan:
        return plan_quantization(checkpoint, self.scheme, self.patterns, resources, self.experts)

    def options(self, max_shard_size: int) -> dict[str, Any]:
        """The options that change the bytes of an output, as a fingerprint holds them."""
        layout = self.experts.layout
        return {
            "--scheme": self.scheme.granularity.value,
            "--format": self.scheme.format.value,
            "--ignore": sorted({*self.patterns.ignore}),
            "--include": sorted({*self.patterns.include}),
            "--experts": self.experts.form.value,
            "--expert-layout": layout.value if layout else None,
            "--max-shard-size": max_shard_size,
        }


def _asked(
    *,
    scheme: str,
    output_format: str,
    ignore: Sequence[str],
    include: Sequence[str],
    ignore_from: TextIO | None,
    experts: str,
    expert_layout: str | None,
) -> _Asked:
    """What the options mean. Reads `--ignore-from`."""
    lines = _lines_of(ignore_from) if ignore_from else ()
    listed = (line for line in lines if line and not line.startswith("#"))
    return _Asked(
        Scheme(Granularity(scheme), OutputFormat(output_format)),
        Patterns((*ignore, *listed), tuple(include)),
        ExpertOptions(ExpertForm(experts), ExpertLayout(expert_layout) if expert_layout else None),
    )


def _lines_of(file: TextIO) -> tuple[str, ...]:
    try:
        return tuple(line.rstrip("\r\n") for line in file)
    except UnicodeDecodeError as error:
        raise SchemeError(f"--ignore-from {file.name}: expected UTF-8: {error}") from error


def _show_plan(checkpoint: Checkpoint, plan: Plan, as_json: bool) -> None:
    with _stdout():
        if as_json:
            click.echo(dump(plan_json(checkpoint, plan), sys.stdout.isatty()))
        else:
            print_plan(checkpoint, plan, sys.stdout)


class _ReaderLeft(Exception):
    """Whoever read our data had enough of it, as `head` does."""


@contextmanager
def _stdout() -> Iterator[None]:
    """Where data is printed: a reader that left is no failure, a full disk behind it is."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise _ReaderLeft from None
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        _tell(f"warning: {warning}")


def _tell(text: str) -> None:
    with suppress(OSError):
        click.echo(escape(text), err=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class Progress:
    """What to call for every layer. This one says nothing."""

    def __call__(self, done: "LayerDone | Checked") -> None:
        """A layer was written."""

    def close(self) -> None:
        """No layer comes any more."""


class _Bar(Progress):
    """A bar on a terminal."""

    def __init__(self, total: int, there: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            initial=there,
            unit="iB",
            unit_scale=True,
            unit_divisor=1024,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def __call__(self, done: "LayerDone | Checked") -> None:
        with suppress(OSError):
            self._bar.set_description(escape(done.name), refresh=False)
            self._bar.update(done.bytes_read)

    def close(self) -> None:
        with suppress(OSError):
            self._bar.close()


class _Lines(Progress):
    """A plain line now and then, where there is no terminal."""

    def __init__(self, total: int, there: int) -> None:
        self._total = total
        self._there = there
        self._done = 0
        self._start = self._last = time.monotonic()

    def __call__(self, done: "LayerDone | Checked") -> None:
        self._done += done.bytes_read
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES or not self._done:
            return  # what was read tells the rate
        self._last = now
        rate = self._done / (now - self._start)
        reached = self._there + self._done
        left = (self._total - reached) / rate
        _tell(
            f"{100 * reached / self._total:.0f} %: {format_size(reached)} of "
            f"{format_size(self._total)}, {format_size(rate)}/s, {left:.0f} s left, {done.name}"
        )


def _progress(total: int, there: int, hidden: bool) -> Progress:
    """For a run of `total` bytes, `there` of which an earlier one has read."""
    if hidden:
        return Progress()
    return _Bar(total, there) if sys.stderr.isatty() else _Lines(total, there)


def main(arguments: Sequence[str] | None = None, signals: Signals | None = None) -> int:
    """Runs the command line; the exit code. Tracebacks only with FP8STREAM_DEBUG=1."""
    # A stream that was closed, as `2>&-` does, is no reason to fail, nor for the next file that is
    # opened to get its number, and what is meant for the eye.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if signals is None:
        signals = Signals()
        signals.listen()
    code = _run(list(sys.argv[1:] if arguments is None else arguments), signals)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Or Python fails at it once more when it exits, with a code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def run(signals: Signals | None = None) -> NoReturn:
    """The `fp8stream` command, for which `signals` listens already.

    Leaves at once: taking torch down takes half a second, in which a signal would still change the
    exit code of a run that is done.
    """
    os._exit(main(signals=signals))


def _run(arguments: list[str], signals: Signals) -> int:
    # A plan is many small objects and no garbage: looking for it took half the time of inspect.
    gc.set_threshold(200_000, 50, 100)
    process = Process(signals)
    try:
        # Not `cli.main`, which handles signals and pipes in ways of its own.
        with cli.make_context("fp8stream", arguments, obj=process) as context:
            cli.invoke(context)
    except _ReaderLeft:
        return 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return error.exit_code
    except Signalled as signalled:
        return _failed([str(signalled), *process.notes], 128 + signalled.number)
    except Fp8StreamError as error:
        return _failed([str(error), *process.notes], 1)
    except MemoryError:
        what = "out of memory; give a smaller --memory-budget, or fewer --threads"
        return _failed([what, *process.notes], 1)
    except Exception as error:
        if signals.came:  # which an import may turn into an error of its own
            return _failed([str(signals.came), *process.notes], 128 + signals.came.number)
        what = f"{type(error).__name__}: {error}; FP8STREAM_DEBUG=1 tells where"
        return _failed([what, *process.notes], 1)
    return 0


def _failed(messages: Iterable[str], code: int) -> int:
    if os.environ.get("FP8STREAM_DEBUG") == "1":
        with suppress(OSError):
            traceback.print_exc()
    _tell(f"fp8stream: {' '.join('; '.join(messages).splitlines())}")
    return code
