"""Bytes of the KV pool in each --kv-cache-dtype: of pools that are really allocated, for equally many tokens, and tokens that fit."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from sglang_core.backend.communicator import LocalCommunicator
from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_context, op_table
from sglang_core.engine.resolve import resolve
from sglang_core.layers.build import bind_model

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", help="of benchmarks/configs")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget-gib", type=float, default=1.0)
    args = parser.parse_args()

    sizes = {name: measure(args.shape, name, args.tokens) for name in ("bfloat16", "float16", "fp8_e4m3", "int8")}
    base, budget = sizes["bfloat16"], args.budget_gib * 2**30
    print(f"{args.shape}, {args.tokens} tokens; fit: tokens in {args.budget_gib:g} GiB")
    for name, size in sizes.items():
        print(
            f"{name:9} {size / 2**20:9.2f} MiB  {size / base:.4f} of bfloat16  fit {int(budget * args.tokens / size):9}"
        )


def measure(shape: str, kv_dtype: str, tokens: int) -> int:
    """Bytes of the leaves that a runtime allocates for the model's pools, scratch page left out."""
    config = EngineConfig.from_flat(
        model_path=str(CONFIGS / f"{shape}.json"), device="cpu", load_format="dummy", kv_cache_dtype=kv_dtype
    )
    resolved = resolve(config)
    runtime = resolved.device.backend.create_runtime(RuntimeContext(devices=(resolved.device.info,)))
    model = resolved.model_class(resolved.model)
    bind_model(model, build_context(resolved, op_table(resolved), torch.device("cpu"), LocalCommunicator()))
    total = 0
    for spec in model.pool_specs(16, KV_DTYPES[kv_dtype]).values():
        pool = runtime.alloc_pool(replace(spec, layout="canonical"), tokens // 16 + 1)
        total += sum(leaf[1:].nbytes for leaf in pool.leaves)
    runtime.close()
    return total


if __name__ == "__main__":
    main()
