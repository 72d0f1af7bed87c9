"""The promise of the plugin guide: a device in twenty lines, a kernel in fifteen more, importing the API only."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_core.api.ops import OPS
from sglang_core.backend.devices import open_device
from sglang_core.backend.interface import KernelContext, RuntimeContext
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import OpTable
from sglang_core.cli.main import main

ROOT = Path(__file__).parent
MAX_DEVICE_LINES, MAX_KERNEL_LINES = 20, 15


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package as pip would leave it, with the metadata of its pyproject."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = tmp_path / "sglang_acme-0.1.0.dist-info"
    info.mkdir()
    requires = "".join(f"Requires-Dist: {r}\n" for r in project["dependencies"])
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n{requires}"
    )
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in targets.items())
            for group, targets in project["entry-points"].items()
        )
    )
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]


def code_lines(*files: Path) -> int:
    """Lines that are neither empty, nor comment, nor docstring."""
    count = 0
    for file in files:
        text = file.read_text()
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        docs = [n.body[0] for n in nodes if n.body and ast.get_docstring(n, clean=False) is not None]
        doc_lines = {line for doc in docs for line in range(doc.lineno, (doc.end_lineno or 0) + 1)}
        lines = enumerate(text.splitlines(), 1)
        count += sum(bool(s.strip()) and not s.strip().startswith("#") and i not in doc_lines for i, s in lines)
    return count


def test_a_device_takes_twenty_lines_and_a_kernel_fifteen() -> None:
    assert code_lines(ROOT / "acme/backend.py") <= MAX_DEVICE_LINES
    assert code_lines(ROOT / "acme/activation.py") <= MAX_KERNEL_LINES
    assert {f.name for f in (ROOT / "acme").glob("*.py")} == {"__init__.py", "backend.py", "activation.py"}


def test_it_imports_the_api_and_torch_only() -> None:
    for file in (ROOT / "acme").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name == "sglang_core.api" or name.partition(".")[0] == "torch", f"{file.name} imports {name}"


@pytest.mark.usefixtures("installed")
def test_it_is_found_opened_and_asked_for_its_kernel() -> None:
    chosen = open_device("acme:v1")
    runtime = chosen.backend.create_runtime(RuntimeContext(devices=(chosen.info,)))
    assert runtime.torch_device == torch.device("cpu")
    table = OpTable(chosen.info, chosen.backend, ops=OPS)
    act = table.bind(OpSite(op="act.gated", layer="GatedMLP", dtype="bfloat16"))
    assert act.provider == "acme"
    assert table.bind(OpSite(op="norm.rms", layer="RMSNorm", dtype="bfloat16")).provider == "reference"
    assert table.fallbacks == 0


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_its_kernel_is_the_op(dtype: torch.dtype, kind: str, num_tokens: int) -> None:
    (kernel,) = open_device("acme").backend.kernels(KernelContext(device=open_device("acme").info))
    module, _, name = kernel.fn.partition(":")
    x = torch.randn(num_tokens, 10).to(dtype)
    expected = OPS["act.gated"].body(x, kind)
    torch.testing.assert_close(getattr(importlib.import_module(module), name)(x, kind), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("installed")
def test_its_kernel_is_compared_with_the_body(capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing that it would have to say of itself."""
    flags = (
        "--op",
        "act.gated",
        "--providers",
        "--device",
        "acme",
        "--model-path",
        "demo",
        "--tokens",
        "1,3",
        "--repeats",
        "1",
    )
    assert main(["tune", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["in_force"] == "acme"
    assert list(report["ratios"]) == ["reference"]
    assert not report["out"] and not report["refused"]
