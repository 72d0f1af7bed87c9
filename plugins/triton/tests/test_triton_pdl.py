"""Dependent launches: off unless asked for, refused where there are none, and of kernels that wait for their turn before they touch memory."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
from sglang_triton import aot, pdl, tuning
from sglang_triton.aot_spec import AotSpec

from sglang_core.errors import ConfigError

HARMLESS = ("arange", "program_id", "num_programs", "cdiv", "minimum", "to", "zeros", "constexpr", "fetch_ahead")


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "current_arch", lambda: "sm_90")
    tuning.choose.cache_clear()
    yield
    tuning.choose.cache_clear()


def test_nothing_is_launched_so_unless_it_is_asked_for(on_sm_90: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pdl.SWITCH, raising=False)
    assert "launch_pdl" not in tuning.choose("norm.rms", M=4096)
    monkeypatch.setenv(pdl.SWITCH, "1")
    tuning.choose.cache_clear()
    assert tuning.choose("norm.rms", M=4096)["launch_pdl"] is True
    assert "launch_pdl" not in tuning.in_force("norm.rms", {"M": 4096}), (
        "how a kernel is launched is no config of a file"
    )


@pytest.mark.parametrize("arch", ["sm_80", "gfx942", "interpreter"])
def test_a_device_without_such_launches_refuses_them(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pdl.taken(arch)
    monkeypatch.setenv(pdl.SWITCH, "1")
    with pytest.raises(ConfigError, match=f"SGLANG_TRITON_PDL=1.*{arch} has not: unset it"):
        pdl.taken(arch)


def test_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pdl.SWITCH, "yes")
    with pytest.raises(ConfigError, match="SGLANG_TRITON_PDL='yes' must be 0 or 1"):
        pdl.asked()


def of_triton() -> list[AotSpec]:
    """One of each kernel. Those in Gluon have no config, and are launched in the ordinary way."""
    return list({spec.kernel.fn: spec for spec in aot.specs() if "gluon" not in type(spec.kernel).__module__}.values())


@pytest.mark.parametrize("spec", of_triton(), ids=lambda spec: spec.kernel.fn.__qualname__)
def test_a_kernel_takes_its_turn_before_all_else(spec: AotSpec) -> None:
    """By its source: what stands before is arithmetic."""
    (kernel,) = ast.parse(textwrap.dedent(inspect.getsource(spec.kernel.fn))).body
    assert isinstance(kernel, ast.FunctionDef)
    for statement in kernel.body:
        called = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
        names = [f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called]
        if names == ["take_turn"]:
            return
        assert set(names) <= set(HARMLESS), f"{ast.unparse(statement)} stands before take_turn()"
    pytest.fail("it never takes its turn")


def test_what_is_touched_before_is_found() -> None:
    fetch, wait = "prefetch.global.L2 [%rd1];\n", "\tgriddepcontrol.wait; // %r1\n"
    load, copy = "\t@%p1 ld.global.v4.b32 {%r1}, [%rd1];\n", "\tcp.async.cg.shared.global [%r2], [%rd2], 16;\n"
    assert aot.hasty(f"ld.param.b64 %rd1, [a];\n{fetch}{wait}{load}{copy}") == []
    assert len(aot.hasty(f"{load}{copy}{wait}{load}")) == 2
    assert "no griddepcontrol.wait" in aot.hasty(load)[0]


@pytest.mark.parametrize("only", ["norm.add_rms[M=4096]", "gemm.linear[int4.awq.g128, T=16]", "attn.paged[decode]"])
def test_compiled_it_waits_first(only: str) -> None:
    """In a process of its own: the switch is read as kernels are imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sglang_triton.aot", "--arch", "sm_90", "--only", only]
    done = subprocess.run(command, env=environment | {pdl.SWITCH: "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and f"sm_90 {only}: " in done.stdout, done.stderr
