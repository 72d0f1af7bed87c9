"""`sglang-core tune` on kernels that are interpreted: its mechanics. Times here are the interpreter's, and no test looks at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_triton import gemm_parts, tuning
from sglang_triton.packed import format_constexprs
from sglang_triton.search import SPACES
from sglang_triton.tuner import TritonTuner

from sglang_core.api import ConfigError, DeviceInfo, Knob, TuneContext
from sglang_core.cli.main import main

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 64,
    "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "vocab_size": 128, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "torch_dtype": "bfloat16", "eos_token_id": 0,
}  # fmt: skip
FMT = {"FMT": "dense", "BITS": 16}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, empty."""
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    for cache in (tuning.user_table, tuning.choose):
        cache.cache_clear()
    yield tmp_path
    for cache in (tuning.user_table, tuning.choose):
        cache.cache_clear()


@pytest.fixture
def tune(tmp_path: Path) -> Any:
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(MODEL))

    def run(*flags: str) -> int:
        which = ["--device", "triton", "--model-path", str(path), "--load-format", "dummy", "--skip-tokenizer-init"]
        return main(["tune", *which, "--repeats", "1", *flags])

    return run


def written(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("op", "key", "flags"),
    [
        ("moe.fused", "moe.fused", ("--tokens", "1")),
        ("gemm.grouped", "moe.fused", ("--tokens", "1")),
        ("gemm.linear", "gemm.linear", ("--tokens", "2", "--quantization", "fp8")),
        ("attn.paged", "attn.paged", ("--tokens", "1,20", "--context", "24")),
    ],
)
def test_what_it_writes_is_in_force(
    tune: Any, folder: Path, capsys: pytest.CaptureFixture[str], op: str, key: str, flags: tuple[str, ...]
) -> None:
    """An entry for each choice, each of a config that kernels take; and the file is what explain names."""
    assert tune("--op", op, "--json", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    path = folder / "interpreter.json"
    assert report["configs"] == str(path)
    entries = written(path)[key]
    assert len(entries) == len(report["choices"]) >= 2
    assert not any(choice["dropped"] for choice in report["choices"]), "a candidate is wrong"
    for choice in report["choices"]:
        best = choice["after"] or choice["before"]
        assert dict(tuning.choose(key, **choice["sizes"])) == best
    assert "interpreter" in written(path)[tuning.ABOUT]["device"]
    assert str(path) in tuning.source(tuning.INTERPRETER)


def test_a_dry_run_writes_nothing(tune: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--op", "moe.fused", "--tokens", "1", "--dry-run") == 0
    assert "candidates" in capsys.readouterr().out
    assert not (folder / "interpreter.json").exists()


def test_out_is_a_file_beside(tune: Any, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "new" / "mine.json"
    assert tune("--op", "moe.fused", "--tokens", "1", "--out", str(mine)) == 0
    assert written(mine)["moe.fused"]
    assert not (folder / "interpreter.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--op", "gemm.linear", "--device", "cpu"), "runs its REFERENCE body"),
        (("--op", "norm.rms"), "is not tuned"),
        (("--op", "moe.fuse"), "did you mean 'moe.fused'"),
        (("--op", "attn.mla_paged"), "has no attn.mla_paged"),
        (("--op", "moe.fused", "--kernel", "moe.fused=reference"), "asked for with --kernel"),
        (("--op", "moe.fused", "--tokens", "many"), "--tokens"),
        (("--op", "moe.fused", "--repeats", "0"), "--repeats 0"),
    ],
)
def test_errors_say_what_to_do(
    tune: Any, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert tune(*flags) == 2
    assert words in capsys.readouterr().err


def test_explain_names_the_file_in_force(folder: Path, tune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(next(folder.glob("model/config.json")))
    explain = [
        "explain",
        "--device",
        "triton",
        "--model-path",
        model,
        "--load-format",
        "dummy",
        "--op",
        "moe.fused",
        "--json",
    ]
    assert main(explain) == 0
    assert json.loads(capsys.readouterr().out)[0]["why"].endswith("configs: sglang_triton/configs/interpreter.json")
    (folder / "interpreter.json").write_text("{}")
    assert main(explain) == 0
    assert f"configs: {folder}/interpreter.json, then sglang_triton" in json.loads(capsys.readouterr().out)[0]["why"]


def entry(config: dict[str, int], *, exactly: dict[str, Any], up_to: dict[str, int] | None = None) -> dict[str, Any]:
    return {"exactly": exactly, "up_to": up_to or {}, "config": config}


def test_entries_of_the_user_come_first_where_they_hold(folder: Path) -> None:
    small, large = ({"BLOCK_T": 16, "BLOCK_N": n, "NATIVE_FP8": 0, "PTX": 0} for n in (32, 64))
    shape = {"N": 64, "K": 32, "X": 4, **FMT}
    entries = [entry(small, exactly=shape, up_to={"S": 8}), entry(large, exactly=shape, up_to={"S": 64})]
    (folder / "interpreter.json").write_text(json.dumps({"moe.fused": entries}))
    packaged = dict(tuning.choose_for(tuning.INTERPRETER, "moe.fused", {"S": 65, **shape}))
    assert dict(tuning.choose("moe.fused", S=8, **shape)) == small
    assert dict(tuning.choose("moe.fused", S=9, **shape)) == large
    assert dict(tuning.choose("moe.fused", S=65, **shape)) == packaged
    assert dict(tuning.choose("moe.fused", S=8, **shape | {"FMT": "mxfp4.g32"})) != small


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"moe.fused": 3}',
        '{"no.op": [{"config": {}}]}',
        '{"moe.fused": [{"config": {"BLOCK_Q": 1}}]}',
        '{"moe.fused": [{"exactly": {"Q": 1}, "config": {"BLOCK_T": 16, "BLOCK_N": 32, "NATIVE_FP8": 0, "PTX": 0}}]}',
    ],
)
def test_a_file_of_something_else_is_an_error(folder: Path, text: str) -> None:
    (folder / "interpreter.json").write_text(text)
    with pytest.raises(ConfigError, match=r"interpreter\.json cannot be used"):
        tuning.choose("moe.fused", S=1, N=1, K=1, X=1, **FMT)


def test_entries_are_kept_replaced_and_ordered(folder: Path) -> None:
    tuner = TritonTuner(
        TuneContext(device=DeviceInfo(backend="triton", path="triton/interpreter", name="x"), op="moe.fused")
    )

    def knob(rows: int, width: int) -> Knob:
        return Knob("moe.fused", tuple(sorted({"S": rows, "N": width, "K": 32, "X": 4, **FMT}.items())))

    def config(width: int) -> dict[str, int]:
        return {"BLOCK_T": 16, "BLOCK_N": width, "NATIVE_FP8": 0, "PTX": 0}

    tuner.write({knob(512, 64): config(64), knob(8, 64): config(32)}, {"date": "then"})
    path = tuner.write({knob(8, 64): config(128), knob(64, 64): config(256)}, {"date": "now"})
    found = written(path)
    assert [(e["up_to"]["S"], e["config"]["BLOCK_N"]) for e in found["moe.fused"]] == [(8, 128), (64, 256), (512, 64)]
    assert found[tuning.ABOUT] == {"date": "now"}


def test_candidates_keep_what_is_no_axis_and_leave_out_what_is_senseless() -> None:
    in_force = {"BLOCK_T": 16, "BLOCK_N": 64, "NATIVE_FP8": 1, "PTX": 1, "num_warps": 4, "num_stages": 4}
    sizes = {"T": 16, "N": 4096, "K": 4096, "FMT": "fp8.block128", "BITS": 8}
    found = list(SPACES["gemm.linear"].candidates(in_force, sizes))
    assert found
    assert in_force not in found
    assert {c["NATIVE_FP8"] for c in found} == {1}
    assert {c["BLOCK_T"] for c in found} == {16}, "tiles taller than there are rows"
    assert {c["num_stages"] for c in found} == {1, 2, 3, 4, 5}


def test_int4_products_of_few_rows_choose_their_parts(folder: Path) -> None:
    tuner = TritonTuner(
        TuneContext(device=DeviceInfo(backend="triton", path="triton/interpreter", name="x"), op="gemm.linear")
    )
    x, facts = torch.zeros(2, 1024, dtype=torch.bfloat16), format_constexprs("int4.awq.g128", 1024)
    (choice,) = tuner.choices(lambda: gemm_parts.config_of(x, facts, 2, 256))
    assert choice.knob == Knob("gemm.parts", (("K", 1024), ("N", 256)))
    assert {config["PARTS"] for config in choice.candidates} == {1, 4, 8}


def test_parts_are_a_warp_each_or_none() -> None:
    """With one part the kernel is another, whose own entries count: it is tried once."""
    in_force = {"PARTS": 8, "BLOCK_N": 64, "PTX": 1, "num_warps": 8, "num_stages": 3}
    space = SPACES["gemm.parts"]
    found = list(space.candidates(in_force, {"N": 8192, "K": 4096}))
    assert {(c["PARTS"], c["num_warps"]) for c in found if c["PARTS"] > 1} == {(4, 4), (8, 8)}
    assert len([c for c in found if c["PARTS"] == 1 and c["num_warps"] == 8]) == 1
    assert not [c for c in space.candidates(in_force, {"N": 8192, "K": 4608}) if c["PARTS"] == 8], "4.5 groups a part"
    assert space.shared(in_force, {"N": 8192, "K": 4096}) == 8 * 128 * (2 * 16 + 32) * 2


def test_what_cannot_fit_shared_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_triton.tuner.current_arch", lambda: "gfx942")  # 64 KiB
    monkeypatch.setattr(tuning, "current_arch", lambda: "gfx942")
    tuner = TritonTuner(TuneContext(device=DeviceInfo(backend="rocm", path="rocm/gfx942", name="x"), op="gemm.linear"))
    sizes = {"T": 4096, "N": 4096, "K": 4096, "FMT": "fp8.block128", "BITS": 8}
    (choice,) = tuner.choices(lambda: tuning.choose("gemm.linear", **sizes))
    space = SPACES["gemm.linear"]
    assert choice.unfit > 0
    assert all(space.shared(config, sizes) <= 64 << 10 for config in choice.candidates)
    assert len(choice.candidates) + choice.unfit == len(list(space.candidates(choice.in_force, sizes)))


@pytest.mark.parametrize(
    ("op", "flags", "words"),
    [
        ("moe.fused", ("--tokens", "1"), ["4 experts 64 by 32, top 2, 1 tokens"]),
        ("gemm.grouped", ("--tokens", "1"), ["4 experts 64 to 64, 2 rows", "4 experts 32 to 64, 2 rows"]),
        ("attn.paged", ("--tokens", "20", "--context", "24"), ["decode of 20, context 24", "prompt of 20"]),
    ],
)
def test_its_kernels_are_compared_with_the_bodies(
    tune: Any, capsys: pytest.CaptureFixture[str], op: str, flags: tuple[str, ...], words: list[str]
) -> None:
    assert tune("--op", op, "--providers", "--json", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["in_force"] == "triton" and list(report["ratios"]) == ["reference"]
    assert [call["call"].removeprefix("attn.rope_paged: ") for call in report["calls"]] == words
    assert bool(report["notes"]) == (op == "gemm.grouped"), "no layer calls that by itself"
