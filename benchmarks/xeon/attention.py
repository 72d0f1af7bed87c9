"""Xeon attention against the machine's limits, the reference bodies and torch's SDPA, in one process.

    python benchmarks/xeon/attention.py [--threads N] [--rounds N] [--only decode|shared|extend|latent|ragged] [--isa LEVEL]

`floor` is max(bytes / read bandwidth, FLOPs / rate of the products used) from limits measured in this run: VDPBF16PS where the level
has it, else float32 FMA. `predicted` was written down before the first measurement: the share of the floor that the design
should reach. Bytes are those of the keys and values that live in the pool, scales included. SDPA gets K and V contiguous
and already gathered, which no paged cache has; where the pool holds codes it has no counterpart.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import limits, medians
from sglang_xeon import attention, attention_plan, huge_pages, isa, library
from torch import Tensor

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, MLASpec, RaggedBatch

CPU = torch.device("cpu")
PAGE_SIZE = 16
KV = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
Reqs = list[tuple[int, int]]  # (prefix, extend) each


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    dim: int

    @property
    def spec(self) -> AttnSpec:
        return AttnSpec(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            v_head_dim=self.dim,
            scale=self.dim**-0.5,
        )


QWEN, LLAMA, WIDE = Shape("Qwen3-0.6B", 16, 8, 128), Shape("Llama-3.2-1B", 32, 8, 64), Shape("Qwen3-30B", 32, 4, 128)
# Of decode: memory bounds it, and prefetching keeps the stream going but for the ends of ranges; codes cost instructions to widen.
# Of extend: exponentials, packing and the ends of tiles take from the products.
DECODE = {"bf16": 0.80, "fp16": 0.50, "fp8": 0.65, "int8": 0.60}
EXTEND, RAGGED, LATENT = 0.55, 0.55, 0.60
# Of shared keys: as extend on their products, and what each req has of its own goes the way of decode.
SHARED = 0.50


def batch_of(reqs: Reqs, shared: int = 0) -> AttnBatch:
    """shared: of each req, leading keys that are the same pages."""
    lens = [p + e for p, e in reqs]
    columns = max(-(-n // PAGE_SIZE) for n in lens)
    extends = torch.tensor([e for _, e in reqs])
    tokens = int(extends.sum())
    page_table = (torch.randperm(len(reqs) * columns) + 1).int().view(len(reqs), columns)
    page_table[:, : shared // PAGE_SIZE] = page_table[0, : shared // PAGE_SIZE].clone()
    return AttnBatch(
        cu_extend_cpu=torch.cat([torch.zeros(1), extends.cumsum(0)]).int(),
        prefix_lens_cpu=torch.tensor([p for p, _ in reqs]).int(),
        seq_lens_cpu=torch.tensor(lens).int(),
        page_table_cpu=page_table,
        slot_mapping_cpu=torch.zeros(tokens, dtype=torch.int32),
        num_tokens=tokens,
        num_reqs=len(reqs),
        max_extend=int(extends.max()),
        num_pages=columns,
        page_size=PAGE_SIZE,
    )


def pool_of(batch: AttnBatch, heads: int, dims: tuple[int, int], dtype: torch.dtype, kind: str = "full") -> Pool:
    spec = PoolSpec(
        kind=kind,  # type: ignore[arg-type]
        num_layers=1,
        page_size=PAGE_SIZE,
        num_kv_heads=heads,
        head_dim=dims[0],
        v_head_dim=dims[1],
        dtype=dtype,
    )
    pool = Pool(spec, batch.page_table_cpu.numel() + 1, CPU)
    for leaf in pool.leaves:
        huge_pages.advise(leaf)  # as the runtime does
    slots = torch.arange(pool.num_pages * PAGE_SIZE, dtype=torch.int32)
    for some in slots.split(4096):
        pool.scatter(0, some, torch.randn(len(some), heads, dims[0]), torch.randn(len(some), heads, dims[1]))
    return pool


def pairs_of(reqs: Reqs) -> int:
    """Queries times the keys that each sees."""
    return sum(e * p + e * (e + 1) // 2 for p, e in reqs)


class Bench:
    def __init__(self, threads: int, rounds: int, level: str) -> None:
        self.rounds = rounds
        self.read, fma = limits(threads)
        dots = dot_rate(threads) if level in ("avx512_bf16", "amx") else 0.0
        self.fma, self.flops = fma, dots or fma
        print(
            f"read bandwidth {self.read / 1e9:.1f} GB/s, float32 FMA {fma / 1e9:.0f}, VDPBF16PS {dots / 1e9:.0f} GFLOP/s"
        )
        print(
            f"\n{'case':44} {'floor ms':>9} {'predicted':>10} {'ours ms':>9} {'of floor':>9} {'reference':>10} {'SDPA':>7}"
        )

    def row(
        self,
        name: str,
        nbytes: float,
        flops: float,
        share: float,
        rows: dict[str, Callable[[], object]],
        wide: bool = False,
    ) -> None:
        """`wide`: its products are in float32 whatever the level."""
        got = medians(rows, self.rounds)
        memory, compute = nbytes / self.read, flops / (self.fma if wide else self.flops)
        floor, ours = max(memory, compute), got["ours"]
        versus = [f"{got[x] / ours:.1f}x" if x in got else "-" for x in ("reference", "sdpa")]
        bound = "memory" if memory > compute else "compute"
        print(
            f"{name:44} {floor * 1e3:9.3f} {floor / share * 1e3:10.3f} {ours * 1e3:9.3f} {floor / ours:9.0%}"
            f" {versus[0]:>10} {versus[1]:>7}  {bound}"
        )

    def paged(self, shape: Shape, what: str, reqs: Reqs, kv: str, share: float, *, shared: int = 0) -> None:
        spec, batch = shape.spec, batch_of(reqs, shared)
        pool = pool_of(batch, shape.kv_heads, (shape.dim, shape.dim), KV[kv])
        q = torch.randn(batch.num_tokens, shape.heads, shape.dim).bfloat16()
        mine, theirs = attention_plan.plan(spec, batch, CPU), OPS["attn.plan"].body(spec, batch, CPU)
        rows: dict[str, Callable[[], object]] = {
            "ours": lambda: attention.paged(q, None, None, pool, 0, spec, mine),
            "reference": lambda: OPS["attn.paged"].body(q, None, None, pool, 0, spec, theirs),
        }
        if kv == "bf16" and len(set(reqs)) == 1 and not shared:
            rows["sdpa"] = sdpa_row(shape, reqs, q)
        nbytes = (sum(p + e - shared for p, e in reqs) + shared) * pool.spec.bytes_per_token
        flops = pairs_of(reqs) * shape.heads * shape.dim * 4
        self.row(f"{shape.name} {what}, {kv}", nbytes, flops, share, rows, wide=kv == "fp16")

    def latent(self, heads: int, what: str, reqs: Reqs, kv: str) -> None:
        spec = MLASpec(num_heads=heads, rank=512, nope_dim=128, rope_dim=64, v_head_dim=128, scale=192**-0.5)
        batch = batch_of(reqs)
        pool = pool_of(batch, 1, (512, 64), KV[kv], "mla")
        q = torch.randn(batch.num_tokens, heads, 512).bfloat16(), torch.randn(batch.num_tokens, heads, 64).bfloat16()
        mine, theirs = attention_plan.plan(spec, batch, CPU), OPS["attn.mla_plan"].body(spec, batch, CPU)
        rows: dict[str, Callable[[], object]] = {
            "ours": lambda: attention.mla_paged(*q, None, None, pool, 0, spec, mine),
            "reference": lambda: OPS["attn.mla_paged"].body(*q, None, None, pool, 0, spec, theirs),
        }
        nbytes = sum(p + e for p, e in reqs) * pool.spec.bytes_per_token
        flops = pairs_of(reqs) * heads * (576 + 512) * 2
        self.row(f"latents, {heads} heads, {what}, {kv}", nbytes, flops, LATENT, rows)

    def ragged(self, shape: Shape, length: int, causal: bool) -> None:
        spec = AttnSpec(
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            v_head_dim=shape.dim,
            scale=shape.dim**-0.5,
            causal=causal,
        )
        q = torch.randn(length, shape.heads, shape.dim).bfloat16()
        k, v = torch.randn(2, length, shape.kv_heads, shape.dim).bfloat16()
        args = (q, k, v, RaggedBatch.of([length], [length], q.device), spec)
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        rows: dict[str, Callable[[], object]] = {
            "ours": lambda: attention.ragged(*args),
            "reference": lambda: OPS["attn.ragged"].body(*args),
            "sdpa": lambda: F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True),
        }
        pairs = length * (length + 1) // 2 if causal else length * length
        name = f"{shape.name} ragged {length}, {'causal' if causal else 'all'}"
        self.row(name, 0, pairs * shape.heads * shape.dim * 4, RAGGED, rows)


def sdpa_row(shape: Shape, reqs: Reqs, q: Tensor) -> Callable[[], object]:
    """All reqs are alike. Causal from the last key where there is a prefix: a mask, made outside what is timed."""
    (prefix, extend), count = reqs[0], len(reqs)
    q = q.view(count, extend, shape.heads, shape.dim).transpose(1, 2)
    k, v = torch.randn(2, count, shape.kv_heads, prefix + extend, shape.dim).bfloat16()
    mask = None
    if prefix and extend > 1:
        mask = torch.ones(extend, prefix + extend, dtype=torch.bool).tril(prefix)
    causal = extend > 1 and mask is None
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def dot_rate(threads: int) -> float:
    """FLOP/s of VDPBF16PS, best of some runs: dot_rate.cpp, built here. 0 where this CPU has none."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "dot_rate.so"
        flags = ["-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
        subprocess.run(["g++", *flags, str(Path(__file__).with_name("dot_rate.cpp")), "-o", str(built)], check=True)
        call = ctypes.CDLL(str(built)).dot_rate
        call.restype = ctypes.c_double
        return float(call(threads, 15))


def run(bench: Bench, only: str | None) -> None:
    if only in (None, "decode"):
        for kv, share in DECODE.items():
            bench.paged(QWEN, "decode 8 x 8192", [(8191, 1)] * 8, kv, share)
        bench.paged(QWEN, "decode 1 x 8192", [(8191, 1)], "bf16", DECODE["bf16"])
        bench.paged(QWEN, "decode 32 x 512", [(511, 1)] * 32, "bf16", DECODE["bf16"])
        bench.paged(LLAMA, "decode 8 x 8192", [(8191, 1)] * 8, "bf16", DECODE["bf16"])
        bench.paged(WIDE, "decode 8 x 8192", [(8191, 1)] * 8, "bf16", DECODE["bf16"])
    if only in (None, "shared"):
        for shape in (QWEN, LLAMA, WIDE):
            bench.paged(shape, "decode 32 x (1024 shared + 40)", [(1063, 1)] * 32, "bf16", SHARED, shared=1024)
        bench.paged(QWEN, "decode 8 x (1024 shared + 40)", [(1063, 1)] * 8, "bf16", SHARED, shared=1024)
        bench.paged(QWEN, "decode 32 x (1024 shared + 40)", [(1063, 1)] * 32, "fp8", SHARED, shared=1024)
    if only in (None, "extend"):
        for shape in (QWEN, LLAMA):
            bench.paged(shape, "prefill 512", [(0, 512)], "bf16", EXTEND)
            bench.paged(shape, "chunk of 512 at 1536", [(1536, 512)], "bf16", EXTEND)
            bench.paged(shape, "prefill 1 x 2048", [(0, 2048)], "bf16", EXTEND)
        bench.paged(QWEN, "chunk of 512 at 1536", [(1536, 512)], "fp8", EXTEND)
    if only in (None, "latent"):
        for heads in (16, 128):
            bench.latent(heads, "decode 1 x 8192", [(8191, 1)], "bf16")
            bench.latent(heads, "decode 8 x 8192", [(8191, 1)] * 8, "bf16")
        bench.latent(16, "decode 8 x 8192", [(8191, 1)] * 8, "fp8")
        bench.latent(16, "extend 32 at 2048", [(2048, 32)], "bf16")
    if only in (None, "ragged"):
        for causal in (True, False):
            bench.ragged(QWEN, 1024, causal)
        bench.ragged(Shape("vision", 16, 16, 80), 1024, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=("decode", "shared", "extend", "latent", "ragged"))
    parser.add_argument("--isa", choices=isa.LEVELS, default=isa.active(isa.host() or "avx2"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    library.set_isa(args.isa)
    print(f"{isa.cpu_name(isa.read_cpuinfo())}, {args.isa}, {args.threads} threads; in this run:")
    with torch.inference_mode():
        run(Bench(args.threads, args.rounds, args.isa), args.only)


if __name__ == "__main__":
    main()
