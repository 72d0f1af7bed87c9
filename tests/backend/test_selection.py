"""Which kernel runs where: order, ties, overrides, refusals, fallbacks, variants, composites, groups."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_core.backend.claims import Claim, Claims, Support
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import DeviceInfo
from sglang_core.backend.kernel import Kernel, OpSite
from sglang_core.backend.selection import DECOMPOSED, REFERENCE, BoundOp, OpTable, parse_overrides
from sglang_core.errors import ConfigError, KernelSelectionError, PluginError
from sglang_core.ops.registry import OpDef

DEVICE = DeviceInfo(backend="acme", path="acme/v2/big", name="fake")


class AcmeBackend(CpuBackend):
    name = "acme"


def rms(x, weight, eps):
    return "body"


def add_rms(x, residual, weight, eps, *, rms=rms):
    return rms(x, weight, eps), "sum"


def body(*args):
    return "body"


def rope_paged(*, norm=body, rope=body, paged=body):
    return norm(None, None, 0.0), rope(), paged()


def linear_gated(*, linear=body, act=body):
    return linear(), act()


OPS = {
    "norm.rms": OpDef(name="norm.rms", body=rms),
    "norm.add_rms": OpDef(name="norm.add_rms", body=add_rms, composite=True, parts={"rms": "norm.rms"}),
    "gemm.linear": OpDef(name="gemm.linear", body=body, weighted=True),
    "act.gated": OpDef(name="act.gated", body=body),
    "gemm.linear_gated": OpDef(
        name="gemm.linear_gated",
        body=linear_gated,
        composite=True,
        weighted=True,
        parts={"linear": "gemm.linear", "act": "act.gated"},
    ),
    "attn.paged": OpDef(name="attn.paged", body=body),
    "attn.plan": OpDef(name="attn.plan", body=body, host=True),
    "attn.mla_paged": OpDef(name="attn.mla_paged", body=body),
    "attn.mla_plan": OpDef(name="attn.mla_plan", body=body, host=True),
    "kv.write": OpDef(name="kv.write", body=body),
    "rope.apply": OpDef(name="rope.apply", body=body),
    "attn.rope_paged": OpDef(
        name="attn.rope_paged",
        body=rope_paged,
        composite=True,
        parts={"norm": "norm.rms", "rope": "rope.apply", "paged": "attn.paged"},
    ),
}
RMS = OpSite(op="norm.rms", layer="RMSNorm", dtype="bfloat16", dims={"M": 64})
GEMM = OpSite(op="gemm.linear", layer="QKVLinear", dtype="bfloat16", fmt="bf16")
GROUP = [OpSite(op=op, layer="Attention", dtype="bfloat16", spec=128) for op in ("attn.paged", "attn.plan", "kv.write")]


@pytest.fixture(autouse=True)
def kernels_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module whose every attribute is a kernel that returns its own name."""

    class Kernels(ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **kwargs: name

    monkeypatch.setitem(sys.modules, "fake_kernels", Kernels("fake_kernels"))


def kernel(name: str, op: str = "norm.rms", *, device="acme", provider: str = "", **kwargs) -> Kernel:
    return Kernel(op, provider or name, fn=f"fake_kernels:{name}", device=(device,), **kwargs)


def table(*kernels: Kernel, native: tuple[str, ...] = (), **kwargs) -> OpTable:
    kwargs.setdefault("claims", Claims.native(native))
    return OpTable(DEVICE, AcmeBackend(), ops=OPS, kernels=kernels, **kwargs)


def tokens(n: int) -> torch.Tensor:
    return torch.empty(n, 2)


# order


def test_the_longest_path_wins_over_priority() -> None:
    bound = table(kernel("wide", priority=99), kernel("narrow", device="acme/v2", priority=1)).bind(RMS)
    assert bound.fn() == "narrow"
    assert bound.provider == "narrow"
    assert "longest device path (2 segments)" in bound.reason
    assert bound.refused == (("wide (fake_kernels:wide)", "outranked by narrow"),)


def test_priority_decides_between_equal_paths() -> None:
    bound = table(kernel("a", priority=40), kernel("b", priority=60)).bind(RMS)
    assert (bound.fn(), bound.reason) == ("b", "highest priority (60)")


def test_a_path_matches_by_whole_segments_and_star_matches_all() -> None:
    bound = table(kernel("near", device="acme/v"), kernel("any", device="*")).bind(RMS)
    assert bound.fn() == "any"
    assert ("near (fake_kernels:near)", "made for acme/v; this is acme/v2/big") in bound.refused


def test_path_comes_before_priority_within_one_provider_too() -> None:
    bound = table(
        kernel("wide", provider="p", priority=99), kernel("narrow", provider="p", device="acme/v2", priority=1)
    ).bind(RMS)
    assert bound.fn() == "narrow"
    assert bound.refused == (("p (fake_kernels:wide)", "outranked by p (fake_kernels:narrow)"),)


def test_a_tie_names_both_and_the_way_out() -> None:
    with pytest.raises(KernelSelectionError, match=r"norm.rms: a \(.*:a\) and b \(.*:b\) .* --kernel norm.rms=a"):
        table(kernel("a"), kernel("b")).bind(RMS)


def test_one_providers_two_kernels_tie_as_well() -> None:
    with pytest.raises(KernelSelectionError, match=r"p \(fake_kernels:a\) and p \(fake_kernels:b\)"):
        table(kernel("a", provider="p"), kernel("b", provider="p")).bind(RMS)


def test_a_tie_below_the_winner_is_none() -> None:
    assert table(kernel("a"), kernel("b"), kernel("c", priority=51)).bind(RMS).fn() == "c"


def test_a_single_kernel_is_bound_as_it_is() -> None:
    fn = table(kernel("a")).bind(RMS).fn
    assert fn.__name__ == "<lambda>"  # the kernel itself, not a wrapper


PATHS = st.sampled_from(["acme", "acme/v2", "acme/v2/big", "acme/v3", "other", "*"])
CANDIDATES = st.lists(st.tuples(PATHS, st.integers(0, 3), st.booleans()), max_size=6)


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_the_answer_does_not_depend_on_registration_order(
    candidates: list[tuple[str, int, bool]], rng: random.Random
) -> None:
    kernels = [
        kernel(f"k{i}", device=path, priority=priority, supports=None if accepts else lambda ctx: "no")
        for i, (path, priority, accepts) in enumerate(candidates)
    ]
    shuffled = list(kernels)
    rng.shuffle(shuffled)
    outcomes = []
    for order in (kernels, shuffled):
        try:
            bound = OpTable(DEVICE, AcmeBackend(), ops=OPS, kernels=order, claims=Claims()).bind(RMS)
            outcomes.append((bound.provider, bound.reason, bound.refused))
        except KernelSelectionError as e:
            outcomes.append(str(e))
    assert outcomes[0] == outcomes[1]

    depth = {"acme": 1, "acme/v2": 2, "acme/v2/big": 3, "*": 0}
    ranks = sorted(((depth[p], prio), i) for i, (p, prio, ok) in enumerate(candidates) if ok and p in depth)
    if not ranks:
        assert outcomes[0][0] == REFERENCE
    elif len(ranks) > 1 and ranks[-1][0] == ranks[-2][0]:
        assert isinstance(outcomes[0], str)
    else:
        assert outcomes[0][0] == f"k{ranks[-1][1]}"


# supports


def test_supports_sees_the_facts_and_its_reason_is_kept() -> None:
    seen = []

    def needs_head_dim(ctx):
        seen.append((ctx.device.path, ctx.site.dims["M"], ctx.page_size, ctx.deterministic))
        return "M=64 is not a multiple of 128"

    bound = table(kernel("a", supports=needs_head_dim), page_size=16).bind(RMS)
    assert seen == [("acme/v2/big", 64, 16, False)]
    assert bound.refused == (("a (fake_kernels:a)", "M=64 is not a multiple of 128"),)
    assert bound.provider == REFERENCE


def test_supports_that_raises_is_named() -> None:
    with pytest.raises(PluginError, match=r"supports\(\) of kernel a \(.*:a\) raised at norm.rms in RMSNorm: KeyError"):
        table(kernel("a", supports=lambda ctx: ctx.site.dims["F"])).bind(RMS)


@pytest.mark.parametrize("answer", [True, False, "", 0])
def test_supports_answers_none_or_a_reason(answer: object) -> None:
    with pytest.raises(PluginError, match="must return None or a reason"):
        table(kernel("a", supports=lambda ctx: answer)).bind(RMS)


# overrides


def test_an_override_beats_rank() -> None:
    bound = table(kernel("a", priority=1), kernel("b"), overrides={"norm.rms": "a"}).bind(RMS)
    assert (bound.fn(), bound.reason) == ("a", "asked for with --kernel")


def test_an_override_breaks_a_tie() -> None:
    assert table(kernel("a"), kernel("b"), overrides={"norm.rms": "b"}).bind(RMS).fn() == "b"


def test_reference_forces_the_body_and_is_no_fallback() -> None:
    t = table(kernel("a", "gemm.linear"), native=("gemm.linear",), overrides={"gemm.linear": "reference"})
    assert t.bind(GEMM).fn() == "body"
    assert t.fallbacks == 0


def test_an_override_of_a_refused_kernel_gives_its_reason() -> None:
    with pytest.raises(KernelSelectionError, match=r"--kernel norm.rms=a is refused .*: a \(.*\): too wide") as refused:
        table(kernel("a", supports=lambda ctx: "too wide"), kernel("b"), overrides={"norm.rms": "a"}).bind(RMS)
    assert refused.value.why == f"at norm.rms in {RMS.layer} ({RMS.dtype}): too wide"


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"norm.rsm": "a"}, "no op 'norm.rsm'; did you mean 'norm.rms'"),
        ({"norm.rms": "z"}, "norm.rms is provided by a, reference"),
        ({"gemm.linear": "a"}, "gemm.linear is provided by reference"),
    ],
)
def test_an_unknown_override_lists_what_is_known(overrides: dict[str, str], match: str) -> None:
    with pytest.raises(KernelSelectionError, match=match):
        table(kernel("a"), overrides=overrides)


def test_override_flags_are_parsed() -> None:
    assert parse_overrides(["attn.paged=triton", "norm.rms=reference"]) == {
        "attn.paged": "triton",
        "norm.rms": "reference",
    }
    assert parse_overrides(["gemm.linear[int4.pack.g-1]=a"]) == {"gemm.linear[int4.pack.g-1]": "a"}
    for flags in (["attn.paged"], ["=x"], ["a="], ["a=b", "a=c"], ["a[]=b"], ["a[b=c"], ["[b]=c"]):
        with pytest.raises(ConfigError, match="--kernel"):
            parse_overrides(flags)


def test_an_override_may_name_the_format_of_the_weights() -> None:
    """Elsewhere it asks for nothing; before what names no format; refused as any other."""
    kernels = [
        kernel("a", "gemm.linear", supports=lambda ctx: None if ctx.site.fmt != "dense" else "not dense"),
        kernel("b", "gemm.linear", priority=60),
    ]
    dense, fp8 = (replace(GEMM, fmt=fmt) for fmt in ("dense", "fp8.block128"))
    chosen = table(*kernels, overrides={"gemm.linear[fp8.block128]": "a"})
    assert (chosen.bind(dense).fn(), chosen.bind(fp8).fn()) == ("b", "a")
    chosen.check_formats_asked()
    both = table(*kernels, overrides={"gemm.linear": "b", "gemm.linear[fp8.block128]": "a"})
    assert (both.bind(dense).fn(), both.bind(fp8).fn()) == ("b", "a")
    with pytest.raises(KernelSelectionError, match=r"--kernel gemm.linear\[dense\]=a is refused .*: not dense"):
        table(*kernels, overrides={"gemm.linear[dense]": "a"}).bind(dense)
    with pytest.raises(KernelSelectionError, match=r"gemm.linear=a is refused .*, --kernel gemm.linear\[FORMAT\]=a"):
        table(*kernels, overrides={"gemm.linear": "a"}).bind(dense)


def test_a_format_that_no_layer_has_is_refused() -> None:
    chosen = table(kernel("a", "gemm.linear"), overrides={"gemm.linear[fp9]": "a"})
    chosen.bind(GEMM)
    with pytest.raises(
        KernelSelectionError, match=r"gemm.linear\[fp9\]=a: no layer has weights in fp9 there; there is bf16"
    ):
        chosen.check_formats_asked()
    with pytest.raises(KernelSelectionError, match="norm.rms takes no weights"):
        table(kernel("a"), overrides={"norm.rms[dense]": "a"})


# reference and fallback


def test_what_is_not_claimed_runs_the_body_and_is_no_fallback() -> None:
    t = table(kernel("a", supports=lambda ctx: "no"))
    bound = t.bind(RMS)
    assert (bound.provider, bound.fn(0, 0, 0), bound.fallback, t.fallbacks) == (REFERENCE, "body", False, 0)


@pytest.mark.parametrize("op", ["gemm.linear", "attn.paged"])
def test_a_claim_refused_in_a_strict_family_is_an_error(op: str) -> None:
    t = table(kernel("a", op, supports=lambda ctx: "no"), native=(op,))
    with pytest.raises(KernelSelectionError, match=r"claims it natively, but .*: no; .*--fallback warn"):
        t.bind(OpSite(op=op, layer="L", dtype="bfloat16"))


def test_a_claim_refused_elsewhere_warns_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    t = table(kernel("a", supports=lambda ctx: "too odd"), native=("norm.rms",))
    for _ in range(3):
        assert t.bind(RMS).fn(0, 0, 0) == "body"
    assert t.fallbacks == 1
    assert len(caplog.records) == 1
    assert "too odd" in caplog.text
    assert t.explain()[0].fallback


@pytest.mark.parametrize(("policy", "raises", "logs"), [("error", True, 0), ("warn", False, 1), ("allow", False, 0)])
def test_the_policy_holds_for_every_family(policy: str, raises: bool, logs: int, caplog) -> None:
    for site in (RMS, GEMM):
        t = table(native=(site.op,), fallback=policy)
        caplog.clear()
        if raises:
            with pytest.raises(KernelSelectionError, match="no kernel for it is installed"):
                t.bind(site)
        else:
            t.bind(site)
            assert t.fallbacks == 1
        assert len(caplog.records) == logs


def test_claims_hold_for_their_format_and_dtype_only() -> None:
    claims = Claims((Claim(op="gemm.linear", formats=("fp8.block128",), dtypes=("bfloat16",)),))
    assert table(claims=claims).bind(GEMM).provider == REFERENCE


def test_what_is_unsupported_never_runs() -> None:
    claims = Claims((Claim(op="*", dtypes=("bfloat16",), support=Support.UNSUPPORTED),))
    for overrides in ({}, {"norm.rms": REFERENCE}):
        with pytest.raises(KernelSelectionError, match="cannot run it with this dtype"):
            table(kernel("a"), claims=claims, overrides=overrides).bind(RMS)


def test_the_cpu_backend_refuses_float16() -> None:
    backend = CpuBackend()
    t = OpTable(backend.probe()[0], backend, ops=OPS, kernels=())
    assert t.bind(RMS).provider == REFERENCE
    with pytest.raises(KernelSelectionError, match="set another --dtype"):
        t.bind(OpSite(op="norm.rms", layer="RMSNorm", dtype="float16"))


def test_a_site_with_an_unknown_op_is_an_error() -> None:
    with pytest.raises(KernelSelectionError, match="did you mean 'norm.rms'"):
        table().bind(OpSite(op="norm.rmss", layer="L", dtype="bfloat16"))


# malformed plugins


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (Kernel("norm.rsm", "p", fn="m:f", device=("acme",)), "did you mean 'norm.rms'"),
        (Kernel("norm.rms", "p", fn="m.f", device=("acme",)), "module:function"),
        (Kernel("norm.rms", "p", fn="m:f", device=()), "device"),
        (Kernel("norm.rms", "p", fn="m:f", device="acme"), "tuples of names"),
        (Kernel("norm.rms", "reference", fn="m:f", device=("acme",)), "may not be of provider"),
        (Kernel("gemm.linear", "p", fn="m:f", device=("acme",), packed_layout="x/1"), "has no pack"),
        (Kernel("norm.rms", "p", fn="m:f", device=("acme",), tokens=(8, 4)), r"tokens=\(8, 4\)"),
        (Kernel("norm.rms", "p", fn="m:f", device=("acme",), tokens=(0, 4)), r"tokens=\(0, 4\)"),
    ],
)
def test_a_malformed_kernel_is_refused_at_once(bad: Kernel, match: str) -> None:
    with pytest.raises(PluginError, match=match):
        table(bad)


def test_a_claim_of_an_unknown_op_is_refused() -> None:
    with pytest.raises(PluginError, match="claims an op that is none.*did you mean 'norm.rms'"):
        table(native=("norm.rsm",))


def test_a_kernel_is_imported_only_once_chosen() -> None:
    broken = Kernel("norm.rms", "broken", fn="not_there:f", device=("acme",), priority=1)
    assert table(kernel("a"), broken).bind(RMS).fn() == "a"
    with pytest.raises(PluginError, match=r"broken \(not_there:f\) was chosen for norm.rms.*ModuleNotFoundError"):
        table(broken).bind(RMS)


# variants by T


def test_variants_are_chosen_by_tokens() -> None:
    bound = table(kernel("small", provider="p", tokens=(1, 8)), kernel("big", provider="p", tokens=(9, None))).bind(RMS)
    assert [bound.fn(tokens(n)) for n in (0, 1, 8, 9, 100)] == ["small", "small", "small", "big", "big"]
    assert len(bound.kernels) == 2


def test_a_kernel_without_range_takes_what_variants_leave() -> None:
    bound = table(kernel("any", provider="p"), kernel("small", provider="p", tokens=(1, 8))).bind(RMS)
    assert [bound.fn(tokens(n)) for n in (8, 9)] == ["small", "any"]


def test_the_body_takes_what_variants_leave_which_counts_where_claimed() -> None:
    small = kernel("small", provider="p", tokens=(2, 8))
    t = table(small)
    assert [t.bind(RMS).fn(tokens(n), 0, 0) for n in (1, 2, 9)] == ["body", "small", "body"]
    assert "T=1" in t.bind(RMS).reason
    assert t.fallbacks == 0
    claimed = table(small, native=("norm.rms",))
    claimed.bind(RMS)
    assert claimed.fallbacks == 1


def test_packed_variants_must_take_every_t() -> None:
    pack = {"pack": "fake_kernels:pack", "unpack": "fake_kernels:unpack"}
    small = kernel("small", "gemm.linear", provider="p", tokens=(1, 8), **pack)
    bound = table(small).bind(GEMM)
    assert bound.provider == REFERENCE
    assert "no variant takes T=9" in bound.refused[0][1]
    bound = table(small, kernel("big", "gemm.linear", provider="p", tokens=(9, None), **pack)).bind(GEMM)
    assert (bound.pack(), bound.unpack()) == ("pack", "unpack")


def test_variants_share_one_pack() -> None:
    small = kernel("small", "gemm.linear", provider="p", tokens=(1, 8), pack="fake_kernels:pack")
    rest = kernel("rest", "gemm.linear", provider="p", pack="fake_kernels:pack", priority=40)
    other = kernel("other", "gemm.linear", provider="p", pack="fake_kernels:other", tokens=(9, None), priority=45)
    bound = table(small, rest, other).bind(GEMM)
    assert [bound.fn(tokens(n)) for n in (8, 9)] == ["small", "rest"]
    assert "variants share one pack" in dict(bound.refused)["p (fake_kernels:other)"]


def test_overlapping_variants_of_one_rank_tie() -> None:
    with pytest.raises(KernelSelectionError, match="match the device equally long"):
        table(kernel("a", provider="p", tokens=(1, 8)), kernel("b", provider="p", tokens=(8, None))).bind(RMS)


# --deterministic


def test_deterministic_asks_for_batch_invariant_and_a_single_variant() -> None:
    invariant = frozenset({"batch_invariant"})
    kernels = (
        kernel("fast"),
        kernel("small", provider="p", tokens=(1, 8), features=invariant, priority=90),
        kernel("slow", priority=1, features=invariant),
    )
    bound = table(*kernels, deterministic=True).bind(RMS)
    assert bound.fn() == "slow"
    reasons = dict(bound.refused)
    assert "batch_invariant" in reasons["fast (fake_kernels:fast)"]
    assert "variant by T" in reasons["p (fake_kernels:small)"]


# composites

ADD_RMS = OpSite(op="norm.add_rms", layer="RMSNorm", dtype="bfloat16")


def test_a_composite_without_kernel_keeps_the_kernels_of_its_parts() -> None:
    t = table(kernel("a"))
    bound = t.bind(ADD_RMS)
    assert bound.fn(1, 2, 3, 1e-6) == ("a", "sum")
    assert (bound.provider, bound.fallback, t.fallbacks) == (DECOMPOSED, False, 0)
    assert "made of norm.rms (a)" in bound.reason
    assert [row.op for row in t.explain()] == ["norm.rms", "norm.add_rms"]


def test_a_composite_of_bodies_is_simply_the_body() -> None:
    bound = table().bind(ADD_RMS)
    assert (bound.provider, bound.fn) == (REFERENCE, add_rms)


def test_a_composite_kernel_wins_over_its_parts() -> None:
    assert table(kernel("a"), kernel("fused", "norm.add_rms")).bind(ADD_RMS).fn() == "fused"


def test_reference_on_a_composite_forces_its_parts_too() -> None:
    bound = table(kernel("a"), overrides={"norm.add_rms": REFERENCE}).bind(ADD_RMS)
    assert bound.fn(1, 2, 3, 1e-6) == ("body", "sum")


# groups


def group(provider: str, *layouts: str, ops=("attn.paged", "attn.plan", "kv.write"), **kwargs) -> list[Kernel]:
    layouts = layouts or ("canonical",)
    return [
        kernel(f"{provider}_{op.replace('.', '_')}", op, provider=provider, kv_layouts=layouts, **kwargs) for op in ops
    ]


def providers(bound) -> dict[str, str]:
    return {op: b.provider for op, b in bound.items()}


def test_a_group_has_one_provider_and_one_layout() -> None:
    t = table(*group("nz", "acme.nz", priority=60), *group("plain"))
    assert set(providers(t.bind_group(GROUP)).values()) == {"nz"}
    assert t.pool_layout() == "acme.nz"
    assert t.pool_layout("window") == "canonical"


def test_a_group_takes_the_first_layout_that_all_kernels_read() -> None:
    kernels = [
        *group("p", "acme.nz", "acme.tiled", ops=("attn.paged",), priority=60),
        *group("p", "acme.tiled", "canonical", ops=("kv.write",)),
    ]
    t = table(*kernels)
    assert providers(t.bind_group(GROUP)) == {"attn.paged": "p", "attn.plan": REFERENCE, "kv.write": "p"}
    assert t.pool_layout() == "acme.tiled"


def test_a_provider_without_common_layout_is_refused() -> None:
    t = table(*group("p", "acme.nz", ops=("attn.paged",)), *group("p", ops=("kv.write",)))
    bound = t.bind_group(GROUP)
    assert providers(bound)["attn.paged"] == REFERENCE
    assert "reads pool layouts" in str([b.refused for b in bound.values()])


def test_a_pools_layout_is_settled_by_its_first_group() -> None:
    only_full = {"supports": lambda ctx: None if ctx.site.spec == 128 else "128 only"}
    t = table(*group("nz", "acme.nz", priority=60, **only_full), *group("plain"))
    t.bind_group(GROUP)
    other = [OpSite(op=s.op, layer=s.layer, dtype=s.dtype, spec=64) for s in GROUP]
    bound = t.bind_group(other)
    assert providers(bound)["attn.paged"] == REFERENCE
    assert "the pool's is acme.nz" in bound["attn.paged"].refused[1][1]
    assert set(providers(t.bind_group(other, pool="window")).values()) == {"plain"}


def test_a_layout_that_is_set_is_kept() -> None:
    t = table(*group("nz", "acme.nz", priority=60), *group("plain"), kv_layout="canonical")
    assert set(providers(t.bind_group(GROUP)).values()) == {"plain"}


def test_one_refusal_refuses_the_provider_for_the_group() -> None:
    t = table(
        *group("a", ops=("attn.paged", "kv.write"), priority=60),
        kernel("a_plan", "attn.plan", provider="a", supports=lambda ctx: "no plan"),
        *group("b"),
    )
    assert set(providers(t.bind_group(GROUP)).values()) == {"b"}


@pytest.mark.parametrize("ops", [("attn.paged", "attn.plan"), ("attn.mla_paged", "attn.mla_plan")])
def test_a_plan_without_its_attention_is_refused(ops: tuple[str, str]) -> None:
    sites = [OpSite(op=op, layer="Attention", dtype="bfloat16", spec=128) for op in ops]
    bound = table(*group("p", ops=ops[1:])).bind_group(sites)
    assert set(providers(bound).values()) == {REFERENCE}
    assert "private" in bound[ops[1]].refused[0][1]


def test_a_kv_write_kernel_alone_serves_beside_the_bodies() -> None:
    assert providers(table(*group("p", ops=("kv.write",))).bind_group(GROUP))["kv.write"] == "p"


def test_an_override_holds_for_the_whole_group() -> None:
    kernels = [*group("a", priority=60), *group("b")]
    assert set(providers(table(*kernels, overrides={"attn.paged": "b"}).bind_group(GROUP)).values()) == {"b"}
    assert set(providers(table(*kernels, overrides={"kv.write": REFERENCE}).bind_group(GROUP)).values()) == {REFERENCE}
    with pytest.raises(KernelSelectionError, match="are selected together; name one provider"):
        table(*kernels, overrides={"attn.paged": "a", "kv.write": "b"}).bind_group(GROUP)


def test_group_ties_and_claims_behave_as_elsewhere() -> None:
    with pytest.raises(KernelSelectionError, match=r"a \(.*\) and b \(.*\) match the device equally long"):
        table(*group("a"), *group("b")).bind_group(GROUP)
    with pytest.raises(KernelSelectionError, match="claims it natively, but every kernel refuses"):
        table(*group("a", supports=lambda ctx: "no"), native=("attn.paged",)).bind_group(GROUP)


# composites of a group

ROPE = OpSite(op="rope.apply", layer="Rope", dtype="bfloat16", spec="neox")
WHOLE = OpSite(op="attn.rope_paged", layer="Attention", dtype="bfloat16", spec=128, parts=(ROPE, GROUP[0]))
ROPE_GROUP = [*GROUP[:2], WHOLE]
PAIR = ("attn.paged", "attn.plan")


def roped(*kernels: Kernel, **kwargs) -> BoundOp:
    return table(*kernels, **kwargs).bind_group(ROPE_GROUP)["attn.rope_paged"]


def test_a_composite_of_a_group_is_made_of_the_kernels_beside_it() -> None:
    """Of the provider that was chosen for the group, and of what runs at the other parts' own sites."""
    only_neox = kernel("turn", "rope.apply", supports=lambda ctx: None if ctx.site.spec == "neox" else "neox only")
    bound = roped(*group("a", ops=PAIR, priority=60), *group("b", ops=PAIR), only_neox, kernel("rms"))
    assert bound.fn() == ("body", "turn", "a_attn_paged")  # norm.rms is not called here, so no kernel stands for it
    assert (bound.provider, bound.fallback) == (DECOMPOSED, False)
    assert "made of rope.apply (turn), attn.paged (a)" in bound.reason


def test_a_composite_is_never_another_providers_than_the_plan_it_reads() -> None:
    whole = kernel("whole", "attn.rope_paged", provider="b", priority=99)
    bound = roped(*group("a", ops=PAIR, priority=60), *group("b", ops=PAIR), whole)
    assert bound.fn() == ("body", "body", "a_attn_paged")
    assert ("b (fake_kernels:whole)", "outranked by a") in bound.refused
    assert roped(*group("a", ops=PAIR), *group("b", ops=PAIR, priority=60), whole).fn() == "whole"


def test_a_refused_composite_leaves_its_provider_the_group() -> None:
    whole = kernel("whole", "attn.rope_paged", provider="a", supports=lambda ctx: "no such rotation")
    bound = roped(*group("a", ops=PAIR), whole, native=PAIR)
    assert bound.fn() == ("body", "body", "a_attn_paged")
    assert bound.refused == (("a (fake_kernels:whole)", "no such rotation"),)


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ({"attn.rope_paged": DECOMPOSED}, ("body", "turn", "a_attn_paged")),
        ({"rope.apply": REFERENCE}, ("body", "body", "a_attn_paged")),
        ({"attn.paged": REFERENCE}, ("body", "turn", "body")),
        ({"attn.rope_paged": REFERENCE}, ("body", "body", "body")),
        ({"attn.rope_paged": "a", "rope.apply": REFERENCE}, "whole"),
    ],
)
def test_a_composites_kernel_gives_way_to_what_was_asked_for_its_parts(flags: dict[str, str], made: object) -> None:
    whole = kernel("whole", "attn.rope_paged", provider="a")
    kernels = [*group("a", ops=PAIR), whole, kernel("turn", "rope.apply", provider="a")]
    assert roped(*kernels).fn() == "whole"
    assert roped(*kernels, overrides=flags).fn() == made


def test_a_composite_that_is_taken_apart_packs_weights_as_the_part_that_multiplies_by_them() -> None:
    packing = {"pack": "fake_kernels:packed", "unpack": "fake_kernels:unpacked", "packed_layout": "a/1"}
    product, act = kernel("a", "gemm.linear", **packing), kernel("a", "act.gated")
    site = OpSite(op="gemm.linear_gated", layer="GateUpLinear", dtype="bfloat16", fmt="int8")
    assert (bound := table(product, act).bind(site)).pack is not None and bound.unpack is not None
    assert (bound.pack(), bound.unpack(), bound.provider) == ("packed", "unpacked", DECOMPOSED)
    assert table(act).bind(site).pack is None


def test_whether_a_kernel_takes_weights_as_they_are_packed_for_another_op() -> None:
    packing = {"pack": "fake_kernels:packed", "unpack": "fake_kernels:unpacked", "packed_layout": "a/1"}
    site = OpSite(op="gemm.linear_gated", layer="GateUpLinear", dtype="bfloat16", fmt="bf16")
    whole = kernel("whole", "gemm.linear_gated", provider="a", **packing)
    t = table(kernel("a", "gemm.linear", **packing), whole)
    assert t.has_kernel(site) and t.has_kernel(site, packed_as=t.bind(GEMM))
    other = table(kernel("a", "gemm.linear", **(packing | {"packed_layout": "a/2"})), whole)
    assert not other.has_kernel(site, packed_as=other.bind(GEMM))
    body_of_gemm = table(whole)
    assert not body_of_gemm.has_kernel(site, packed_as=body_of_gemm.bind(GEMM))


def test_only_a_composite_can_be_decomposed() -> None:
    with pytest.raises(KernelSelectionError, match="norm.rms is provided by a, reference"):
        table(kernel("a"), overrides={"norm.rms": DECOMPOSED})


def test_what_watches_ops_sees_the_parts_of_a_composite_and_each_once() -> None:
    seen: list[str] = []

    def watch(bound: BoundOp) -> BoundOp:
        def called(*args):
            seen.append(bound.site.op)
            return bound.fn(*args)

        return replace(bound, fn=called)

    roped(*group("a", ops=PAIR), instrument=watch).fn()
    assert seen == ["attn.rope_paged", "rope.apply", "attn.paged"]
    seen.clear()
    roped(instrument=watch).fn()  # of bodies alone, too: a profile says which of them takes the time
    assert seen == ["attn.rope_paged", "rope.apply", "attn.paged"]


def test_explain_has_a_row_for_each_op_and_layer_class() -> None:
    t = table(kernel("a"), kernel("far", device="other"))
    for _ in range(4):
        t.bind(RMS)
    t.bind(GEMM)
    rows = t.explain()
    assert [(r.op, r.layer, r.fmt, r.dtype, r.provider) for r in rows] == [
        ("norm.rms", "RMSNorm", "*", "bfloat16", "a"),
        ("gemm.linear", "QKVLinear", "bf16", "bfloat16", REFERENCE),
    ]
    assert rows[0].refused == (("far (fake_kernels:far)", "made for other; this is acme/v2/big"),)
