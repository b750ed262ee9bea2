"""Everything that can go wrong on purpose, as one hierarchy.

    Fp8StreamError
    ├── CheckpointError   the source is damaged, incomplete, or no checkpoint
    │   └── SourceChangedError   it is not the one that the run began with
    ├── SchemeError       a scheme, format or pattern that cannot be honoured
    ├── WeightError       values that have no FP8 form: NaN or infinity
    ├── BudgetError       less memory than the least that can work
    ├── DeviceError       the device that was asked for is not there, or ran out of memory
    │   └── DeviceMemoryError   smaller buffers may do
    ├── ThreadError       the system lets no more threads start
    ├── OutputError       the output cannot be written where it was asked for
    ├── VerifyError       an output is not what its source makes
    └── ReloadError       a reload stopped midway, and which layers are new

A message is one line: what is wrong, where (file, tensor), what was expected and found, and what to
do next. `cli.main` is the one place that turns these into an exit code.
"""

from collections.abc import Sequence


def listed(names: Sequence[str], most: int, apart: str = ", ") -> str:
    """The first names, at `most` so many, and how many more there are."""
    last = " and " if apart == ", " else f"{apart}and "
    more = f"{last}{len(names) - most} more" if len(names) > most else ""
    return apart.join(names[:most]) + more


class Fp8StreamError(Exception):
    """Base of every error that fp8stream raises on purpose.

    `curable` says whether the same command may yet succeed: a disk may get room, and a device
    memory. Where the source or an option has to change, what the run did is of another conversion.
    """

    curable = True


class CheckpointError(Fp8StreamError):
    """The source is damaged, incomplete, or not a checkpoint."""


class SourceChangedError(CheckpointError):
    """The source is not the one that the run began with."""

    curable = False


class SchemeError(Fp8StreamError):
    """A scheme, output format or pattern that cannot be honoured."""


class WeightError(Fp8StreamError):
    """A weight holds values that have no FP8 form."""

    curable = False


class BudgetError(Fp8StreamError):
    """The memory budget is below the least that can work."""


class DeviceError(Fp8StreamError):
    """The device that was asked for is not there, or ran out of memory."""


class DeviceMemoryError(DeviceError):
    """The device, or the host, ran out of memory: smaller buffers may do."""


class ThreadError(Fp8StreamError):
    """The system lets no more threads start."""


class OutputError(Fp8StreamError):
    """The output cannot be written where it was asked for."""


class VerifyError(Fp8StreamError):
    """An output is not what its source makes."""


class ReloadError(Fp8StreamError):
    """A reload stopped midway: modules in `new` have new weights, all others their old ones."""

    def __init__(self, message: str, new: tuple[str, ...]) -> None:
        super().__init__(message)
        self.new = new
