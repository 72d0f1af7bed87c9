"""`benchmarks/gpu`: what a run keeps for the next, when it stops, and what its figures are held against. No device is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.gpu.busy import busy_fraction
from benchmarks.gpu.checkpoint import kept_checkpoint, write_checkpoint
from benchmarks.gpu.kernels import Floor, all_loads
from benchmarks.gpu.link_sources import link
from benchmarks.gpu.load import Work
from benchmarks.gpu.session import Case, Facts, Session

ROOT = Path(__file__).parents[2]
ABOUT = {"date": "today", "device": {"name": "Acme"}, "small": True}


class Cases:
    """Named cases that note when they run; each takes ten seconds of a clock of its own."""

    def __init__(self, broken: str = "") -> None:
        self.now, self.ran, self.broken = 0.0, list[str](), broken

    def case(self, name: str) -> Case:
        return Case(name, lambda: self.run(name), seconds=10)

    def run(self, name: str) -> Facts:
        self.now += 10
        self.ran.append(name)
        if name == self.broken:
            raise RuntimeError("an illegal address")
        return {"us": 1.5}

    def session(self, path: Path, limit: float = 1000, about: Facts = ABOUT) -> tuple[Session, list[Case]]:
        return Session(path, dict(about), limit, clock=lambda: self.now), [self.case(n) for n in "abc"]


def quiet(text: str) -> None:
    return


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    cases = Cases()
    session, listed = cases.session(tmp_path / "x.json", limit=25)
    assert not session.run(listed, quiet), "time for two of three"
    session, listed = cases.session(tmp_path / "x.json", limit=25)
    assert session.run(listed, quiet)
    assert cases.ran == ["a", "b", "c"]
    assert list(json.loads((tmp_path / "x.json").read_text())["done"]) == ["a", "b", "c"]


def test_what_fails_is_noted_and_tried_again(tmp_path: Path) -> None:
    cases = Cases(broken="b")
    session, listed = cases.session(tmp_path / "x.json")
    assert session.run(listed, quiet)
    assert session.failed == {"b": "RuntimeError: an illegal address"}
    assert list(session.done) == ["a", "c"]
    cases.broken = ""
    session, listed = cases.session(tmp_path / "x.json")
    assert session.run(listed, quiet)
    assert cases.ran == ["a", "b", "c", "b"]
    assert json.loads((tmp_path / "x.json").read_text())["failed"] == {}


@pytest.mark.parametrize(
    ("change", "kept"), [({"date": "tomorrow"}, 3), ({"device": {"name": "Beta"}}, 0), ({"small": False}, 0)]
)
def test_figures_of_two_devices_are_not_one_table(tmp_path: Path, change: Facts, kept: int) -> None:
    session, listed = Cases().session(tmp_path / "x.json")
    session.run(listed, quiet)
    again, _ = Cases().session(tmp_path / "x.json", about=ABOUT | change)
    assert len(again.done) == kept


def test_forgetting_is_by_name(tmp_path: Path) -> None:
    session, listed = Cases().session(tmp_path / "x.json")
    session.run(listed, quiet)
    session.forget("b")
    assert list(session.done) == ["a", "c"]


def test_a_floor_is_the_longer_of_bytes_and_operations() -> None:
    rates = {"copy": 100.0, "matmul": 1000.0}

    def floor(nbytes: int, flops: int, rate: float = 1.0) -> Floor:
        return Floor.of(Work(call=lambda: 0, nbytes=nbytes, flops=flops, rate=rate, provider=""), rates)

    assert floor(200, 1000) == Floor(2.0, "memory")
    assert floor(200, 4000) == Floor(4.0, "compute")
    assert floor(200, 4000, rate=2.0) == Floor(2.0, "memory")


def test_every_target_of_the_table_has_a_load() -> None:
    loads = all_loads()
    assert len({load.name for load in loads}) == len({load.rank for load in loads}) == len(loads)
    assert [load.rank for load in loads] == sorted(load.rank for load in loads)
    words = (
        "decode GQA",
        "prefill GQA",
        "MLA decode",
        "DeepSeek-V3, 4096",
        "Qwen3-30B-A3B, 1 ",
        "fp8 block",
        "int4, 32",
        "norm",
        "rope",
        "act",
        "sampling",
    )
    for word in words:
        assert any(word in load.name and load.target for load in loads), word


def test_busy_time_is_a_union() -> None:
    assert busy_fraction([(0, 4), (2, 5), (6, 8)]) == pytest.approx(7 / 8)
    assert busy_fraction([(0, 10), (1, 2)]) == 1.0
    with pytest.raises(ValueError, match="nothing ran"):
        busy_fraction([])


@pytest.mark.parametrize(
    ("changes", "num"), [({}, 3 + 9 * 2), ({"model_type": "qwen3", "tie_word_embeddings": True}, 2 + 11 * 2)]
)
def test_a_checkpoint_has_every_weight_once(changes: Facts, num: int, tmp_path: Path) -> None:
    config = json.loads((ROOT / "benchmarks/configs/llama-tiny.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    nbytes = write_checkpoint(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert nbytes == index["metadata"]["total_size"]
    assert len(index["weight_map"]) == num
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert all(index["weight_map"][key] == file for key in opened.keys())  # noqa: SIM118  it is no mapping


def test_a_checkpoint_is_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = ROOT / "benchmarks/configs/llama-tiny.json"
    folder = kept_checkpoint(config)
    written = (folder / "model-00000.safetensors").stat().st_mtime_ns
    assert kept_checkpoint(config) == folder
    assert (folder / "model-00000.safetensors").stat().st_mtime_ns == written
    folder.rename(folder.with_suffix(".new"))  # a run that was killed while it wrote
    assert (kept_checkpoint(config) / "model.safetensors.index.json").exists()
    assert not folder.with_suffix(".new").exists()


def test_a_source_tree_gets_what_plugins_are_found_by(tmp_path: Path) -> None:
    folder = link(tmp_path, ROOT / "plugins/triton")
    assert folder.name.startswith("sglang_triton-")
    assert "Name: sglang-triton" in (folder / "METADATA").read_text()
    assert "Requires-Dist: sglang-core" in (folder / "METADATA").read_text()
    assert "[sglang_core.plugins]" in (folder / "entry_points.txt").read_text()
