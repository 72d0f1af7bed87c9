"""`sglang-core bench`: one of three measurements."""

from __future__ import annotations

import importlib

from sglang_core.cli.parser import did_you_mean
from sglang_core.errors import ConfigError

KINDS = {
    "serve": "a running server, over HTTP: latencies and throughput under a load",
    "offline": "the engine in this machine, no HTTP: throughput of a batch of prompts",
    "step": "single prefill and decode steps of the model, over batch sizes and lengths",
}
HELP = "\n".join(
    [
        "usage: sglang-core bench {serve,offline,step} [options]",
        "",
        "Measure something; `sglang-core bench KIND --help` for its options.",
        "",
        *(f"  {kind:<8} {text}" for kind, text in KINDS.items()),
    ]
)


def run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] not in KINDS:
        raise ConfigError(f"bench {argv[0]}: it measures {', '.join(KINDS)}{did_you_mean(argv[0], KINDS)}")
    status: int = importlib.import_module(f"sglang_core.cli.bench_{argv[0]}").run(argv[1:])
    return status
