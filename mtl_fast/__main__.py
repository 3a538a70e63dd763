"""`python -m mtl_fast` is the `mtl-fast` command."""

import sys

from .cli import main

sys.exit(main())
