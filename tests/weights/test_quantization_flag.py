"""`--quantization`: a float checkpoint that is quantised while it is read; and what happens where no kernel takes a format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_core.backend.claims import Claim, Claims, Support
from sglang_core.backend.communicator import LocalCommunicator
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.selection import ExplainRow, OpTable
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_rank, fit_table
from sglang_core.engine.explain import explain
from sglang_core.errors import ConfigError, KernelSelectionError
from sglang_core.layers.build import BuildContext, bind_model, packings
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.experts import Experts
from sglang_core.layers.linear import Linear
from sglang_core.layers.packing import totals
from sglang_core.layers.quant_config import ONLINE, online_quant_config, read_quant_config
from sglang_core.models.registry import create_model, model_config
from sglang_core.ops import OPS, quant
from sglang_core.ops.gemm import linear
from sglang_core.ops.weight import PackedWeight
from sglang_core.weights.loader import count_weight_bytes, load_model
from tests.models.harness import PAGE_SIZE, Stepper, build_context
from tests.models.tiny import reference
from tests.weights.test_loader import Ranked
from tests.weights.test_quantised import AWQ, BLOCK, CONFIG, TOKENS, ct, load, load_plain, write
from tests.weights.test_quantised_experts import MOE


def load_as(
    flag: str, folder: Path, config: dict[str, Any], ctx: BuildContext | None = None, *, head: bool = False
) -> CausalLM:
    cfg = model_config(config)
    model = type(create_model(config))(cfg.replace(quantization=online_quant_config(flag, cfg.quantization, head=head)))
    return load_model(model, folder, ctx or build_context(), progress=False)


def floats(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """A random checkpoint of floats."""
    plain = write(folder, "ct fp8", config=config, quantised="none")
    (folder / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize("flag", ONLINE)
@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "experts"])
def test_logits_are_those_of_the_quantised_and_dequantised_weights(flag: str, config: Any, tmp_path: Path) -> None:
    tensors = floats(tmp_path, config)
    model = load_as(flag, tmp_path, config)
    fmts = {type(m).__name__: m.fmt.name for m in model.modules() if isinstance(m, Linear | Experts)}
    assert fmts.pop("Router", "dense") == "dense"
    assert set(fmts.values()) == {ONLINE[flag]}
    rounded = {
        n: quant.dequantize(quant.quantize(t, ONLINE[flag])) if n.endswith("_proj.weight") else t
        for n, t in tensors.items()
    }
    assert rounded.keys() == tensors.keys() and any(not torch.equal(rounded[n], t) for n, t in tensors.items())
    for name, module in model.named_modules():
        if name.endswith("o_proj"):
            assert torch.equal(quant.dequantize(module.weight), rounded[f"{name}.weight"])
    if flag == "int4":  # activations as they are
        theirs = Stepper(load_plain(rounded, tmp_path, config)).logits(TOKENS)
        assert float((Stepper(model).logits(TOKENS) - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("flag", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_the_head_too_where_it_is_asked_for(flag: str, tied: bool, tmp_path: Path) -> None:
    """Its logits are those of the rounded matrix; the table of embeddings, which may be the same, is not rounded."""
    config = CONFIG | {"tie_word_embeddings": tied}
    tensors = floats(tmp_path, config)
    model = load_as(flag, tmp_path, config, head=True)
    table = tensors["model.embed_tokens.weight"]
    wanted = quant.quantize(table if tied else tensors["lm_head.weight"], ONLINE[flag])
    assert model.lm_head.weight.fmt == ONLINE[flag]
    assert torch.equal(quant.dequantize(model.lm_head.weight), quant.dequantize(wanted))
    assert torch.equal(model.get_submodule("model.embed_tokens").weight, table)
    rows = torch.randn(3, table.shape[1])
    assert torch.equal(model.head(rows), linear(rows, wanted))
    assert load_as(flag, tmp_path, config).lm_head.weight.fmt == "dense"
    held = sum(b.nbytes for n, b in model.named_buffers() if "rotary" not in n)
    assert count_weight_bytes(model) == held
    assert "LMHead" in {p.layer for p in packings(model)}


def test_ranks_quantise_their_rows_of_the_head(tmp_path: Path) -> None:
    """Of a vocabulary that two ranks cannot share evenly: the rows that fill the last part are zeros."""
    config = CONFIG | {"vocab_size": CONFIG["vocab_size"] - 1}
    floats(tmp_path, config)
    whole = quant.dequantize(load_as("int8", tmp_path, config, head=True).lm_head.weight)
    ranks = [load_as("int8", tmp_path, config, build_context(tp=Ranked(r, 2)), head=True) for r in range(2)]
    parts = torch.cat([quant.dequantize(m.lm_head.weight) for m in ranks])
    assert torch.equal(parts[: len(whole)], whole) and parts[len(whole) :].count_nonzero() == 0


def test_a_head_that_stays_dense_was_never_rounded(tmp_path: Path) -> None:
    tensors = floats(tmp_path, CONFIG)
    model = load_as("int4", tmp_path, CONFIG, table_context("dequantize"), head=True)
    assert torch.equal(model.lm_head.weight["weight"], tensors["lm_head.weight"])


def test_the_head_alone_is_refused() -> None:
    for flag, found in [(None, None), (None, read_quant_config(AWQ)), ("awq", read_quant_config(AWQ))]:
        with pytest.raises(ConfigError, match="quantize_lm_head goes with --quantization"):
            online_quant_config(flag, found, head=True)
    assert online_quant_config(None, None) is None


def test_stacked_experts_are_quantised_too(tmp_path: Path) -> None:
    folder = reference("gpt-oss", tmp_path).folder
    config = json.loads((folder / "config.json").read_text())
    model = load_as("int4", folder, config)
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    tensors = load_file(folder / "model.safetensors")
    up = tensors["model.layers.0.mlp.experts.gate_up_proj"][1].T
    wanted = torch.cat([up[0::2], up[1::2]])
    assert torch.equal(quant.dequantize(experts.w13)[1], quant.dequantize(quant.quantize(wanted, "int4.pack.g128")))
    assert model.get_submodule("model.layers.0.mlp.router").weight.fmt == "dense"


def test_ranks_quantise_their_own_slices(tmp_path: Path) -> None:
    config = CONFIG | {"intermediate_size": 384}  # three groups of columns
    floats(tmp_path, config)
    whole = load_as("int4", tmp_path, config)
    ranks = [load_as("int4", tmp_path, config, build_context(tp=Ranked(r, 2))) for r in range(2)]
    down = [m.get_submodule("model.layers.0.mlp.down_proj") for m in (whole, *ranks)]
    assert [m.local_in for m in down] == [384, 256, 128]
    matrices = [quant.dequantize(m.weight) for m in down]
    assert torch.equal(torch.cat(matrices[1:], dim=1), matrices[0])


def test_bytes_are_counted_as_they_will_be_held(tmp_path: Path) -> None:
    floats(tmp_path, MOE)
    model = load_as("int4", tmp_path, MOE)
    held = sum(b.nbytes for n, b in model.named_buffers() if "rotary" not in n)
    assert count_weight_bytes(model) == held
    assert held < 0.25 * count_weight_bytes(load(tmp_path))


def test_flags_that_change_nothing_and_flags_that_contradict() -> None:
    for flag, found in [("awq", AWQ), ("awq_marlin", AWQ), ("fp8", BLOCK)]:
        config = read_quant_config(found)
        assert online_quant_config(flag, config) is config
    w8a8 = read_quant_config(
        ct(
            {"num_bits": 8, "type": "int", "strategy": "channel"},
            {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True},
        )
    )
    assert online_quant_config("w8a8_int8", w8a8) is w8a8
    for flag, found in [("int4", AWQ), ("fp8", AWQ), ("gptq", AWQ)]:
        with pytest.raises(
            ConfigError, match=rf"quantization='{flag}', but the checkpoint is quantised already \(awq\)"
        ):
            online_quant_config(flag, read_quant_config(found))
    with pytest.raises(
        ConfigError, match=r"'bitsandbytes' is not made while loading .*fp8, w8a8_fp8, int8, w8a8_int8, int4"
    ):
        online_quant_config("bitsandbytes", None)


# Where no kernel takes a format


def takes_dense(ctx: Any) -> str | None:
    return None if ctx.site.fmt == "dense" else f"takes dense weights, not {ctx.site.fmt}"


def dense_linear(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    assert w.fmt == "dense"
    return linear(x, w, bias)


DENSE_KERNEL = Kernel(
    "gemm.linear", provider="acme", fn=f"{__name__}:dense_linear", device=("*",), supports=takes_dense
)


def table_context(
    policy: str = "auto", *, kernels: tuple[Kernel, ...] = (DENSE_KERNEL,), claims: Any = ()
) -> BuildContext:
    backend = CpuBackend()
    table = OpTable(
        backend.probe()[0],
        backend,
        ops=OPS,
        page_size=PAGE_SIZE,
        kernels=kernels,
        claims=Claims(tuple(claims)),
        quant_fallback=policy,
    )
    return replace(build_context(), table=table)


def plans(config: dict[str, Any], ctx: BuildContext) -> set[str]:
    model = create_model(config)
    bind_model(model, ctx)
    return {p.plan for p in packings(model)}


AWQ_CONFIG = CONFIG | {"quantization_config": AWQ}


def test_plans_follow_the_policy() -> None:
    assert plans(AWQ_CONFIG, table_context()) == {"dequantized"}  # its kernel takes dense weights
    assert plans(AWQ_CONFIG, table_context(kernels=())) == {
        "reference"
    }  # nothing is claimed, and nothing would be faster
    assert plans(AWQ_CONFIG, table_context("dequantize", kernels=())) == {"dequantized"}
    assert plans(AWQ_CONFIG, table_context("reference")) == {"reference"}
    with pytest.raises(KernelSelectionError, match=r"no kernel of 'cpu' takes int4.awq.g64; set --quant-fallback"):
        plans(AWQ_CONFIG, table_context("error"))
    every = replace(DENSE_KERNEL, supports=None)
    assert plans(AWQ_CONFIG, table_context("error", kernels=(every,))) == {"kernel"}


def test_a_claim_that_is_refused_stays_a_fallback() -> None:
    claims = [Claim(op="gemm.linear")]
    with pytest.raises(KernelSelectionError, match=r"claims it natively, but every kernel refuses"):
        plans(AWQ_CONFIG, table_context(claims=claims))


def test_what_cannot_run_at_all_is_dequantised() -> None:
    claims = [Claim(op="gemm.linear", formats=("int4.awq.g64",), support=Support.UNSUPPORTED)]
    assert plans(AWQ_CONFIG, table_context(kernels=(), claims=claims)) == {"dequantized"}


def test_what_is_quantised_for_its_size_is_not_dequantised_again() -> None:
    cfg = model_config(CONFIG).replace(quantization=online_quant_config("int4", None))
    for policy, plan in (("auto", "reference"), ("dequantize", "dequantized")):
        model = type(create_model(CONFIG))(cfg)
        bind_model(model, table_context(policy))
        assert {p.plan for p in packings(model)} == {plan}


@pytest.mark.parametrize("kind", ["awq", "gptq desc_act", "fp8 block", "fp8 static", "ct nvfp4"])
@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "experts"])
def test_dequantised_at_load_the_model_is_the_dequantised_one(kind: str, config: Any, tmp_path: Path) -> None:
    plain = write(tmp_path, kind, config=config)
    quantised = json.loads((tmp_path / "config.json").read_text())
    model = load_model(create_model(quantised), tmp_path, table_context("dequantize"), progress=False)
    assert {m.fmt.name for m in model.modules() if isinstance(m, Linear | Experts)} == {"dense"}
    ours, theirs = Stepper(model).logits(TOKENS), Stepper(load_plain(plain, tmp_path, config)).logits(TOKENS)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_parts_that_are_stored_unlike_are_dequantised_and_it_is_said(tmp_path: Path) -> None:
    plain = write(tmp_path, "awq")
    stored = load_file(tmp_path / "model.safetensors")
    at = "model.layers.0.self_attn.k_proj"
    mixed = {n: t for n, t in stored.items() if not n.startswith(at)} | {f"{at}.weight": plain[f"{at}.weight"]}
    save_file(mixed, tmp_path / "model.safetensors")
    config = CONFIG | {"quantization_config": AWQ | {"modules_to_not_convert": ["k_proj"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    by_layer = {p.layer: p for p in totals(packings(model))}
    assert by_layer["QKVLinear"].plan == "dequantized" and by_layer["RowLinear"].plan == "reference"
    theirs = Stepper(load_plain(plain, tmp_path)).logits(TOKENS)
    assert float((Stepper(model).logits(TOKENS) - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    with pytest.raises(KernelSelectionError, match=r"q_proj, .*k_proj, .*v_proj run as one and are stored unlike"):
        plans(config, table_context("error"))


def explained(settings: dict[str, Any]) -> dict[str, ExplainRow]:
    rows = explain(EngineConfig.from_flat(**settings))
    return {r.layer: r for r in rows if (r.op, r.fmt) == ("gemm.linear", "int4.pack.g128")}


def test_explain_tells_the_plan_and_its_bytes(tmp_path: Path) -> None:
    floats(tmp_path, CONFIG)
    common = {"model_path": str(tmp_path), "device": "cpu", "dtype": "bfloat16", "quantization": "int4"}
    rows = explained(common)
    assert rows.keys() == {"QKVLinear", "RowLinear", "GateUpLinear"}
    assert "int4.pack.g128 stays packed" in rows["RowLinear"].why and "in every step" in rows["RowLinear"].why
    rows = explained(common | {"quant_fallback": "dequantize"})
    row = rows["RowLinear"]
    assert row.dequantized and row.provider == "reference"
    held = 2 * 256 * 256 * 2 / 2**30  # two matrices of 256 x 256 in bfloat16
    assert f"int4.pack.g128 dequantised at load to bfloat16 (needs {held:.3g} GiB; packed it is" in row.why


def test_the_memory_table_and_the_log_tell_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    floats(tmp_path, CONFIG)
    config = EngineConfig.from_flat(
        model_path=str(tmp_path), device="cpu", dtype="float32", quantization="int4", max_total_tokens=64
    )
    rank = build_rank(config, 0, world_size=1, directory=None, progress=False)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(m.startswith("QKVLinear: int4.pack.g128 stays packed") for m in warned)
    note = fit_table(rank.resolved, rank.runtime, rank.model, LocalCommunicator()).weights_note
    assert note.startswith("int4.pack.g128 stays packed") and "\n" not in note  # every layer alike, in one line
    rank.runtime.close()
