"""The command's entry: imports take a tenth of a second, and a Ctrl-C within it is one as well."""

import os
import sys
from typing import NoReturn

from fp8stream.signals import Signalled, Signals


def run() -> NoReturn:
    """The `fp8stream` command."""
    signals = Signals()
    try:
        signals.listen()
        from fp8stream import cli

        signals.check()
        cli.run(signals)
    except Signalled as signalled:
        sys.stderr.write(f"fp8stream: {signalled}\n")
        os._exit(128 + signalled.number)


if __name__ == "__main__":
    run()
