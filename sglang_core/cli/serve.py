"""`sglang-core serve`: the HTTP server. Flags are the engine's settings and nothing else."""

from __future__ import annotations

from sglang_core.cli.parser import Parser
from sglang_core.cli.settings import add_settings, engine_config


def run(argv: list[str]) -> int:
    parser = Parser(
        "serve",
        "--model-path MODEL [options]",
        "Serve a model over HTTP: OpenAI's routes under /v1, SGLang's own under /.",
        argv,
        epilog="example: sglang-core serve --model-path demo --port 30000",
    )
    add_settings(parser)
    config = engine_config(parser.parse())
    from sglang_core.server.run import serve  # imports torch

    return serve(config)
