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
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fp8stream import __version__
from fp8stream.advice import kept_bytes
from fp8stream.checkpoint import Checkpoint, open_checkpoint
from fp8stream.clock import Clock
from fp8stream.console import Progress, ReaderLeft, open_progress, stdout, tell, warn
from fp8stream.errors import (
    BudgetError,
    CheckpointError,
    DeviceError,
    DeviceMemoryError,
    Fp8StreamError,
    SchemeError,
    VerifyError,
)
from fp8stream.expectation import LayerError
from fp8stream.experts import ExpertLayout
from fp8stream.journal import Fingerprint, fingerprint
from fp8stream.memory import MemoryUsage, PeakMeter, format_size, parse_size
from fp8stream.names import template_and_key
from fp8stream.options import (
    DEFAULT_BUDGET,
    DEFAULT_SHARD_SIZE,
    as_size,
    device_name,
    expert_layout_option,
    expression,
    json_option,
    memory_budget_option,
    not_empty,
    quiet_option,
    read_options,
    scheme_options,
    threads_option,
)
from fp8stream.output import OutputDirectory, check_output, unfinished_run
from fp8stream.parallel import edges
from fp8stream.plan import Plan, Resources
from fp8stream.report import (
    Result,
    Verdict,
    dump,
    plan_json,
    print_plan,
    print_result,
    print_verdict,
    result_json,
    tensor_lines,
    verdict_json,
)
from fp8stream.signals import Signalled, Signals
from fp8stream.structure import Config
from fp8stream.system import may_have_gpu

if TYPE_CHECKING:
    import torch

    from fp8stream.verify import Comparison


@dataclass(frozen=True)
class Process:
    """What a command shares with `main`: `notes` are for whoever reads of a failure."""

    signals: Signals
    notes: list[str] = field(default_factory=list)


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
@click.argument("source", callback=not_empty)
@scheme_options
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
    callback=expression,
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
    plan = read_options(**options).plan(checkpoint, resources)
    if ranks:
        cut = map(str, edges(plan, Config(checkpoint.config), ranks))
        plan = replace(plan, warnings=(*plan.warnings, *cut))
    if tensors:
        with stdout():
            for line in tensor_lines(plan, wanted, by_size=sort == "size"):
                click.echo(line)
    else:
        _show_plan(checkpoint, plan, as_json)
    if not as_json:
        warn(plan.warnings)


@cli.command()
@click.argument("source", callback=not_empty)
@click.argument("output", callback=not_empty)
@scheme_options
@click.option(
    "--device",
    callback=device_name,
    default="auto",
    show_default=True,
    help="Where to compute: auto, cpu, cuda (all GPUs) or cuda:N.",
)
@memory_budget_option("Host staging and device buffers together.")
@click.option(
    "--max-shard-size",
    callback=as_size,
    metavar="SIZE",
    default=DEFAULT_SHARD_SIZE,
    show_default=True,
    help="The largest file to write.",
)
@threads_option("Workers that read, quantize and write.")
@click.option("--dry-run", is_flag=True, help="Print the plan and the reasons; write nothing.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an existing checkpoint OUTPUT, and all that is in it, once the new one is whole.",
)
@click.option(
    "--restart", is_flag=True, help="Discard an unfinished run to OUTPUT instead of going on."
)
@json_option
@quiet_option
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
    asked = read_options(**options)
    plan = asked.plan(checkpoint, resources)
    now = partial(fingerprint, checkpoint, plan, asked.options(max_shard_size))
    if dry_run:
        _dry_run(checkpoint, plan, resources, device, as_json)
        with _complaining():
            target = _check(checkpoint, plan, Path(output), overwrite, now)
            warn(filter(None, [None if restart else unfinished_run(target, now)]))
        return
    target = _check(checkpoint, plan, Path(output), overwrite, now)
    directory = OutputDirectory(target, now(), overwrite, restart)
    with _kept_on_failure(directory, process.notes):
        plan, resources, devices = _for_device(plan, resources, device)
        process.signals.check()  # torch was imported
        warn(plan.warnings)
        job = _Job(checkpoint, plan, resources, devices, directory, process.signals)
        there = directory.in_place
        plan, result = job.run(output, no_progress)
    if there:
        tell(f"{output}: finished by the run before this one, which was stopped as it tidied up")
    else:
        with suppress(OSError):
            print_result(plan, result, sys.stderr)
    with stdout():
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
        warn([str(error)])


def _dry_run(
    checkpoint: Checkpoint, plan: Plan, resources: Resources, device: str, as_json: bool
) -> None:
    # A plan for the CPU is a plan already: torch takes longer to load than everything before.
    if device != "cpu" and (device != "auto" or may_have_gpu()):
        plan, _, _ = _for_device(plan, resources, device)
    _show_plan(checkpoint, plan, as_json)
    if not as_json:
        warn(plan.warnings)


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
                warn([f"{directory.work}: {what}"])
            try:
                yield
            except BaseException as error:
                notes += _kept(directory, error)
                raise
    finally:
        warn(filter(None, [directory.left]))


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
            tell(f"going on with an unfinished run, of which {share:.0f} % is on disk")
        job = self
        while True:
            try:
                return job.plan, job._convert(output, no_progress, tally)
            except DeviceMemoryError as error:
                job = job._smaller(error)
            warn([f"{self.devices[0]}: out of memory; going on with smaller buffers"])

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
            closing(
                open_progress(self.plan.bytes_read, self._bytes(done), no_progress)
            ) as progress,
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
@click.argument("output", callback=not_empty)
@click.option(
    "--against",
    "source",
    callback=not_empty,
    required=True,
    metavar="SOURCE",
    help="What OUTPUT was made from: a checkpoint directory or one .safetensors file.",
)
@expert_layout_option(
    "How experts lie in one tensor of SOURCE, if it was stated when OUTPUT was made."
)
@memory_budget_option("All buffers together.")
@threads_option("Workers that read and compare.")
@json_option
@quiet_option
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
    with closing(open_progress(comparison.bytes_read, 0, no_progress)) as progress:
        verdict = _verdict(comparison, output, start, progress)
    with stdout():
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


def _show_plan(checkpoint: Checkpoint, plan: Plan, as_json: bool) -> None:
    with stdout():
        if as_json:
            click.echo(dump(plan_json(checkpoint, plan), sys.stdout.isatty()))
        else:
            print_plan(checkpoint, plan, sys.stdout)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


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
    except ReaderLeft:
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
    tell(f"fp8stream: {' '.join('; '.join(messages).splitlines())}")
    return code
