"""gemm.linear in every weight format against our own bf16, and bf16 against the rate of its dot products, in one process.

    python benchmarks/xeon/formats.py [--threads N] [--rounds N] [--formats int8.token_channel,int4.pack.g128] [--rows 1,8,32,512]

Each row is timed in turn within each round and medians are compared. `GB/s` counts the packed bytes, `of limit` is the larger of
bytes / read bandwidth and FLOPs / rate of the dot products (`dots.cpp`: operands in L1) over the time; `x bf16` is the speed-up.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch
from kernels import RING_BYTES, SHAPES, Timed, limits, medians, ring
from sglang_xeon import gemm, isa, weights

from sglang_core.api.ops import OPS, PackedWeight

FORMATS = (
    *("int8.token_channel", "int4.pack.g128", "int4.awq.g128", "int4.gptq.g128"),
    *("fp8.token_channel", "fp8.block128", "mxfp4.g32", "nvfp4.g16"),
)
QUANTIZE = OPS["quant.quantize"].body


def dot_rates(threads: int) -> dict[str, float]:
    """Products and sums a second, operands in L1, of each dot product that this compiler and CPU know."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "dots.so"
        flags = ["-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
        subprocess.run(["g++", *flags, str(Path(__file__).with_name("dots.cpp")), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
        rates = {}
        for name in ("bf16", "int8", "tile_bf16"):
            function = getattr(library, f"{name}_rate")
            function.restype = ctypes.c_double
            rates[name] = function(threads, 5)
        return rates


def copies(weight: torch.Tensor, fmt: str) -> list[PackedWeight]:
    """The same weight often enough that a ring of them is no cache's."""
    first = gemm.pack(QUANTIZE(weight, fmt))
    count = max(2, RING_BYTES // size(first))
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def size(w: PackedWeight) -> int:
    return sum(tensor.nbytes for tensor in w.buffers())


def bench(
    name: str, formats: list[str], batches: list[int], rounds: int, read: float, rate: float, use_tiles: bool
) -> None:
    n, k = SHAPES[name]
    weight = torch.randn(n, k).bfloat16()
    packed = {fmt: copies(weight, fmt) for fmt in ("dense", *formats)}
    linear = gemm.linear_amx if use_tiles else gemm.linear
    for m in batches:
        x = torch.randn(m, k).bfloat16()
        rows: Timed = {fmt: ring(lambda w, x=x: linear(x, w), ws) for fmt, ws in packed.items()}
        got = medians(rows, rounds if m <= 32 else max(3, rounds // 5))
        for fmt, seconds in got.items():
            stored = size(packed[fmt][0])
            floor = max(stored / read, 2 * m * n * k / rate)
            print(
                f"{name:8} {m:5} {fmt:22} {seconds * 1e3:9.3f} {stored / seconds / 1e9:7.1f} "
                f"{2 * m * n * k / seconds / 1e9:9.0f} {floor / seconds:9.0%} {got['dense'] / seconds:7.2f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,8,32,512")
    parser.add_argument("--shapes", default="gate_up")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    read, fma = limits(args.threads)
    rates = dot_rates(args.threads)
    level = isa.active(isa.host() or "avx2")
    dots = {"avx512_bf16": rates["bf16"], "amx": max(rates["bf16"], rates["tile_bf16"])}
    rate = max(fma, dots.get(level, 0.0))
    print(f"{isa.cpu_name(isa.read_cpuinfo())}, {level}, {args.threads} threads; layout {weights.LAYOUT}; in this run:")
    print(f"read bandwidth {read / 1e9:.1f} GB/s; float32 FMA {fma / 1e9:.0f} GFLOP/s; dot products (0: none here)")
    print("in GFLOP/s: " + ", ".join(f"{name} {value / 1e9:.0f}" for name, value in rates.items()))
    print(f"\n{'layer':8} {'M':>5} {'format':22} {'ms':>9} {'GB/s':>7} {'GFLOP/s':>9} {'of limit':>9} {'x bf16':>7}")
    with torch.inference_mode():
        for name in args.shapes.split(","):
            batches = [int(m) for m in args.rows.split(",")]
            bench(name, args.formats.split(","), batches, args.rounds, read, rate, level == "amx")


if __name__ == "__main__":
    main()
