from __future__ import annotations

import pytest
from sglang_xeon import isa

from sglang_core.api import ConfigError

AVX2 = "fpu sse4_2 avx avx2 fma bmi1 bmi2 f16c"
AVX512 = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl"
BF16 = f"{AVX512} avx512_vnni avx512_bf16"
AMX = f"{BF16} amx_bf16 amx_tile amx_int8"


def cpuinfo(flags: str, name: str = "Some CPU") -> str:
    block = f"processor\t: 0\nmodel name\t: {name}\nflags\t\t: {flags}\nbugs\t\t: avx512f\n\n"
    return block + block.replace("processor\t: 0", "processor\t: 1")


@pytest.mark.parametrize(
    "flags, expected",
    [
        (AVX2, "avx2"),
        (AVX512, "avx512"),
        (BF16, "avx512_bf16"),
        (AMX, "amx"),
        ("fpu sse4_2 avx", None),
        (AVX2.replace("fma ", ""), None),
        (AVX512.replace("avx512vl", ""), "avx2"),  # Xeon Phi: another AVX-512
        (f"{AVX2} amx_bf16 amx_tile", "avx2"),  # a hypervisor that hides what lies between
    ],
)
def test_level_needs_every_flag_up_to_it(flags: str, expected: str | None) -> None:
    assert isa.detect(cpuinfo(flags)) == expected


def test_flags_are_whole_words_of_the_flags_line() -> None:
    assert isa.detect(cpuinfo("fpu avx2_like fma bmi2")) is None


def test_other_machines_and_missing_files_have_no_level(tmp_path) -> None:
    assert isa.detect(cpuinfo(AMX), machine="aarch64") is None
    assert isa.detect(isa.read_cpuinfo(str(tmp_path / "none"))) is None


def test_name() -> None:
    assert isa.cpu_name(cpuinfo(AVX2, name="AMD EPYC 7763: 64-Core")) == "AMD EPYC 7763: 64-Core"
    assert isa.cpu_name("") == "x86-64 CPU"


def test_a_lower_level_can_be_forced() -> None:
    assert isa.capped("amx", None) == "amx"
    assert isa.capped("amx", "avx2") == "avx2"


def test_forcing_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"SGLANG_XEON_ISA='avx3' is not one of avx2, avx512, avx512_bf16, amx"):
        isa.capped("amx", "avx3")
    with pytest.raises(ConfigError, match=r"SGLANG_XEON_ISA='amx' is more than this CPU has \(avx2\)"):
        isa.capped("avx2", "amx")
