"""What is read out of a listing of machine code. The listings are written by hand, in the form of `nvdisasm -c`."""

from __future__ import annotations

import pytest
from sglang_triton.sass import parts_of, programs_per_processor

LISTING = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.U16 R2, desc[UR4][R4.64] ;
.L_x_1:
        /*0020*/                   IADD3 R5, R5, 0x1, RZ ;
.L_x_0:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64], P1 ;
        /*0040*/               @P1 LDG.E.128 R8, desc[UR4][R4.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R16, R12, R8, R16 ;
        /*0060*/                   MUFU.EX2 R6, R6 ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   STG.E.64 desc[UR4][R4.64], R2 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""


def test_loops_without_another_in_them_and_the_rest() -> None:
    loop, rest = parts_of(LISTING)
    assert [op.split(".")[0] for op in loop.opcodes] == ["LDGSTS", "LDG", "HMMA", "MUFU", "BRA"]
    assert loop.widths("LDG") == {16: 1} and loop.widths("LDGSTS") == {16: 1} and loop.moved == 32
    assert rest.widths("LDG") == {2: 1} and rest.widths("STG") == {8: 1}
    assert "NOP" not in rest.opcodes


def test_what_the_busiest_pipe_leaves() -> None:
    """One exponential of a warp takes 16 lanes two cycles; 16 x 8 x 16 multiply-adds are one cycle of 2,048."""
    loop, _ = parts_of(LISTING)
    assert loop.pipes == {"lsu": 2, "tensor": 1, "xu": 1}
    assert loop.cycles == {"issue": 1.25, "lsu": 2.0, "tensor": 1.0, "xu": 2.0}
    assert list(loop.limits) == ["512.0 bytes a cycle of 17", "50% of tensor cores"]


@pytest.mark.parametrize(
    "opcode, cycles", [("HGMMA.64x128x16.F32.BF16", 16.0), ("QGMMA.64x128x32.F32.E4M3.E4M3", 16.0)]
)
def test_products_of_four_warps_are_a_quarter_each(opcode: str, cycles: float) -> None:
    (rest,) = parts_of(f"        /*0000*/                   {opcode} R24, gdesc[UR8], R24 ;")
    assert rest.tensor_cycles == cycles


@pytest.mark.parametrize(
    "registers, shared, warps, programs", [(32, 0, 4, 16), (138, 71_680, 4, 3), (255, 0, 8, 1), (20, 0, 1, 32)]
)
def test_programs_that_fit(registers: int, shared: int, warps: int, programs: int) -> None:
    assert programs_per_processor(registers, shared, warps) == programs
