from __future__ import annotations

import json
from pathlib import Path

import pytest
from sglang_conformance.cli import main


def test_run_prints_a_table_and_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert (
        main(["run", "cpu", "-k", "norm.rms[", "-k", "attn.merge[", "--json", str(report), "--num-threads", "1"]) == 0
    )
    out = capsys.readouterr().out
    assert "norm.rms" in out
    assert "attn.merge" in out
    assert "FAIL" not in out
    data = json.loads(report.read_text())
    assert data["counts"]["FAIL"] == 0
    assert data["counts"]["REFERENCE"] == sum(r["verdict"] == "REFERENCE" for r in data["results"])
    assert {r["op"] for r in data["results"]} == {"norm.rms", "attn.merge"}


def test_an_unknown_device_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "toaster"]) == 2
    assert "toaster" in capsys.readouterr().err


def test_selecting_nothing_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "cpu", "-k", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err
