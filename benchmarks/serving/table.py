"""Runs the three scripts here and prints the serving rows of the project's table, each with its target.

python benchmarks/serving/table.py [--device D] > table.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prefix_cache import NUM_REQUESTS, PREFIX

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    startup, cache, decode = (facts_of(name, args.device) for name in ("startup", "prefix_cache", "decode_vs_hf"))
    shared, unshared = cache["shared-prefix"], cache["random-ids"]
    wanted_tokens = (NUM_REQUESTS - 1) * PREFIX
    rows = [
        (
            "shared prefix: prompt tokens from cache",
            f"{shared['cached_tokens']}",
            f">= {wanted_tokens}",
            shared["cached_tokens"] >= wanted_tokens,
        ),
        ("shared prefix: requests/s, cache on / off", f"{shared['ratio']:.2f}x", ">= 5x", shared["ratio"] >= 5),
        ("random ids: requests/s, cache on / off", f"{unshared['ratio']:.3f}x", ">= 0.98x", unshared["ratio"] >= 0.98),
    ]
    for batch_size, facts in decode.items():
        title = f"decode at batch {batch_size} / Hugging Face"
        rows.append((title, f"{facts['ratio']:.2f}x ({facts['ours']:.0f} tokens/s)", ">= 1.5x", facts["ratio"] >= 1.5))
    for name, limit in (("import sglang_core", 0.1), ("sglang-core --help", 0.3), ("server ready on demo", 8.0)):
        own = startup[name]
        rows.append((name, f"{own:.3f} s", f"< {limit} s", own < limit))
    print("| measure | reached | target | |\n|---|---|---|---|")
    for title, reached, target, good in rows:
        print(f"| {title} | {reached} | {target} | {'yes' if good else '**no**'} |")


def facts_of(script: str, device: str) -> dict[str, Any]:
    """Run a script, its lines on stderr, and read its facts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "facts.json"
        argv = [sys.executable, str(HERE / f"{script}.py"), "--device", device, "--json", str(path)]
        subprocess.run(argv, check=True, stdout=sys.stderr)
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts


if __name__ == "__main__":
    main()
