"""Xeon kernels against the machine's limits and against torch, in one process.

    python benchmarks/xeon/kernels.py [--threads N] [--rounds N] [--only gemm|attention]

Every row is timed in turn within each round and medians are compared, so a noisy neighbour hits all alike; trust ratios, not
milliseconds. Weights go round a ring larger than the last-level cache, as a model's layers do. `limit` is the floor from this
run's read bandwidth and FMA peak: bytes / bandwidth or FLOPs / peak, the larger; `of limit` is floor / measured.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sglang_xeon import attention, attention_plan, gemm, isa

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, PackedWeight

SHAPES = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}  # Qwen3-0.6B, (N, K)
HEAD = {"head": (151936, 1024)}
BATCHES = (1, 8, 32, 512, 2048)
RING_BYTES = 256 << 20
Timed = dict[str, Callable[[], object]]


def medians(rows: Timed, rounds: int) -> dict[str, float]:
    """Seconds a call, every row once a round."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for fn in rows.values():
        fn()
    for _ in range(rounds):
        for name, fn in rows.items():
            start = time.perf_counter()
            fn()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def ring(fn: Callable[[object], object], items: list) -> Callable[[], object]:
    state = [0]

    def call() -> object:
        state[0] += 1
        return fn(items[state[0] % len(items)])

    return call


def limits(threads: int) -> tuple[float, float]:
    """Bytes/s read and FLOP/s of float32 FMA on this machine, best of some runs: limits.cpp, built here."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "limits.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-fPIC", "-shared", "-pthread"]
        subprocess.run(["g++", *flags, str(Path(__file__).with_name("limits.cpp")), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
        library.read_bandwidth.restype = library.fma_rate.restype = ctypes.c_double
        return library.read_bandwidth(threads, 15), library.fma_rate(threads, 15)


def _dense(weight: torch.Tensor) -> PackedWeight:
    return PackedWeight("dense", {"weight": weight}, out_features=weight.shape[0], in_features=weight.shape[1])


def bench_gemm(rounds: int, read: float, flops: float) -> None:
    print(f"\n{'linear':8} {'M':>5} {'ours ms':>9} {'torch bf16':>11} {'torch f32':>10} {'of limit':>9}  bound")
    for name, (n, k) in (SHAPES | HEAD).items():
        copies = max(1, RING_BYTES // (n * k * 2)) if name not in HEAD else 1
        plain = [torch.randn(n, k).bfloat16() for _ in range(copies)]
        ours = [gemm.pack(_dense(w)) for w in plain]
        wide = [w.float() for w in plain]
        for m in BATCHES if name not in HEAD else (1, 8, 32):
            x = torch.randn(m, k).bfloat16()
            x_wide = x.float()
            rows: Timed = {
                "ours": ring(lambda w, x=x: gemm.linear(x, w), ours),
                "bf16": ring(lambda w, x=x: F.linear(x, w), plain),
                "f32": ring(lambda w, x=x_wide: F.linear(x, w), wide),
            }
            if m * n * k > 2**31:  # torch's bfloat16 takes seconds here without native units
                del rows["bf16"]
            got = medians(rows, rounds if m <= 32 else max(3, rounds // 5))
            memory, compute = (n * k + m * (n + k)) * 2 / read, 2 * m * n * k / flops
            floor = max(memory, compute)
            versus = [f"{got[r] / got['ours']:.1f}x" if r in got else "-" for r in ("bf16", "f32")]
            print(
                f"{name:8} {m:5} {got['ours'] * 1e3:9.3f} {versus[0]:>11} {versus[1]:>10} {floor / got['ours']:9.0%}"
                f"  {'memory' if memory > compute else 'compute'}"
            )


def bench_attention(rounds: int, read: float, flops: float) -> None:
    spec = AttnSpec(num_heads=16, num_kv_heads=8, head_dim=128, v_head_dim=128, scale=128**-0.5)
    print(f"\n{'attention':24} {'ours ms':>9} {'reference':>10} {'of limit':>9}  bound")
    cases = {
        "decode 1 x 8192": [(8191, 1)],
        "decode 8 x 512": [(511, 1)] * 8,
        "decode 32 x 512": [(511, 1)] * 32,
        "prefill 512": [(0, 512)],
        "chunk of 512 at 1536": [(1536, 512)],
    }
    for name, reqs in cases.items():
        q, pool, batch = _attention_case(spec, reqs)
        device = torch.device("cpu")
        mine, theirs = attention_plan.plan(spec, batch, device), OPS["attn.plan"].body(spec, batch, device)
        rows: Timed = {
            "ours": lambda q=q, pool=pool, plan=mine: attention.paged(q, None, None, pool, 0, spec, plan),
            "reference": lambda q=q, pool=pool, plan=theirs: OPS["attn.paged"].body(q, None, None, pool, 0, spec, plan),
        }
        got = medians(rows, max(3, rounds // 3))
        keys = sum(p + e for p, e in reqs)
        pairs = sum(e * p + e * (e + 1) // 2 for p, e in reqs)
        memory = keys * spec.num_kv_heads * 2 * 128 * 2 / read
        compute = pairs * spec.num_heads * 128 * 4 / flops
        print(
            f"{name:24} {got['ours'] * 1e3:9.3f} {got['reference'] / got['ours']:9.1f}x"
            f" {max(memory, compute) / got['ours']:9.0%}  {'memory' if memory > compute else 'compute'}"
        )


def _attention_case(spec: AttnSpec, reqs: list[tuple[int, int]]) -> tuple[torch.Tensor, Pool, AttnBatch]:
    page_size = 16
    lens = [p + e for p, e in reqs]
    columns = max(-(-n // page_size) for n in lens)
    table = (torch.randperm(len(reqs) * columns) + 1).int().view(len(reqs), columns)
    pool_spec = PoolSpec(
        num_layers=1, page_size=page_size, num_kv_heads=8, head_dim=128, v_head_dim=128, dtype=torch.bfloat16
    )
    pool = Pool(pool_spec, len(reqs) * columns + 1, torch.device("cpu"))
    for leaf in pool.leaves:
        leaf.normal_()
    extends = torch.tensor([e for _, e in reqs])
    tokens = int(extends.sum())
    batch = AttnBatch(
        cu_extend_cpu=torch.cat([torch.zeros(1), extends.cumsum(0)]).int(),
        prefix_lens_cpu=torch.tensor([p for p, _ in reqs]).int(),
        seq_lens_cpu=torch.tensor(lens).int(),
        page_table_cpu=table,
        slot_mapping_cpu=torch.zeros(tokens, dtype=torch.int32),
        num_tokens=tokens,
        num_reqs=len(reqs),
        max_extend=int(extends.max()),
        num_pages=columns,
        page_size=page_size,
    )
    return torch.randn(tokens, spec.num_heads, 128).bfloat16(), pool, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("gemm", "attention"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    read, flops = limits(args.threads)
    level = isa.active(isa.host() or "avx2")
    print(f"{isa.cpu_name(isa.read_cpuinfo())}, {level}, {args.threads} threads; in this run:")
    print(f"read bandwidth {read / 1e9:.1f} GB/s, float32 FMA in registers {flops / 1e9:.0f} GFLOP/s")
    with torch.inference_mode():
        if args.only != "attention":
            bench_gemm(args.rounds, read, flops)
        if args.only != "gemm":
            bench_attention(args.rounds, read, flops)


if __name__ == "__main__":
    main()
