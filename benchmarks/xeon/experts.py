"""Experts, adapters and sampling against this machine's limits and the op bodies, in one process.

    python benchmarks/xeon/experts.py [--threads N] [--rounds N] [--only moe|lora|sampling] [--shape qwen3-moe-1.5b]

As kernels.py: rows in turn within each round, medians, ratios. Each call of moe.fused routes its tokens anew over a ring of
layers larger than the cache, as steps do, and sampling goes round a ring of logits. Bodies are timed after ours, not in turn: torch's
OpenMP threads spin on after its ops, on the cores that our next kernel would have. The floor of moe.fused is the bytes of the experts that have tokens over the read
bandwidth, or the FLOPs over the float32 FMA rate, whichever is larger (VDPBF16PS and AMX go beyond that rate: over 100%).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernels import SHAPES as LINEARS
from kernels import Timed, limits, medians
from sglang_xeon import gemm, isa, lora, moe, sampling

from sglang_core.api.ops import OPS, ExpertSpec, PackedWeight, RouteSpec, SampleParams

CONFIGS = Path(__file__).parents[1] / "configs"
FORMATS = ("dense", "int8.token_channel", "int4.awq.g128", "fp8.block128")
BATCHES = (1, 8, 32, 512)
RING_BYTES = 256 << 20
VOCAB = 151936
PARTS = {
    "qkv": (2048, 1024, 1024),
    "o": (1024,),
    "gate_up": (3072, 3072),
    "down": (1024,),
}  # rows of each part of LINEARS


def weight(w: torch.Tensor, fmt: str = "dense") -> PackedWeight:
    if fmt != "dense":
        return OPS["quant.quantize"].body(w, fmt)
    num = w.shape[0] if w.ndim == 3 else None
    return PackedWeight(fmt, {"weight": w}, out_features=w.shape[-2], in_features=w.shape[-1], num_experts=num)


def num_bytes(w: PackedWeight) -> int:
    return sum(buffer.nbytes for buffer in w.buffers())


def cycled(fn: Callable[[Any], object], items: list[Any]) -> Callable[[], object]:
    turn = itertools.cycle(items)
    return lambda: fn(next(turn))


def bench_moe(shape: str, rounds: int, read: float, flops: float) -> None:
    cfg = json.loads((CONFIGS / f"{shape}.json").read_text())
    hidden, width, experts, k = (
        cfg[name] for name in ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
    )
    act, route = ExpertSpec(), RouteSpec(num_experts=experts, top_k=k, renormalize=True)
    print(f"\n{shape}: {experts} experts of 3 x {hidden} x {width}, {k} a token")
    print(
        f"{'format':20} {'T':>4} {'experts':>8} {'ours ms':>9} {'GB/s':>6} {'GFLOP/s':>8} {'of limit':>9} {'body':>7}"
    )
    for fmt in FORMATS:
        bf16 = 2 * experts * 3 * hidden * width
        copies = max(1, RING_BYTES // bf16)
        canonical = [
            (
                weight(torch.randn(experts, 2 * width, hidden).bfloat16() * hidden**-0.5, fmt),
                weight(torch.randn(experts, hidden, width).bfloat16() * width**-0.5, fmt),
            )
            for _ in range(copies)
        ]
        packed = [(moe.pack(w13), moe.pack(w2)) for w13, w2 in canonical]
        expert_bytes = sum(map(num_bytes, packed[0])) / experts
        for tokens in BATCHES:
            x = torch.randn(tokens, hidden).bfloat16()
            routed = [moe.route(torch.randn(tokens, experts), route) for _ in range(8)]
            # As many layers as routings, in turn: no two calls in a row read the same experts.
            mine = [(packed[i % copies], *routed[i]) for i in range(len(routed))]
            theirs = [(canonical[i % copies], *routed[i]) for i in range(len(routed))]
            ours = cycled(lambda c, x=x: moe.fused(x, *c[0], c[1], c[2], act), mine)
            got = medians({"ours": ours}, rounds if tokens <= 32 else max(3, rounds // 3))
            if tokens <= 32 and fmt == "dense":  # bodies that dequantise take seconds
                body = OPS["moe.fused"].body
                got |= medians({"body": cycled(lambda c, x=x, f=body: f(x, *c[0], c[1], c[2], act), theirs)}, 3)
            active = sum(ids.unique().numel() for _, ids in routed) / len(routed)
            moved, work = active * expert_bytes, 6.0 * tokens * k * hidden * width
            floor = max(moved / read, work / flops)
            ratio = f"{got['body'] / got['ours']:6.1f}x" if "body" in got else "-"
            print(
                f"{fmt:20} {tokens:4} {active:8.1f} {got['ours'] * 1e3:9.3f} {moved / got['ours'] / 1e9:6.1f}"
                f" {work / got['ours'] / 1e9:8.0f} {floor / got['ours']:9.0%} {ratio:>7}",
                flush=True,
            )


def bench_lora(rounds: int) -> None:
    """A layer of Qwen3-0.6B with 16 adapters of rank 16 on all its projections, beside the projections themselves."""
    num, rank = 16, 16
    print(f"\na layer of Qwen3-0.6B, {num} adapters of rank {rank}")
    print(f"{'T':>4} {'adapters':9} {'linear ms':>10} {'adapters ms':>12} {'linear of both':>15} {'body':>7}")
    for tokens in (1, 32, 512):
        layers = []
        for name, (n, k) in LINEARS.items():
            parts = PARTS[name]
            a = torch.randn(num, len(parts) * rank, k).bfloat16() * k**-0.5
            b, scale = torch.randn(num, n, rank).bfloat16() * 0.1, torch.ones(num, len(parts))
            x, y = torch.randn(tokens, k).bfloat16(), torch.randn(tokens, n).bfloat16()
            layers.append((gemm.pack(weight(torch.randn(n, k).bfloat16())), y, x, a, b, scale, parts))
        owners = {
            "mixed": torch.arange(tokens).int() % num,
            "one": torch.zeros(tokens).int(),
            "none": torch.full((tokens,), -1).int(),
        }
        for kind, own in owners.items():

            def run(apply: Callable[..., object], layers: list[Any] = layers, own: torch.Tensor = own) -> None:
                for _, y, x, a, b, scale, parts in layers:
                    apply(y, x, a, b, own, scale, parts if len(parts) > 1 else ())

            rows: Timed = {
                "linear": lambda layers=layers: [gemm.linear(x, w) for w, _, x, *_ in layers],
                "ours": lambda: run(lora.apply),
            }
            if tokens <= 32:
                rows["body"] = lambda: run(OPS["lora.apply"].body)
            got = medians(rows, max(3, rounds // 3))
            ratio = f"{got['body'] / got['ours']:6.1f}x" if "body" in got else "-"
            print(
                f"{tokens:4} {kind:9} {got['linear'] * 1e3:10.3f} {got['ours'] * 1e3:12.3f}"
                f" {got['linear'] / (got['linear'] + got['ours']):15.0%} {ratio:>7}",
                flush=True,
            )


FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "none": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-k 20, top-p 0.9": {"top_k": 20, "top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
}


def bench_sampling(rounds: int, read: float) -> None:
    print(f"\nsampling from {VOCAB} normal logits; the floor is reading them once")
    print(f"{'filter':22} {'scale':>6} {'R':>4} {'ours ms':>9} {'of limit':>9} {'body':>7}")
    for (name, given), scale, rows in itertools.product(FILTERS.items(), (1.0, 3.0), (1, 32)):
        logits = [torch.randn(rows, VOCAB) * scale for _ in range(8 if rows > 1 else 256)]
        floats = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | {n: v for n, v in given.items() if n != "top_k"}
        top_k = int(given.get("top_k", VOCAB))
        params = SampleParams(
            **{n: torch.full((rows,), v) for n, v in floats.items()},
            top_k=torch.full((rows,), top_k, dtype=torch.int32),
            seeds=torch.arange(rows, dtype=torch.int32),
            positions=torch.arange(rows, dtype=torch.int32),
            all_greedy=floats["temperature"] == 0.0,
            needs_filter=bool(given),
            max_top_k=0 if top_k == VOCAB else top_k,
        )
        body = OPS["sample.sample"].body
        got = medians({"ours": cycled(lambda x, params=params: sampling.sample(x, params), logits)}, rounds)
        got |= medians({"body": cycled(lambda x, params=params, body=body: body(x, params), logits)}, 3)
        print(
            f"{name:22} {scale:6.1f} {rows:4} {got['ours'] * 1e3:9.3f} {logits[0].nbytes / read / got['ours']:9.0%}"
            f" {got['body'] / got['ours']:6.1f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("moe", "lora", "sampling"))
    parser.add_argument(
        "--shape", default="qwen3-moe-1.5b", help="a Qwen3-MoE of benchmarks/configs; one layer of it runs"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    read, flops = limits(args.threads)
    level = isa.active(isa.host() or "avx2")
    print(f"{isa.cpu_name(isa.read_cpuinfo())}, {level}, {args.threads} threads; in this run:")
    print(f"read bandwidth {read / 1e9:.1f} GB/s, float32 FMA in registers {flops / 1e9:.0f} GFLOP/s")
    with torch.inference_mode():
        if args.only in (None, "moe"):
            bench_moe(args.shape, args.rounds, read, flops)
        if args.only in (None, "lora"):
            bench_lora(args.rounds)
        if args.only in (None, "sampling"):
            bench_sampling(args.rounds, read)


if __name__ == "__main__":
    main()
