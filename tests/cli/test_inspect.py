"""`devices`, `explain`, `doctor` and `profile`: what they print of what the backend layer finds."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest

from sglang_core.backend import devices
from sglang_core.backend.devices import InstalledBackend
from sglang_core.backend.interface import DeviceInfo, DeviceNote
from sglang_core.backend.selection import ExplainRow
from sglang_core.bench.op_clock import OpTime
from sglang_core.cli import doctor, profile
from sglang_core.config import EngineConfig
from sglang_core.errors import DeviceError

from .conftest import Cli

GOOD = InstalledBackend(
    name="acme", dist="sglang-acme", version="1.2", status="ok",
    devices=(DeviceInfo(backend="acme", index=1, path="acme/v1", name="Acme One", score=7, total_memory=2**30),),
)  # fmt: skip
BAD = InstalledBackend(name="zeta", dist="sglang-zeta", version="0.9", status="failed", message="wants a newer core")
ABSENT = InstalledBackend(name="nope", dist="sglang-nope", version="0.1", status="absent", message="no driver")


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[InstalledBackend]:
    found = [GOOD, BAD, ABSENT]

    def auto(device: str) -> None:
        raise DeviceError("zeta is broken")

    monkeypatch.setattr(devices, "installed_backends", lambda: found)
    monkeypatch.setattr(devices, "open_device", auto)
    return found


def test_devices_shows_failures_as_rows(cli: Cli, backends: list[InstalledBackend]) -> None:
    outcome = cli("devices")
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    assert all(words in lines["acme:1"] for words in ("acme/v1", "Acme One", "1.0 GiB", "sglang-acme 1.2", "ok"))
    assert all(words in lines["zeta"] for words in ("failed", "wants a newer core"))
    assert all(words in lines["nope"] for words in ("absent", "no driver"))
    assert "--device auto is nothing: zeta is broken" in outcome.out
    assert outcome.status == 1


def test_a_device_with_a_problem_shows_it(cli: Cli, backends: list[InstalledBackend]) -> None:
    info = DeviceInfo(backend="acme", index=2, path="acme/v1", name="Acme Two", problem="do X")
    backends.append(replace(GOOD, devices=(info,)))
    lines = {line.split()[0]: line for line in cli("devices").out.splitlines() if line.strip()}
    assert "problem" in lines["acme:2"] and "do X" in lines["acme:2"]


def test_absent_devices_are_no_failure(cli: Cli, backends: list[InstalledBackend]) -> None:
    backends.remove(BAD)
    assert cli("devices").status == 0


def test_devices_json(cli: Cli, backends: list[InstalledBackend]) -> None:
    document = json.loads(cli("devices", "--json").out)
    assert document["backends"][0]["devices"][0]["path"] == "acme/v1"
    assert document["backends"][1]["message"] == "wants a newer core"


def row(op: str, provider: str, *, fallback: bool = False, refused: tuple[tuple[str, str], ...] = ()) -> ExplainRow:
    return ExplainRow(
        op=op,
        layer="L",
        fmt="*",
        dtype="bfloat16",
        provider=provider,
        why="because",
        refused=refused,
        fallback=fallback,
    )


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """`explain` answers with fixed rows and notes the config it was asked about."""
    asked: list[EngineConfig] = []
    rows = [
        row("norm.rms", "reference"),
        row("norm.rms", "reference"),
        row("attn.paged", "acme", refused=(("other (x:y)", "needs AMX"),)),
        row("gemm.linear", "reference", fallback=True),
    ]

    def explain(config: EngineConfig) -> list[ExplainRow]:
        asked.append(config)
        return rows

    module = types.ModuleType("sglang_core.engine.explain")
    module.explain = explain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang_core.engine.explain", module)
    return asked


def test_explain_marks_reference_and_fallback_and_says_why_not(cli: Cli, explained: list[EngineConfig]) -> None:
    outcome = cli("explain", "--model-path", "demo", "--device", "cpu", "--kernel", "a.b=c")
    lines = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    assert lines["norm.rms"].split()[3:5] == ["2", "REFERENCE"]  # two sites, one row
    assert "other (x:y): needs AMX" in lines["attn.paged"]
    assert "FALLBACK" in lines["gemm.linear"]
    assert "4 op sites: 2 REFERENCE, 1 acme, 1 FALLBACK" in outcome.out
    assert explained[0].device.kernel == ("a.b=c",)


def test_explain_json_and_filter(cli: Cli, explained: list[EngineConfig]) -> None:
    document = json.loads(cli("explain", "--model-path", "demo", "--op", "attn", "--json").out)
    assert [r["op"] for r in document] == ["attn.paged"]
    assert document[0]["refused"] == [["other (x:y)", "needs AMX"]]


def test_doctor_fails_on_a_broken_plugin(cli: Cli, backends: list[InstalledBackend]) -> None:
    outcome = cli("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(outcome.out)}
    assert outcome.status == 1
    assert (checks["--device auto"]["status"], checks["--device auto"]["fix"]) == ("fail", "zeta is broken")
    assert checks["device acme:1"]["status"] == "ok"
    assert (checks["device nope"]["status"], checks["device nope"]["fix"]) == ("warn", "no driver")


def test_doctor_fails_on_a_device_that_cannot_be_opened(backends: list[InstalledBackend]) -> None:
    info = DeviceInfo(backend="acme", index=2, path="acme/v1", name="Acme Two", problem="do X")
    backends.append(replace(GOOD, devices=(info,)))
    found = {check.name: check for check in doctor._devices()}
    assert (found["device acme:2"].status, found["device acme:2"].fix) == ("fail", "do X")
    assert found["device acme:1"].status == "ok"


def test_doctor_says_once_what_devices_can_do_without(backends: list[InstalledBackend]) -> None:
    fast, slow = DeviceNote(name="fast", found="1.0"), DeviceNote(name="slow", found="not built", fix="build it")
    device = GOOD.devices[0]
    backends[:] = [
        replace(GOOD, devices=(replace(device, notes=(fast, slow)), replace(device, index=2, notes=(fast,))))
    ]
    found = [(c.name, c.status, c.found, c.fix) for c in doctor._devices() if c.name.startswith("acme: ")]
    assert found == [("acme: fast", "ok", "1.0", ""), ("acme: slow", "warn", "not built", "build it")]


def test_doctor_warns_without_failing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda port: [doctor.Check(name="x", status="warn", found="odd", fix="do y")]
    )
    outcome = cli("doctor")
    assert outcome.status == 0
    assert "1 checks: 0 failed, 1 to look at" in outcome.out


def test_doctor_survives_a_check_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no such file")

    monkeypatch.setattr(doctor, "_host", broken)
    check = next(c for c in doctor.examine(0) if c.name == "broken")
    assert (check.status, check.found) == ("fail", "RuntimeError: no such file")


def test_doctor_reports_a_malformed_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DISABLE_PLUGINS", "a,,b")
    [check] = doctor._environment()
    assert (check.status, check.fix) == ("fail", "unset SGLANG_DISABLE_PLUGINS")
    assert "a,,b" in check.found


def test_doctor_sees_a_taken_port() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [check] = doctor._port(port)
    assert (check.name, check.status) == (f"port {port}", "warn")


def test_profile_ranks_and_marks_reference_ops() -> None:
    ops = [
        OpTime(op="attn.paged", layer="A", provider="reference", calls=4, seconds=0.006),
        OpTime(op="gemm.linear", layer="B", provider="acme", calls=8, seconds=0.003),
    ]
    rows = profile.table_rows(0.010, ops)
    assert rows[0] == ("attn.paged", "A", "REFERENCE", 4, "6.000", "60.0%", "60%")
    assert rows[1] == ("gemm.linear", "B", "acme", 8, "3.000", "30.0%", "90%")
    assert rows[2] == ("(outside ops)", "", "", "", "1.000", "10.0%", "100%")


def test_profile_says_what_to_write_next() -> None:
    def op(name: str, layer: str, provider: str, seconds: float) -> OpTime:
        return OpTime(op=name, layer=layer, provider=provider, calls=1, seconds=seconds)

    prefill = [
        op("gemm.linear", "A", "reference", 0.2),
        op("gemm.linear", "B", "reference", 0.3),
        op("norm.rms", "A", "acme", 9),
    ]
    decode = [op("attn.paged", "A", "reference", 0.6), op("gemm.linear", "A", "reference", 0.1)]
    assert profile.write_next({"prefill": (1.0, prefill), "decode": (1.0, decode)}) == [
        ("attn.paged", {"prefill": 0.0, "decode": 0.6}),
        ("gemm.linear", {"prefill": 0.5, "decode": 0.1}),
    ]
    assert profile.write_next({"decode": (1.0, prefill[2:])}) == []


def test_profile_prints_and_writes_it(cli: Cli) -> None:
    command = (
        "profile",
        "--model-path",
        "demo",
        "--device",
        "cpu",
        "--batch-size",
        "1",
        "--length",
        "8",
        "--repeats",
        "1",
    )
    assert "write these next" in cli(*command).out
    document = json.loads(cli(*command, "--json").out)
    assert {"prefill", "decode", "write_next"} == document.keys()
    assert {"gemm.linear", "attn.paged"} <= {entry["op"] for entry in document["write_next"]}
