"""`python -m sglang_core` is `sglang-core`."""

from __future__ import annotations

import sys

from sglang_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
