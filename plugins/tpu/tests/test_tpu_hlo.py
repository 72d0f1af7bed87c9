"""The counter of what a compiled program moves, on texts as XLA prints them, and on what a program is known to need."""

from __future__ import annotations

import pytest
from sglang_tpu.hlo import Module

POOL = """HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, entry_computation_layout={()->()}

%write (p0: bf16[100,8,128], p1: s32[4], p2: bf16[4,8,128]) -> bf16[100,8,128] {
  %p0 = bf16[100,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[4]{0:T(128)} parameter(1)
  %p2 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  ROOT %scatter.1 = bf16[100,8,128]{2,1,0:T(8,128)(2,1)} scatter(%p0, %p1, %p2), to_apply=%add
}

%look_up (p3: bf16[100,8,128], p4: s32[4]) -> bf16[4,8,128] {
  %p3 = bf16[100,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p4 = s32[4]{0:T(128)} parameter(1)
  ROOT %gather.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} gather(%p3, %p4), slice_sizes={1,8,128}
}

ENTRY %main (pool: bf16[100,8,128], at: s32[4], rows: bf16[4,8,128], w: bf16[256,128]) -> (bf16[100,8,128], bf16[4,8,128], f32[8,128]) {
  %pool = bf16[100,8,128]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="pool"}
  %at = s32[4]{0:T(128)} parameter(1)
  %rows = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %w = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(3)
  %written = bf16[100,8,128]{2,1,0:T(8,128)(2,1)} fusion(%pool, %at, %rows), kind=kCustom, calls=%write, metadata={op_name="a(b)"}
  %read = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} fusion(%written, %at), kind=kLoop, calls=%look_up
  %ahead = (bf16[256,128]{1,0:T(8,128)(2,1)S(1)}, bf16[256,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %there = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%ahead)
  %made = f32[8,128]{1,0:T(8,128)} custom-call(%there, %rows), custom_call_target="tpu_custom_call"
  ROOT %out = (bf16[100,8,128]{2,1,0:T(8,128)(2,1)}, bf16[4,8,128]{2,1,0:T(8,128)(2,1)}, f32[8,128]{1,0:T(8,128)}) tuple(%written, %read, %made)
}
"""
ROWS = 4 * 8 * 128 * 2
INDICES = 128 * 4  # four of them, in a tile


def test_each_buffer_counts_once_and_of_a_pool_only_what_is_touched() -> None:
    moved = Module(POOL).traffic()
    assert moved == {
        "written": INDICES + ROWS + ROWS,  # the rows read, and written
        "read": INDICES + ROWS + ROWS,
        "ahead": 256 * 128 * 2,  # read; what it is copied to is vector memory
        "made": ROWS + 8 * 128 * 4,
    }


def test_what_is_brought_for_the_next_run_counts_once() -> None:
    """By a copy at the end for the next run, or where there is none by the one at the beginning: other programs run between two runs."""
    ahead = next(line for line in POOL.splitlines() if "copy-start(%w)" in line)
    marked = ahead.replace("copy-start(%w)", "copy-start(%w), cross_program_prefetch_index=0")
    assert Module(POOL.replace(ahead, marked)).traffic() == Module(POOL).traffic()
    again = f"{marked}\n{ahead.replace('%ahead', '%again')}"
    found = Module(POOL.replace(ahead, again)).traffic()
    assert found.pop("again") == Module(POOL).traffic()["ahead"] and "ahead" not in found


def test_a_kernel_says_what_it_reads_of_its_operands() -> None:
    """On lines of its own. Of what is in vector memory nothing counts still."""
    said = 'frontend_attributes={kernel_metadata={\n"reads":"[9999, 1000]"\n}}, custom_call_target="tpu_custom_call"'
    text = POOL.replace('custom_call_target="tpu_custom_call"', said)
    assert Module(text).traffic()["made"] == 1000 + 8 * 128 * 4
    copied = said.partition(", custom_call_target")[0]  # inherited by a copy of its result, which reads all of that
    text = text.replace("  ROOT %out", f"  %again = f32[8,128]{{1,0:T(8,128)}} copy(%made), {copied}\n  ROOT %out")
    assert Module(text).traffic()["again"] == 2 * 8 * 128 * 4


def test_a_loop_counts_as_often_as_it_runs() -> None:
    text = """HloModule loop

%body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %b = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %n = s32[]{:T(128)S(6)} get-tuple-element(%b), index=0
  %y = f32[8,128]{1,0:T(8,128)} copy(%x)
  ROOT %t = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) tuple(%n, %y)
}

ENTRY %main (a: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %a = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[]{:T(128)S(6)}, f32[8,128]{1,0:T(8,128)}) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert Module(text).traffic() == {"w": 5 * 2 * 8 * 128 * 4}


def test_aliased_arguments_are_counted() -> None:
    assert Module(POOL).num_aliased() == 1
    assert Module(POOL.replace("may-alias", "none")).num_aliased() == 0


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("custom-call(%there, %rows)", "infeed(%there, %rows)"),
        ('custom_call_target="tpu_custom_call"', 'custom_call_target="xla_python_cpu_callback"'),
        ('custom_call_target="tpu_custom_call"', 'custom_call_target="MoveToHost"'),
        ("calls=%look_up", "calls=%look_up, is_host_transfer=true"),
        ("%made = f32[8,128]{1,0:T(8,128)}", "%made = f32[8,128]{1,0:T(8,128)S(5)}"),
    ],
    ids=["infeed", "callback", "move", "send", "memory"],
)
def test_transfers_to_the_host_are_found(there: str, instead: str) -> None:
    assert Module(POOL).host_transfers() == []
    assert there in POOL
    assert len(Module(POOL.replace(there, instead)).host_transfers()) == 1
