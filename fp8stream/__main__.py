"""`python -m fp8stream` is the `fp8stream` command."""

import sys

from fp8stream.cli import main

sys.exit(main())
