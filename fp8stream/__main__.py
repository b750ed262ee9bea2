"""The command's entry: imports take a tenth of a second, and a Ctrl-C within it is one as well."""

import os
import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """The `fp8stream` command."""
    try:
        from fp8stream import cli
    except KeyboardInterrupt:
        sys.stderr.write("fp8stream: interrupted\n")
        os._exit(128 + signal.SIGINT)
    cli.run()


if __name__ == "__main__":
    run()
