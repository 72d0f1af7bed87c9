"""Steps over small pools, and what libraries of attention compute, for the tests of those that are used where they are installed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sglang_conformance.runner import Suite, Verdict
from sglang_cuda.backend import CudaBackend
from torch import Tensor

from sglang_core.api import DeviceInfo, DeviceRuntime, KernelContext, OpSite, Pool, PoolSpec, RuntimeContext
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, RopeSpec
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.backend.torch_runtime import TorchRuntime

CPU = torch.device("cpu")
OPS_OF_ATTENTION = ("attn.paged", "attn.plan", "attn.rope_paged", "kv.write")
REQUIRED = inspect.Parameter.empty


def signature(positional: str, **keywords: Any) -> inspect.Signature:
    """Names in order; `=` marks those that have a default. `keywords` may only be given by name."""
    kind = inspect.Parameter
    made = [
        kind(name.rstrip("="), kind.POSITIONAL_OR_KEYWORD, default=None if name.endswith("=") else REQUIRED)
        for name in positional.split()
    ]
    return inspect.Signature([*made, *(kind(name, kind.KEYWORD_ONLY, default=d) for name, d in keywords.items())])


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, soft_cap: float | None, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """q: [t, Hq, D], k, v: [s, Hk, D], of which the last query sees the last key -> o: [t, Hq, D], lse: [t, Hq], natural log."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if causal:
        seen = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1).T


def spec_of(**facts: Any) -> AttnSpec:
    return AttnSpec(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "v_head_dim": 64, "scale": 0.125} | facts))


def bound(spec: AttnSpec, *, arch: int = 90, page_size: int = 4, **more: Any) -> dict[str, BoundOp]:
    info = DeviceInfo(backend="cuda", path=f"cuda/sm_{arch}", name="test")
    table = OpTable(info, CudaBackend(), ops=OPS, page_size=page_size, **more)
    return table.bind_group([OpSite(op=op, layer="Attention", dtype="bfloat16", spec=spec) for op in OPS_OF_ATTENTION])


def step(
    spec: AttnSpec, reqs: list[tuple[int, int]], *, static: bool = False, padding: int = 0
) -> tuple[Pool, AttnBatch, list[Tensor]]:
    """reqs: (prefix, extend) each. Pages in random order; slots that nobody wrote hold NaN. `padding`: tokens and reqs that are none, in a bucket."""
    torch.manual_seed(0)
    lens, size = [prefix + extend for prefix, extend in reqs], 4
    pages = [-(-n // size) for n in lens]
    shape = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim}
    pool = Pool(PoolSpec(num_layers=2, page_size=size, dtype=torch.bfloat16, **shape), sum(pages) + 1, CPU)
    pool.poison(range(pool.num_pages))
    table, new = torch.zeros(len(reqs) + padding, 4, dtype=torch.int32), []
    for r, own in enumerate((torch.randperm(sum(pages)) + 1).int().split(pages)):
        slots = (own[:, None] * size + torch.arange(size, dtype=torch.int32)).flatten()[: lens[r]]
        table[r, : pages[r]] = own
        new.append(slots[reqs[r][0] :])
        pool.scatter(1, slots[: reqs[r][0]], *torch.randn(2, reqs[r][0], spec.num_kv_heads, spec.head_dim).bfloat16())
    none = torch.zeros(padding, dtype=torch.int32)
    cu = torch.tensor([0, *(extend for _, extend in reqs), *none]).cumsum(0).int()
    tokens = int(cu[-1]) + padding
    batch = AttnBatch(
        cu_extend_cpu=cu,
        prefix_lens_cpu=torch.cat([torch.tensor([prefix for prefix, _ in reqs]).int(), none]),
        seq_lens_cpu=torch.cat([torch.tensor(lens).int(), none]),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat([*new, none]),
        num_tokens=tokens,
        num_reqs=len(reqs) + padding,
        max_extend=max(extend for _, extend in reqs),
        num_pages=table.shape[1],
        page_size=size,
        static=static or padding > 0,
    )
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return pool, batch, [torch.randn(tokens, n, spec.head_dim).bfloat16() for n in heads]


def turned(
    ops: dict[str, BoundOp], spec: AttnSpec, reqs: list[tuple[int, int]]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """attn.rope_paged of a step: what the ops give, and what its body does; o and lse each."""
    pool, batch, new = step(spec, reqs)
    given, rope = [leaf.clone() for leaf in pool.leaves], RopeSpec(head_dim=spec.head_dim, rotary_dim=spec.head_dim)
    places = torch.cat([torch.arange(prefix, prefix + extend, dtype=torch.int32) for prefix, extend in reqs])
    args = *new, places, torch.randn(32, spec.head_dim), rope
    want = OPS["attn.rope_paged"].body(*args, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU), lse=True)
    pool.leaves = given
    return ops["attn.rope_paged"].fn(*args, pool, 1, spec, ops["attn.plan"].fn(spec, batch, CPU), lse=True), want


class HostCuda(CudaBackend):
    """The kernels of NVIDIA GPUs on host tensors."""

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        return TorchRuntime(ctx, "cpu")


def conformance(provider: str, op: str, *, arch: int) -> tuple[int, list[str]]:
    """The suite's cases of an op in bfloat16, with this provider's kernels alone: how many pass, and why those fail that it did not refuse."""
    backend, info = HostCuda(), DeviceInfo(backend="cuda", path=f"cuda/sm_{arch}", name="test", total_memory=1 << 36)
    kernels = [k for k in backend.kernels(KernelContext(device=info)) if k.provider == provider]
    suite = Suite(backend, info, kernels=kernels, full=False)
    results = [suite.judge(case, dtype) for case, dtype in suite.select([f"{op}["]) if dtype == torch.bfloat16]
    passed = sum(r.verdict is Verdict.PASS and r.provider == provider for r in results)
    failed = [f"{r.title}: {r.reason}" for r in results if r.verdict is Verdict.FAIL]
    return passed, [text for text in failed if "every kernel refuses" not in text]
