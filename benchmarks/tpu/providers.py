"""jax's kernels beside ours: what each copies from HBM, and the vector memory it takes. Nothing is compiled and nothing is timed.

    .venv-tpu/bin/python benchmarks/tpu/providers.py

Bytes are counted as the kernels' grids and copies go, for reqs of given lengths: ours from the plan that it is given; of jax's, whole blocks of pages,
for each block of queries. Of experts, a block of rows or weights counts when the grid comes to another one. VMEM is the compiler's, for v6e, from
budgets.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sglang_tpu import jax_attention, jax_experts
from sglang_tpu.aot import SECTION
from sglang_tpu.aot_matmul import EXPERTS, Model
from sglang_tpu.attention_aot import LLAMA
from sglang_tpu.attention_plan import END_PAGE, FIELDS, FIRST_PAGE, plan
from sglang_tpu.environment import to_jax
from sglang_tpu.groups import EXPERT_BYTES, grouping
from sglang_tpu.matmul import MAX_BLOCK

from sglang_core.api.ops import AttnBatch

PAGE, LANES, HALF = 64, 128, 2  # tokens of a page; bytes of a bfloat16
PAGE_BYTES = PAGE * 2 * LLAMA.num_kv_heads * LLAMA.head_dim * HALF
VMEM = json.loads((Path(__file__).parent / "budgets.json").read_text())[SECTION]["v6e"]


def batch_of(extend: int, lengths: list[int]) -> AttnBatch:
    """Reqs of these lengths, of which the last `extend` tokens are new. Page ids do not matter here."""
    seq_lens, extends = torch.tensor(lengths, dtype=torch.int32), torch.tensor([0] + [extend] * len(lengths))
    columns = -(-max(lengths) // PAGE)
    return AttnBatch(
        cu_extend_cpu=extends.cumsum(0).int(),
        prefix_lens_cpu=seq_lens - extend,
        seq_lens_cpu=seq_lens,
        page_table_cpu=torch.zeros(len(lengths), columns, dtype=torch.int32),
        slot_mapping_cpu=torch.zeros(extend * len(lengths), dtype=torch.int32),
        num_tokens=extend * len(lengths),
        num_reqs=len(lengths),
        max_extend=extend,
        num_pages=columns,
        page_size=PAGE,
    )


def keys_ours(batch: AttnBatch) -> int:
    items = plan(LLAMA, batch, torch.device("cpu")).items.view(-1, len(FIELDS))
    return int((items[:, END_PAGE] - items[:, FIRST_PAGE]).sum()) * PAGE_BYTES


def keys_jax(batch: AttnBatch) -> int:
    """Of every req that a block of queries meets, all blocks of pages, each to its end."""
    leaf = (0, PAGE, 2 * LLAMA.num_kv_heads, LLAMA.head_dim)
    block = jax_attention.pages_per_block(leaf, HALF, batch.num_pages)
    queries, total = min(jax_attention.QUERIES, batch.num_tokens), 0
    ends = batch.cu_extend_cpu.tolist()
    for first, end, length in zip(ends, ends[1:], batch.seq_lens_cpu.tolist(), strict=False):
        visits = (end - 1) // queries - first // queries + 1
        total += visits * -(-length // (block * PAGE)) * block * PAGE_BYTES
    return total


def experts_of(model: Model, tokens: int) -> torch.Tensor:
    """int32[T * K]: drawn at random, those of this rank."""
    weights = torch.ones(tokens, model.num_experts)
    ids = torch.multinomial(weights, model.top_k, generator=torch.Generator().manual_seed(tokens)).flatten()
    return torch.where(ids < model.held, ids, model.held)


def experts_ours(model: Model, group: torch.Tensor) -> tuple[int, int]:
    """-> bytes of rows and of weights that both products read."""
    at = grouping(to_jax(group.int()), model.held, ["dense"])
    tiles, matrices, rows, weights = int(at.tiles.count[0]), len(group[group < model.held].unique()), 0, 0
    for width, depth in shapes_of(model):
        block = min(width, max(LANES, EXPERT_BYTES // (depth * HALF) // LANES * LANES), MAX_BLOCK)
        rows += tiles * at.tiles.height * depth * HALF * (-(-width // block) if tiles > 1 else 1)
        weights += matrices * width * depth * HALF
    return rows, weights


def experts_jax(model: Model, group: torch.Tensor) -> tuple[int, int]:
    held = group[group < model.held]
    rows = weights = 0
    for width, depth in shapes_of(model):
        height, block = jax_experts.tile(len(group), width, depth, HALF)
        rows += -(-len(held) // height) * height * depth * HALF * -(-width // block)
        weights += len(held.unique()) * width * depth * HALF
    return rows, weights


def shapes_of(model: Model) -> list[tuple[int, int]]:
    return [(2 * model.width, model.hidden), (model.hidden, model.width)]


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def main() -> None:
    print(
        "| attention of 32 and 8 heads | keys and values, MiB: ours | jax | VMEM, MiB: ours | jax |\n|---|---|---|---|---|"
    )
    cases = {
        "decode of 64 reqs of 1,024": (batch_of(1, [1024] * 64), "decode of 64, page of 64"),
        "decode of 64 reqs of 1,100": (batch_of(1, [1100] * 64), "decode of 64, page of 64"),
        "prefill of 2,048": (batch_of(2048, [2048]), "prefill of 2048"),
        "prefill of 8,192": (batch_of(8192, [8192]), "prefill of 8192"),
    }
    for name, (batch, title) in cases.items():
        vmem = [VMEM[f"{op}[32 of 8 heads, {title}]"]["vmem"] for op in ("attn.paged", "attn.paged by jax")]
        print(f"| {name} | {mib(keys_ours(batch))} | {mib(keys_jax(batch))} | {mib(vmem[0])} | {mib(vmem[1])} |")
    print(
        "\n| experts | rows, MiB: ours | jax | weights, MiB: both | VMEM, MiB: ours | jax | temporary, MiB: ours | jax |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, model in EXPERTS.items():
        for tokens in (16, 512, 4096):
            group = experts_of(model, tokens)
            (ours, weights), (theirs, same) = experts_ours(model, group), experts_jax(model, group)
            assert weights == same, f"{name}: {weights} and {same} bytes of weights"
            used = [VMEM[f"{op}[dense, {name}, {tokens} tokens]"] for op in ("moe.fused", "moe.fused by jax")]
            figures = [ours, theirs, weights, *(u["vmem"] for u in used), *(u["temporary"] for u in used)]
            print(f"| {name}, {tokens} tokens | {' | '.join(map(mib, figures))} |")


if __name__ == "__main__":
    main()
