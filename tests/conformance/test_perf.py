"""Figures: what they are made of, that every op has some, and that none of them is a verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sglang_conformance.cli import main
from sglang_conformance.perf import apart, load, measure, roofline
from sglang_conformance.perf.attention import SPEC, pairs_of, reqs_of
from sglang_conformance.perf.clock import SAMPLE, seconds_a_call
from sglang_conformance.perf.dense import F, M
from sglang_conformance.perf.figures import Perf, Row, share_of
from sglang_conformance.perf.load import CONTEXT, RING_BYTES, STEPS, UNCOUNTED, PerfEnv, Work, all_loads
from sglang_conformance.perf.table import table

from sglang_core.errors import SglangError
from sglang_core.ops import OPS
from tests.conformance.fake_device import layer_norm, suite


class Device:
    """A clock that only calls move, and that must be waited for."""

    def __init__(self) -> None:
        self.now, self.queued, self.calls = 0.0, 0.0, 0

    def call(self, seconds: float) -> None:
        self.calls += 1
        self.queued += seconds

    def synchronize(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


def test_a_call_is_measured_to_its_end_and_its_first_time_does_not_count() -> None:
    device = Device()
    costs = iter([9.0, *[3e-3] * 10_000])
    found = seconds_a_call([lambda: device.call(next(costs))], device.synchronize, budget=0.1, clock=lambda: device.now)
    assert found == pytest.approx(3e-3)


def test_one_slow_sample_does_not_move_the_median_and_short_calls_share_a_sample() -> None:
    device = Device()
    costs = iter([1e-5, 1e-5, *[1e-5] * 700, 5.0, *[1e-5] * 100_000])
    found = seconds_a_call([lambda: device.call(next(costs))], device.synchronize, budget=0.2, clock=lambda: device.now)
    assert found == pytest.approx(1e-5)
    assert device.calls > 5 * SAMPLE / 1e-5


def test_a_call_longer_than_the_budget_is_made_twice() -> None:
    device = Device()
    slow = [lambda: device.call(30.0)]
    assert seconds_a_call(slow, device.synchronize, budget=0.1, clock=lambda: device.now) == 30.0
    assert device.calls == 2


@pytest.mark.parametrize(
    ("nbytes", "flops", "seconds", "expected"),
    [
        (100, 0, 2.0, (0.5, "memory")),  # 100 bytes take a second at 100 bytes a second
        (100, 4000, 8.0, (0.5, "compute")),  # 4000 operations take four at 1000 a second
        (0, 0, 1.0, (0.0, "memory")),
    ],
)
def test_a_share_is_the_least_time_over_the_time(
    nbytes: int, flops: int, seconds: float, expected: tuple[float, str]
) -> None:
    assert share_of(seconds, nbytes, flops, (100.0, 1000.0)) == expected


def test_every_op_has_loads_or_a_reason_for_none() -> None:
    counted = {load.op for load in all_loads()}
    assert counted | set(UNCOUNTED) == set(OPS)
    assert counted & set(UNCOUNTED) == set()
    titles = [load.title for load in all_loads()]
    assert len(titles) == len(set(titles))


def test_serving_shapes_are_decode_and_prefill() -> None:
    assert list(STEPS.values()) == [1, 8, 32, 512]
    assert reqs_of(8) == [(CONTEXT - 1, 1)] * 8
    assert reqs_of(512) == [(0, 512)]
    assert pairs_of([(3, 2)]) == 4 + 5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for tests, and probes of no length: figures of no use, of every load's own making."""
    monkeypatch.setattr(load, "RING_BYTES", 1 << 16)
    for name, value in {
        "RING_BYTES": 1 << 16,
        "STREAMED": 64,
        "LARGEST": 64,
        "SMALLEST": 64,
        "PROBE_SECONDS": 0,
    }.items():
        monkeypatch.setattr(roofline, name, value)
    monkeypatch.setattr(measure, "ROW_SECONDS", 0.0)


def work_of(title: str) -> Work:
    (found,) = (load for load in all_loads() if load.title == title)
    env = suite().env(torch.bfloat16, 0, PerfEnv)
    env.stock = {}
    with torch.inference_mode():
        return found.make(env)


@pytest.mark.usefixtures("small")
def test_counts_are_those_of_the_definition() -> None:
    linear = work_of("gemm.linear [decode 8, down]")
    assert linear.flops == 2 * 8 * F * M
    assert linear.nbytes == 2 * (F * M + 8 * F + 8 * M)
    paged = work_of("attn.paged [decode 8]")
    assert paged.flops == 4 * 8 * CONTEXT * SPEC.num_heads * SPEC.head_dim
    kept = 2 * SPEC.num_kv_heads * SPEC.head_dim
    assert paged.nbytes == 2 * (8 * CONTEXT * kept + 2 * 8 * SPEC.num_heads * SPEC.head_dim + 8 * kept)
    assert work_of("norm.add_rms [decode 1]").nbytes == 2 * 4 * 2048
    assert work_of("moe.fused [decode 1]").nbytes == 2 * (4 * 3 * 512 * 1024 + 2 * 1024)


def test_calls_go_round_more_memory_than_caches_hold() -> None:
    env = suite().env(torch.float32, 0, PerfEnv)
    given = [x.data_ptr() for x in env.tensors(1 << 20, copies=load.copies_of(4 << 20))]
    assert len(set(given)) * (4 << 20) >= RING_BYTES
    x = env.normal(3 * load.PERIOD + 5)
    assert torch.equal(x[: load.PERIOD], x[load.PERIOD : 2 * load.PERIOD])
    assert 0.9 < float(x.std()) < 1.1


@pytest.mark.usefixtures("small")
def test_loads_run_on_kernels_and_bodies_and_what_breaks_is_said() -> None:
    found = measure.measure(suite(layer_norm("honest")), ["norm.", "moe.route [decode"])
    assert {(row.op, row.provider) for row in found.rows} == {
        ("norm.rms", "reference"),
        ("norm.rms_gated", "reference"),
        ("norm.add_rms", "reference"),
        ("norm.add_rms_quant", "reference"),
        ("norm.layer", "fake"),
        ("moe.route", "reference"),
    }
    assert all(row.seconds > 0 and row.share > 0 for row in found.rows)
    assert Perf.from_json(json.loads(json.dumps(found.to_json()))) == found
    broken = measure.measure(suite(layer_norm("skips")), ["norm.layer"])
    assert broken.rows == ()
    assert "not today" in broken.skipped[0].reason
    late = measure.measure(suite(), ["norm.rms"], limit=-1.0)
    assert {found.reason for found in late.skipped} == {measure.OUT_OF_TIME}
    with pytest.raises(SglangError, match=r"norm\.nothing"):
        measure.measure(suite(), ["norm.nothing"])


@pytest.mark.usefixtures("small")
def test_formats_that_are_not_claimed_are_not_measured() -> None:
    found = measure.measure(suite(), ["gemm.linear"], limit=-1.0)
    assert {row.fmt for row in found.skipped} == {"dense"}


def row(**more: object) -> Row:
    facts = {"op": "norm.rms", "name": "decode 1", "fmt": "*", "provider": "acme", "seconds": 1e-5, "nbytes": 100}
    return Row(**(facts | {"flops": 0, "share": 0.5, "bound": "memory"} | more))  # type: ignore[arg-type]


def test_the_table_shows_a_bar_where_there_is_room(capsys: pytest.CaptureFixture[str]) -> None:
    perf = Perf(dtype="bfloat16", bandwidth={"copy": 2e10}, matmul={"matmul": 3e12}, rows=(row(), row(share=1.0)))
    for width, bars in ((80, 0), (140, 10 + 20)):
        console = Console(width=width)
        console.print(table(perf, "acme:0", width=width))
        out = capsys.readouterr().out
        assert out.count("█") == bars
        assert "50%" in out
        assert "20.0 GB/s and 3,000 GFLOP/s" in out
        assert max(map(len, out.splitlines())) <= width


@pytest.mark.usefixtures("small")
def test_the_command_writes_figures_and_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "perf.json"
    assert main(["perf", "cpu", "-k", "logits.mask", "--json", str(path), "--num-threads", "1"]) == 0
    assert "logits.mask" in capsys.readouterr().out
    assert {row.op for row in Perf.from_json(json.loads(path.read_text())).rows} == {"logits.mask"}
    assert main(["perf", "cpu", "-k", "no such load"]) == 2


def test_a_process_of_its_own_gives_figures_or_says_why() -> None:
    found = Perf.from_json(apart.measured("cpu", num_threads=1, limit=-1.0))
    assert found.roofs > (0.0, 0.0)
    assert {row.reason for row in found.skipped} == {measure.OUT_OF_TIME}
    assert "toaster" in apart.measured("toaster", num_threads=1)["error"]


@pytest.mark.parametrize("figures", ["some", "none"])
def test_figures_are_in_the_report_and_change_no_verdict(
    figures: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perf = Perf(dtype="bfloat16", bandwidth={"copy": 2e10}, matmul={"matmul": 3e12}, rows=(row(share=0.01),))
    given = perf.to_json() if figures == "some" else {"error": "it crashed"}
    monkeypatch.setattr(apart, "measured", lambda *args, **kwargs: given)
    path = tmp_path / "report.json"
    assert main(["run", "cpu", "-k", "logits.mask[whole", "--perf", "--json", str(path), "--num-threads", "1"]) == 0
    assert json.loads(path.read_text())["perf"] == json.loads(json.dumps(given))
    assert ("norm.rms" if figures == "some" else "no figures: it crashed") in capsys.readouterr().out
