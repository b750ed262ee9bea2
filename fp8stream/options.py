"""The options that commands share, and what they mean."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

import click

from fp8stream.checkpoint import Checkpoint
from fp8stream.errors import SchemeError
from fp8stream.experts import ExpertForm, ExpertLayout, ExpertOptions
from fp8stream.memory import parse_size
from fp8stream.plan import Plan, Resources, plan_quantization
from fp8stream.policy import Patterns
from fp8stream.scheme import Granularity, OutputFormat, Scheme

F = TypeVar("F", bound=Callable[..., object])

DEFAULT_BUDGET = "1GiB"
DEFAULT_SHARD_SIZE = "5GB"


def as_size(context: click.Context, option: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def not_empty(context: click.Context, option: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("is empty; was a variable not set?")
    return value


def device_name(context: click.Context, option: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu, cuda or cuda:N")
    return value


def expression(
    context: click.Context, option: click.Parameter, value: str | None
) -> "re.Pattern[str] | None":
    try:
        return re.compile(value) if value is not None else None
    except (re.error, OverflowError, RecursionError) as error:
        raise click.BadParameter(f"{value!r} is not a regular expression: {error}") from None


def expert_layout_option(what: str) -> Callable[[F], F]:
    layouts = click.Choice([layout.value for layout in ExpertLayout])
    return click.option("--expert-layout", type=layouts, help=what)


def memory_budget_option(what: str) -> Callable[[F], F]:
    return click.option(
        "--memory-budget",
        callback=as_size,
        metavar="SIZE",
        default=DEFAULT_BUDGET,
        show_default=True,
        help=what,
    )


def threads_option(what: str) -> Callable[[F], F]:
    workers = click.IntRange(1, 1024)
    return click.option(
        "--threads", type=workers, metavar="N", help=f"{what}  [default: all cores]"
    )


def json_option(command: F) -> F:
    words = "The result as one JSON object on stdout."
    return click.option("--json", "as_json", is_flag=True, help=words)(command)


def quiet_option(command: F) -> F:
    return click.option("-q", "--no-progress", is_flag=True, help="No progress on stderr.")(command)


def scheme_options(command: F) -> F:
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
            expert_layout_option(
                "How they lie there, if the model type does not tell: [experts, out, in] or "
                "[experts, in, out], gate and up in halves or interleaved."
            ),
        ]
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Asked:
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


def read_options(
    *,
    scheme: str,
    output_format: str,
    ignore: Sequence[str],
    include: Sequence[str],
    ignore_from: TextIO | None,
    experts: str,
    expert_layout: str | None,
) -> Asked:
    """What the options mean. Reads `--ignore-from`."""
    lines = _lines_of(ignore_from) if ignore_from else ()
    listed = (line for line in lines if line and not line.startswith("#"))
    return Asked(
        Scheme(Granularity(scheme), OutputFormat(output_format)),
        Patterns((*ignore, *listed), tuple(include)),
        ExpertOptions(ExpertForm(experts), ExpertLayout(expert_layout) if expert_layout else None),
    )


def _lines_of(file: TextIO) -> tuple[str, ...]:
    try:
        return tuple(line.rstrip("\r\n") for line in file)
    except UnicodeDecodeError as error:
        raise SchemeError(f"--ignore-from {file.name}: expected UTF-8: {error}") from error
