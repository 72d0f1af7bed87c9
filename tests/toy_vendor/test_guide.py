"""The plugin guide, as written: its files are those that are generated, and its commands run where there is no repository."""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from sglang_conformance import scaffold
from sglang_conformance.cli import make_parser

from tests.conformance.outside import REPO, environment

GUIDE = REPO / "docs/plugin-guide.md"
BLOCK = re.compile(
    r"^```(?P<lang>\w+)(?: (?P<what>as|file)=(?P<file>\S+))?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """`what` is "as" where the file is there already and must be like this, "file" where it is to be written."""

    lang: str
    what: str | None
    file: str | None
    body: str


def blocks() -> Iterator[Block]:
    for match in BLOCK.finditer(GUIDE.read_text()):
        yield Block(match["lang"], match["what"], match["file"], match["body"])


def test_files_of_the_guide_are_those_that_are_generated(tmp_path: Path) -> None:
    folder = scaffold.create("acme", tmp_path)
    shown = [block for block in blocks() if block.what == "as"]
    assert {block.file for block in shown} == {"sglang_acme/backend.py", "sglang_acme/activation.py"}
    for block in shown:
        assert block.file is not None
        assert block.body == (folder / block.file).read_text(), (
            f"{block.file}: docs/plugin-guide.md and the template differ"
        )


def test_commands_of_the_suite_parse() -> None:
    lines = [line for block in blocks() if block.lang == "bash" for line in block.body.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("sglang-conformance")]
    assert {args[0] for args in commands} == {"plugin", "run", "perf", "verify", "compare"}
    for args in commands:
        make_parser().parse_args(args)


class Index(BaseHTTPRequestHandler):
    """A package index that keeps the names of what is uploaded to it."""

    uploaded: list[str] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.uploaded += re.findall(r'filename="([^"]+)"', body.decode("latin-1"))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_guide_runs_as_written(index: str, tmp_path: Path) -> None:
    shell = environment(tmp_path, name="acme")
    shell |= {"TWINE_REPOSITORY_URL": index, "TWINE_USERNAME": "vendor", "TWINE_PASSWORD": "secret"}
    where = tmp_path / "vendor"
    where.mkdir()
    outputs: dict[str, str] = {}
    for block in blocks():
        if block.what == "file":
            assert block.file is not None
            (where / block.file).write_text(block.body)
        elif block.lang == "bash":
            script = f"set -e\n{block.body}pwd > {tmp_path}/where\n"
            done = subprocess.run(
                ["bash", "-c", script], cwd=where, env=shell, capture_output=True, text=True, timeout=1800, check=False
            )
            assert done.returncode == 0, f"{block.body}\n{done.stdout}\n{done.stderr}"
            where = Path((tmp_path / "where").read_text().strip())
            outputs[block.body] = done.stdout
    said = "".join(outputs.values())
    code = "import sglang_core, sglang_conformance; print(sglang_core.__file__, sglang_conformance.__file__)"
    places = subprocess.run(
        ["python", "-c", code], cwd=where, env=shell, capture_output=True, text=True, check=True
    ).stdout
    assert all(place.startswith(str(tmp_path)) for place in places.split()), places
    assert "write these next" in said
    assert re.search(r"acme:0\s+acme/v1\s+Acme One", said)
    assert "Paris" in said
    assert re.search(r"act\.gated.*acme", said), "explain"
    assert re.search(r"gemm\.linear\W.*REFERENCE", said), "profile"
    assert "GFLOP/s measured" in said
    assert "acme conforms" in said
    assert "0 regressions" in said
    assert (where / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(Index.uploaded) == ["sglang_acme-0.1.0-py3-none-any.whl", "sglang_acme-0.1.0.tar.gz"]
