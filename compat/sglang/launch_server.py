"""`python -m sglang.launch_server --model-path X --port 30000`."""

from __future__ import annotations

import sys

from sglang_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
