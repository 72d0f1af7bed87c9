from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sglang_xeon import backend, isa, library
from sglang_xeon.backend import XeonBackend, latent_limits
from sglang_xeon.runtime import XeonRuntime

from sglang_core.api import (
    Claims,
    ConfigError,
    DefaultsContext,
    DeviceInfo,
    KernelContext,
    OpSite,
    RuntimeContext,
    SelectionContext,
    Support,
)
from sglang_core.api.ops import OPS, AttnSpec, MLASpec


def info(level: str) -> DeviceInfo:
    return DeviceInfo(backend="xeon", path=f"xeon/{level}", name="test", facts={"isa": level, "isa_of_cpu": level})


def fake_cpu(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    monkeypatch.setattr(isa, "read_cpuinfo", lambda path="": f"model name\t: Fake\nflags\t: {flags}\n")
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")


def test_probe_finds_this_cpu() -> None:
    (found,) = XeonBackend().probe()
    host = isa.detect(isa.read_cpuinfo())
    assert found.path == f"xeon/{isa.active(host or '')}"
    assert 10 <= found.score <= 99
    assert found.total_memory > 0


def test_probe_loads_no_torch() -> None:
    code = "import sys; from sglang_xeon.backend import XeonBackend; XeonBackend().probe(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_probe_of_other_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.ENV, raising=False)
    fake_cpu(monkeypatch, "sse2 avx")
    assert XeonBackend().probe() == []
    assert "AVX2" in XeonBackend().absent_reason()
    amx = "avx2 fma bmi2 avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"
    fake_cpu(monkeypatch, amx)
    assert XeonBackend().probe()[0].path == "xeon/amx"
    monkeypatch.setenv(isa.ENV, "avx512")
    forced = XeonBackend().probe()[0]
    assert (forced.path, forced.facts["isa_of_cpu"]) == ("xeon/avx512", "amx")


def test_a_malformed_level_is_an_error_once_the_device_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.ENV, "sse9")
    (found,) = XeonBackend().probe()
    with pytest.raises(ConfigError, match="sse9"):
        XeonBackend().create_runtime(RuntimeContext(devices=(found,)))


@pytest.mark.parametrize("name", isa.LEVELS)
def test_every_kernel_is_claimed_and_exists(name: str) -> None:
    ctx = KernelContext(device=info(name))
    kernels, claims = XeonBackend().kernels(ctx), XeonBackend().claims(ctx)
    assert isinstance(claims, Claims)
    for kernel in kernels:
        assert kernel.op in OPS
        assert claims.support(kernel.op, fmt="dense", dtype="bfloat16") is Support.NATIVE
        module, _, function = kernel.fn.partition(":")
        __import__(module)
        assert callable(getattr(sys.modules[module], function))
    assert claims.support("gemm.linear", fmt="int4.awq.g128", dtype="float16") is Support.NATIVE
    assert claims.support("norm.rms", fmt="dense", dtype="float16") is Support.UNSUPPORTED


def test_defaults_name_known_settings() -> None:
    defaults = XeonBackend().config_defaults(DefaultsContext(device=info("avx2"), model={}))
    assert defaults["dtype"] == "bfloat16"


def test_runtime_computes_on_its_threads() -> None:
    (found,) = XeonBackend().probe()
    before = torch.get_num_threads()
    try:
        runtime = XeonRuntime(RuntimeContext(devices=(found,), num_threads=1))
        stream = runtime.stream()
        assert stream.submit(torch.get_num_threads).result() == 1
        assert stream.submit(lambda: torch.ones(3).sum().item()).result() == 3
        stream.close()
        runtime.close()
    finally:
        torch.set_num_threads(before)


def test_the_stream_is_tied_and_the_caller_is_not() -> None:
    import os

    before = os.sched_getaffinity(0)
    (found,) = XeonBackend().probe()
    runtime = XeonRuntime(RuntimeContext(devices=(found,)))
    stream = runtime.stream()
    assert stream.submit(lambda: os.sched_getaffinity(0)).result() == {runtime.cpus[0]}
    stream.close()
    assert os.sched_getaffinity(0) == before


def test_kernels_cannot_run_above_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "host", lambda: "avx2")
    with pytest.raises(ConfigError, match="more than this CPU has"):
        library.set_isa("avx512")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"window": 9, "soft_cap": 2.0, "has_sinks": True},
        {"causal": False, "cross": True},
        {"tree": True},
        *({"kv_dtype": name} for name in ("float32", "float16", "fp8_e4m3", "int8")),
    ],
)
def test_attention_takes_every_kind(facts: dict[str, object]) -> None:
    spec = AttnSpec(num_heads=4, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125, **facts)
    site = OpSite(op="attn.paged", layer="Attention", dtype="bfloat16", spec=spec)
    ops = {"attn.paged", "attn.plan", "kv.write"}
    mine = [k for k in XeonBackend().kernels(KernelContext(device=info("amx"))) if k.op in ops]
    assert {k.op for k in mine} == ops
    assert [k.supports(SelectionContext(device=info("amx"), site=site)) for k in mine] == [None] * len(mine)


@pytest.mark.parametrize(("rank", "reason"), [(512, None), (33, "takes latents of an even rank, not 33")])
def test_latents_have_an_even_rank(rank: int, reason: str | None) -> None:
    spec = MLASpec(num_heads=4, rank=rank, nope_dim=32, rope_dim=8, v_head_dim=32, scale=0.1)
    site = OpSite(op="attn.mla_paged", layer="LatentAttention", dtype="bfloat16", spec=spec)
    assert latent_limits(SelectionContext(device=info("amx"), site=site)) == reason
