"""The suite kills every kernel with a mistake in it, and lets honest ones live."""

from __future__ import annotations

import pytest
import torch
from sglang_conformance.runner import Result, Suite, Verdict

from sglang_core.backend.claims import Claim, Claims
from sglang_core.backend.interface import DeviceInfo, KernelContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.torch_backend import TorchBackend

PROFILES = ("window", "soft_cap", "sinks", "tree", "cross", "kv_half", "kv_fp8", "kv_int8", "odd_sizes", "buckets")
MUTANTS = {
    "window_off_by_one": "attn.paged",
    "forgets_soft_cap": "attn.paged",
    "forgets_sinks": "attn.paged",
    "lse_in_base_2": "attn.paged",
    "one_page_too_far": "attn.paged",
    "softmax_without_max": "attn.paged",
    "sees_one_key_of_the_future": "attn.paged",
    "kv_heads_dealt_out": "attn.paged",
    "multiplies_slots_in_32_bits": "attn.paged",
    "weights_in_bf16": "attn.paged",
    "reads_stale_values": "attn.paged",
    "sees_every_branch": "attn.paged",
    "window_by_place_in_a_tree": "attn.paged",
    "forgets_scales_of_keys": "attn.paged",
    "plans_without_the_last_req": "attn.plan",
    "writes_one_slot_late": "kv.write",
    "writes_layer_zero": "kv.write",
    "merge_without_guard": "attn.merge",
    "merge_in_base_2": "attn.merge",
    "ragged_aligned_at_the_start": "attn.ragged",
    "accumulates_in_bf16": "gemm.linear",
    "forgets_bias": "gemm.linear",
    "weights_with_the_bias": "moe.route",
    "forgets_groups": "moe.route",
    "scores_groups_by_their_best": "moe.route",
    "forgets_to_renormalize": "moe.route",
    "scales_before_renormalizing": "moe.route",
    "softmax_before_top_k": "moe.route",
    "masks_groups_with_zero": "moe.route",
    "takes_the_highest_id_of_equals": "moe.route",
    "groups_one_row_late": "gemm.grouped",
    "grouped_forgets_bias": "gemm.grouped",
    "gives_rows_of_no_group_to_the_last": "gemm.grouped",
    "weights_in_half": "moe.fused",
    "sums_experts_in_the_dtype": "moe.fused",
    "ignores_the_map": "moe.fused",
    "remote_is_expert_zero": "moe.fused",
    "weight_on_the_other_side": "moe.fused",
    "up_then_gate": "moe.fused",
    "forgets_the_second_bias": "moe.fused",
    "forgets_alpha": "moe.fused",
    "forgets_the_limit": "moe.fused",
    "delta_without_decay": "ssm.gated_delta_rule",
    "delta_decays_after_reading": "ssm.gated_delta_rule",
    "delta_deals_key_heads_out": "ssm.gated_delta_rule",
    "delta_forgets_the_scale": "ssm.gated_delta_rule",
    "delta_keeps_lengths": "ssm.gated_delta_rule",
    "delta_reads_scratch": "ssm.gated_delta_rule",
    "delta_forgets_states": "ssm.gated_delta_rule",
    "delta_writes_where_it_read": "ssm.gated_delta_rule",
    "delta_state_in_half": "ssm.gated_delta_rule",
    "delta_overflows": "ssm.gated_delta_rule",
    "conv_backwards": "ssm.causal_conv1d",
    "conv_without_activation": "ssm.causal_conv1d",
    "conv_forgets_bias": "ssm.causal_conv1d",
    "conv_forgets_states": "ssm.causal_conv1d",
    "conv_keeps_newest_first": "ssm.causal_conv1d",
    "state_plan_without_the_last_req": "ssm.plan",
    "adapters_of_their_neighbour": "lora.apply",
    "adapter_without_scale": "lora.apply",
    "adapter_of_those_without": "lora.apply",
    "scale_of_the_first_part": "lora.apply",
    "embeds_from_the_first_row": "lora.embed",
    "expert_adapters_of_gate_only": "lora.experts",
    "rms_without_eps": "norm.rms",
    "rms_in_the_dtype": "norm.rms",
    "add_rms_keeps_the_old_residual": "norm.add_rms",
    "layer_norm_of_a_sample": "norm.layer",
    "rotates_the_other_style": "rope.apply",
    "rotates_one_position_late": "rope.apply",
    "gates_with_up": "act.gated",
    "gelu_is_tanh": "act.gated",
    "answers_in_its_workspace": "act.gated",
    "changes_from_call_to_call": "act.gated",
    "looks_up_what_it_does_not_own": "embed.lookup",
    "mask_from_the_top_bit": "logits.mask",
    "penalty_always_divides": "logits.adjust",
    "top_p_off_by_one": "sample.sample",
    "top_k_off_by_one": "sample.sample",
    "forgets_min_p": "sample.sample",
    "takes_the_first_rows_temperature": "sample.sample",
    "draws_without_the_position": "sample.sample",
    "logprobs_after_temperature": "sample.sample",
    "takes_the_highest_of_equals": "sample.sample",
}
USERS = {"attn.plan": "attn.paged", "ssm.plan": "ssm.gated_delta_rule"}
INFO = DeviceInfo(backend="mutant", path="mutant", name="one mistake")


class MutantBackend(TorchBackend):
    name = "mutant"

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def probe(self) -> list[DeviceInfo]:
        return [INFO]

    def claims(self, ctx: KernelContext) -> Claims:
        return self._claims


def kernel(op: str, function: str, **facts: object) -> Kernel:
    return Kernel(op, provider="mutant", fn=f"tests.conformance.mutants:{function}", device=("mutant",), **facts)  # type: ignore[arg-type]


def suite(*kernels: Kernel, claims: Claims | None = None, full: bool = False) -> Suite:
    claims = claims or Claims.native([k.op for k in kernels], dtypes=("float32", "bfloat16"), profiles=PROFILES)
    return Suite(MutantBackend(claims), INFO, num_threads=1, kernels=kernels, full=full)


ONE_CASE = {"multiplies_slots_in_32_bits": "attn.paged[slots past"}  # others cannot tell, and take their time


def cases_of(op: str) -> str:
    """A plan is tried through the op that it is made for."""
    return f"{USERS.get(op, op)}["


@pytest.mark.parametrize("function", MUTANTS)
def test_a_mistake_fails(function: str, kill_table: list[tuple[str, str, str]]) -> None:
    op = MUTANTS[function]
    user = [kernel(USERS[op], f"body_of_{USERS[op].replace('.', '_')}")] if op in USERS else []  # of the same provider
    mine = suite(kernel(op, function), *user, full=function in ONE_CASE)
    work = mine.select([ONE_CASE.get(function, cases_of(op))])
    work.sort(key=lambda item: item[1] is torch.float16)  # where a square overflows; the others see nearly all
    results = (mine.judge(case, dtype) for case, dtype in work)
    killer = next((r for r in results if r.verdict is Verdict.FAIL), None)
    assert killer is not None, f"{function} lives"
    assert "Error:" not in killer.reason, f"{function} fails by raising: {killer.reason}"
    assert "refuses" not in killer.reason, f"{function} does not run: {killer.reason}"
    kill_table.append((function, killer.title, killer.reason))


def test_honest_attention_passes() -> None:
    mine = suite(kernel("attn.paged", "naive_paged"))
    work = [(case, dtype) for case, dtype in mine.select(["attn.paged["]) if dtype is not torch.float16]
    results = [mine.judge(case, dtype) for case, dtype in work]
    wrong = [(r.title, r.reason) for r in results if r.verdict is Verdict.FAIL]
    assert not wrong
    assert {r.provider for r in results} == {"mutant"}


def verdicts(results: list[Result], dtype: str = "float32") -> set[Verdict]:
    return {r.verdict for r in results if r.dtype == dtype}


def test_what_nothing_claims_is_reference() -> None:
    results = list(suite(claims=Claims()).run(["logits.mask["]))
    assert verdicts(results) == {Verdict.REFERENCE}


def test_an_unclaimed_kernel_that_works_is_reported() -> None:
    results = list(suite(kernel("attn.merge", "body_of_merge"), claims=Claims()).run(["attn.merge["]))
    assert verdicts(results) == {Verdict.NOT_CLAIMED}


def test_an_unclaimed_kernel_that_is_wrong_fails() -> None:
    results = list(suite(kernel("attn.merge", "merge_in_base_2"), claims=Claims()).run(["attn.merge["]))
    assert verdicts(results) == {Verdict.FAIL}


def test_a_claim_without_a_kernel_fails() -> None:
    results = list(suite(claims=Claims.native(["norm.layer"], profiles=PROFILES)).run(["norm.layer["]))
    assert verdicts(results) == {Verdict.FAIL}
    assert "claims it natively" in results[0].reason


def test_a_refusal_fails_in_core_and_in_profiles_that_are_stated_only() -> None:
    def no_windows(ctx: object) -> str | None:
        return "no windows" if ctx.site.spec.window else None  # type: ignore[attr-defined]

    honest = kernel("attn.paged", "naive_paged", supports=no_windows)
    for profiles, expected in (((), Verdict.NOT_CLAIMED), (("window",), Verdict.FAIL)):
        claims = Claims.native(["attn.paged"], profiles=profiles)
        results = list(suite(honest, claims=claims).run(["attn.paged[window 16"]))
        assert verdicts(results) == {expected}

    def nothing(ctx: object) -> str:
        return "not today"

    refuses = kernel("attn.paged", "naive_paged", supports=nothing)
    assert verdicts(list(suite(refuses).run(["attn.paged[decode"]))) == {Verdict.FAIL}


def test_unsupported_is_not_run() -> None:
    from sglang_core.backend.claims import Support

    claims = Claims((Claim(op="norm.layer", dtypes=("float32",), support=Support.UNSUPPORTED),))
    assert verdicts(list(suite(claims=claims).run(["norm.layer["]))) == {Verdict.NOT_CLAIMED}


def test_a_kernel_that_raises_fails_with_its_words() -> None:
    results = list(suite(kernel("norm.layer", "gates_with_up")).run(["norm.layer[bias"]))
    assert verdicts(results) == {Verdict.FAIL}
    assert "TypeError" in results[0].reason


def test_claims_without_a_case_are_listed() -> None:
    assert suite(claims=Claims.native(["attn.paged", "attn.plan", "norm.layer"])).untested_claims() == []
    assert suite(claims=Claims((Claim(op="*"),))).untested_claims() == []
    assert suite(claims=Claims.native(["acme.untested"])).untested_claims() == ["acme.untested"]
