"""The emulated ops: each takes a call as it is documented, gives what the formula says, and refuses that call with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from sglang_npu_emulation.contract import BODIES, ContractError
from torch import Tensor

Call = dict[str, Any]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def triangle() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def norm() -> Call:
    return {"input": randn(3, 64), "gamma": randn(64), "epsilon": 1e-5}


def add_norm() -> Call:
    return {"x1": randn(3, 64), "x2": randn(3, 64, seed=1), "gamma": randn(64)}


def rotary() -> Call:
    angles = torch.linspace(0, 3, 5 * 32).view(1, 5, 1, 32)
    return {"input": randn(1, 5, 2, 32, dtype=torch.float32), "r1": angles.cos(), "r2": angles.sin()}


def write() -> Call:
    k, v = randn(3, 2, 32), randn(3, 2, 32, seed=1)
    caches = {"key_cache": randn(4, 16, 2, 32), "value_cache": randn(4, 16, 2, 32)}
    return {"key": k, "value": v, **caches, "slot_mapping": ints(17, 40, 18), "cache_mode": "Norm"}


def decode() -> Call:
    return {
        "query": randn(2, 1, 4, 32),
        "key": randn(6, 16, 64, seed=1),
        "value": randn(6, 16, 64, seed=2),
        "actual_seq_kvlen": [20, 5],
        "block_table": torch.tensor([[1, 4], [3, 0]], dtype=torch.int32),
        "block_size": 16,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "softmax_scale": 0.2,
        "input_layout": "BSND",
        "return_softmax_lse": True,
    }


def prefill() -> Call:
    changes = {
        "query": randn(1, 7, 4, 32),
        "key": randn(3, 128, 64, seed=1),
        "value": randn(3, 128, 64, seed=2),
        "actual_seq_qlen": [7],
        "actual_seq_kvlen": [150],
        "block_table": torch.tensor([[2, 1]], dtype=torch.int32),
        "block_size": 128,
        "sparse_mode": 4,
        "pre_tokens": 2**31 - 1,
        "next_tokens": 0,
        "atten_mask": triangle(),
    }
    return decode() | changes


def windowed() -> Call:
    """A decode whose first req does not see its first three keys."""
    hidden = torch.zeros(2, 1, 1, 32, dtype=torch.bool)
    hidden[0, ..., :3] = True
    return decode() | {"atten_mask": hidden}


def packed() -> Call:
    """Queries of 3, 1 and 4 tokens."""
    changes = {
        "query": randn(8, 4, 128),
        "key": randn(4, 128, 256, seed=1),
        "value": randn(4, 128, 256, seed=2),
        "actual_seq_qlen": [3, 4, 8],
        "actual_seq_kvlen": [150, 9, 4],
        "block_table": torch.tensor([[2, 1], [3, 0], [1, 0]], dtype=torch.int32),
        "input_layout": "TND",
        "pre_tokens": 4,
    }
    return prefill() | changes


def coded() -> Call:
    """Codes, each with a scale of its token and head."""
    generator = torch.Generator().manual_seed(6)
    codes = {
        name: torch.randint(-127, 128, (6, 32, 64), generator=generator).to(torch.int8) for name in ("key", "value")
    }
    names = ("dequant_scale_key", "dequant_scale_value")
    scales = {name: torch.rand(6, 2, 32, generator=generator) / 99 for name in names}
    return decode() | codes | scales | {"block_size": 32, "key_quant_mode": 5, "value_quant_mode": 5}


def unpaged() -> Call:
    """A longer query, and its keys in a row."""
    keys = {"key": randn(1, 150, 2, 32, seed=1), "value": randn(1, 150, 2, 32, seed=2)}
    return prefill() | keys | {"block_table": None, "block_size": None}


def rows() -> Call:
    """Queries of 3, 1 and 4 tokens, and their keys in rows beside one another."""
    changes = {
        "query": randn(8, 4, 192),
        "key": randn(20, 4, 192, seed=1),
        "value": randn(20, 4, 128, seed=2),
        "actual_seq_qlen": [3, 4, 8],
        "actual_seq_kvlen": [7, 16, 20],
        "num_key_value_heads": 4,
        "input_layout": "TND",
        "pre_tokens": 4,
    }
    return unpaged() | changes


def latents() -> Call:
    latent = randn(6, 16, 512, seed=1)
    changes = {
        "query": randn(2, 1, 8, 512),
        "key": latent,
        "value": latent,
        "query_rope": randn(2, 1, 8, 64),
        "key_rope": randn(6, 16, 64, seed=3),
        "num_query_heads": 8,
        "num_key_value_heads": 1,
        "softmax_scale": 0.05,
    }
    return decode() | changes


def gating() -> Call:
    return {"x": randn(3, 16, dtype=torch.float32), "k": 2, "bias": randn(16, dtype=torch.float32), "norm_type": 1}


def gating_softmax() -> Call:
    return {"x": randn(3, 16, dtype=torch.float32), "k": 2, "renorm": 1}


def routing() -> Call:
    return {
        "x": randn(3, 32),
        "expert_idx": torch.tensor([[1, 3], [0, 1], [1, 2]], dtype=torch.int32),
        "active_num": 6,
        "expert_num": 4,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 4],
    }


def grouped() -> Call:
    facts = {"split_item": 2, "group_type": 0, "group_list_type": 1}
    return {"x": [randn(6, 32)], "weight": [randn(3, 32, 48)], "group_list": ints(1, 0, 5, dtype=torch.int64), **facts}


def grouped_int8() -> Call:
    generator = torch.Generator().manual_seed(5)
    codes, weight = (
        torch.randint(-127, 128, shape, generator=generator).to(torch.int8) for shape in ((6, 32), (3, 32, 48))
    )
    scales = {
        "scale": [randn(3, 48)],
        "per_token_scale": [randn(6, dtype=torch.float32)],
        "output_dtype": torch.bfloat16,
    }
    return grouped() | {"x": [codes], "weight": [weight]} | scales


def grouped_int4() -> Call:
    codes = torch.randint(-8, 8, (3 * 32, 48), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    weight = torch.ops.npu.npu_convert_weight_to_int4pack(codes).view(3, 32, 6)
    return grouped() | {
        "weight": [weight],
        "antiquant_scale": [randn(3, 2, 48)],
        "antiquant_offset": [randn(3, 2, 48, seed=4)],
        "bias": [randn(3, 48, dtype=torch.float32)],
    }


def finalize() -> Call:
    rows = {"expanded_permuted_rows": randn(6, 32), "skip1": None, "skip2": None, "bias": None, "scales": randn(3, 2)}
    return rows | {"expanded_src_to_dst_row": ints(2, 0, 4, 5, 1, 3), "export_for_source_row": None}


def quant() -> Call:
    return {"input": randn(3, 64)}


def product() -> Call:
    codes = torch.randint(-127, 128, (3, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    weight = torch.randint(-127, 128, (64, 48), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    scales = {"scale": torch.full((48,), 0.01), "pertoken_scale": torch.full((3,), 0.02)}
    return {"x1": codes, "x2": weight, **scales, "bias": randn(48), "output_dtype": torch.bfloat16}


def int4_codes() -> Tensor:
    return torch.randint(-8, 8, (64, 16), generator=torch.Generator().manual_seed(3)).to(torch.int32)


def int4_product() -> Call:
    weight = torch.ops.npu.npu_convert_weight_to_int4pack(int4_codes())
    scales = {"antiquant_scale": randn(2, 16), "antiquant_offset": randn(2, 16, seed=4), "antiquant_group_size": 32}
    return {"x": randn(3, 64), "weight": weight, **scales, "bias": randn(16, dtype=torch.float32)}


def cast() -> Call:
    return {"input": randn(32, 64), "acl_format": 29}


CALLS: dict[str, tuple[str, Callable[[], Call]]] = {
    "norm": ("npu_rms_norm", norm),
    "add_norm": ("npu_add_rms_norm", add_norm),
    "rotary": ("npu_rotary_mul", rotary),
    "swiglu": ("npu_swiglu", lambda: {"input": randn(3, 64)}),
    "write": ("npu_scatter_pa_kv_cache", write),
    "decode": ("npu_fused_infer_attention_score_v2", decode),
    "prefill": ("npu_fused_infer_attention_score_v2", prefill),
    "windowed": ("npu_fused_infer_attention_score_v2", windowed),
    "packed": ("npu_fused_infer_attention_score_v2", packed),
    "coded": ("npu_fused_infer_attention_score_v2", coded),
    "unpaged": ("npu_fused_infer_attention_score_v2", unpaged),
    "rows": ("npu_fused_infer_attention_score_v2", rows),
    "latents": ("npu_fused_infer_attention_score_v2", latents),
    "gating": ("npu_moe_gating_top_k", gating),
    "gating_softmax": ("npu_moe_gating_top_k_softmax_v2", gating_softmax),
    "routing": ("npu_moe_init_routing_v2", routing),
    "grouped": ("npu_grouped_matmul", grouped),
    "grouped_int8": ("npu_grouped_matmul", grouped_int8),
    "grouped_int4": ("npu_grouped_matmul", grouped_int4),
    "finalize": ("npu_moe_finalize_routing", finalize),
    "quant": ("npu_dynamic_quant", quant),
    "product": ("npu_quant_matmul", product),
    "int4_pack": ("npu_convert_weight_to_int4pack", lambda: {"weight": int4_codes()}),
    "int4_product": ("npu_weight_quant_batchmatmul", int4_product),
    "cast": ("npu_format_cast", cast),
}

# What may not be: a call, and what of it is changed.
BROKEN: list[tuple[str, Call]] = [
    ("norm", {"gamma": randn(64, dtype=torch.float32)}),
    ("norm", {"input": randn(64)}),
    ("norm", {"input": randn(3, 64, dtype=torch.float64), "gamma": randn(64, dtype=torch.float64)}),
    ("add_norm", {"x2": randn(3, 64, dtype=torch.float32)}),
    ("rotary", {"r1": 2 * torch.ones(1, 5, 1, 32)}),
    ("rotary", {"input": randn(1, 5, 1000, 32, dtype=torch.float32)}),
    ("rotary", {"input": randn(5, 2, 32, dtype=torch.float32)}),
    ("rotary", {"input": randn(1, 5, 2, 32)}),
    ("rotary", {"rotary_mode": "quarter"}),
    ("write", {"cache_mode": "PA_NZ"}),
    ("write", {"slot_mapping": ints(17, 40, 40)}),
    ("write", {"slot_mapping": ints(17, 40, 64)}),
    ("write", {"slot_mapping": ints(17, 40, -1)}),
    ("write", {"key": randn(3, 2, 64)[..., ::2]}),
    ("write", {"key": randn(3, 2, 32, dtype=torch.float16)}),
    ("write", {"key_cache": randn(4, 16, 2, 16)}),
    ("decode", {"query": randn(2, 1, 4, 32, dtype=torch.float32)}),
    ("decode", {"query": randn(2, 1, 4, 24), "key": randn(6, 16, 48), "value": randn(6, 16, 48)}),
    ("decode", {"key": randn(6, 24, 64), "value": randn(6, 24, 64), "block_size": 24}),
    ("decode", {"block_size": 32}),
    ("decode", {"actual_seq_kvlen": [20]}),
    ("decode", {"actual_seq_kvlen": [20, 33]}),
    ("decode", {"actual_seq_kvlen": [20, -1]}),
    ("decode", {"actual_seq_kvlen": None}),
    ("decode", {"block_table": torch.tensor([[1, 4], [3, 0]])}),
    ("decode", {"sparse_mode": 3, "atten_mask": triangle()}),
    ("decode", {"num_query_heads": 2}),
    ("decode", {"num_key_value_heads": 3}),
    ("decode", {"input_layout": "BSH"}),
    ("decode", {"query": randn(2, 1, 130, 32), "num_query_heads": 130}),
    ("decode", {"learnable_sink": randn(4)}),
    ("windowed", {"atten_mask": torch.zeros(2, 1, 1, 16, dtype=torch.bool)}),
    ("windowed", {"atten_mask": torch.zeros(1, 1, 1, 32, dtype=torch.bool)}),
    ("windowed", {"atten_mask": torch.zeros(2, 1, 1, 32)}),
    ("windowed", {"atten_mask": torch.zeros(2, 1, 1, 64, dtype=torch.bool)[..., ::2]}),
    ("coded", {"dequant_scale_value": None}),
    ("coded", {"key_quant_mode": 0}),
    ("coded", {"dequant_scale_key": torch.rand(6, 2, 32).half()}),
    ("coded", {"dequant_scale_key": torch.rand(6, 32, 2)}),
    ("coded", {"dequant_scale_key": torch.rand(6, 32, 2).mT}),
    ("coded", {"value": randn(6, 32, 64)}),
    ("coded", {"key": coded()["key"].view(12, 16, 64), "value": coded()["value"].view(12, 16, 64), "block_size": 16}),
    ("decode", {"dequant_scale_key": torch.rand(6, 2, 16), "dequant_scale_value": torch.rand(6, 2, 16)}),
    ("prefill", {name: coded()[name].view(-1, 64)[:128].expand(3, 128, 64).contiguous() for name in ("key", "value")}),
    ("unpaged", {"actual_seq_kvlen": [149]}),
    ("unpaged", {"query": randn(1, 1, 4, 32), "actual_seq_qlen": [1]}),
    ("unpaged", {"value": randn(1, 150, 2, 64)}),
    ("unpaged", {"query": randn(2, 7, 4, 32), "actual_seq_qlen": [7, 7], "actual_seq_kvlen": [150, 150]}),
    ("unpaged", {"block_size": 128}),
    ("rows", {"query": randn(8, 4, 64), "key": randn(20, 4, 64), "value": randn(20, 4, 64)}),
    ("rows", {"query": randn(8, 4, 128), "key": randn(20, 4, 128), "value": randn(20, 4, 192)}),
    ("rows", {name: rows()[name].half() for name in ("query", "key", "value")}),
    ("rows", {"value": rows()["value"].half()}),
    ("rows", {"value": randn(20, 4, 256)[..., :128]}),
    ("rows", {"key": rows()["key"][:, :2].contiguous()}),
    ("rows", {"actual_seq_kvlen": [7, 9, 4]}),
    ("rows", {"actual_seq_kvlen": [7, 16, 19]}),
    ("rows", {"actual_seq_kvlen": [7, 16]}),
    ("rows", {"actual_seq_kvlen": [0, 16, 20], "sparse_mode": 0, "atten_mask": None}),
    ("rows", {"actual_seq_kvlen": [2, 16, 20]}),
    ("rows", {"actual_seq_kvlen": None}),
    ("rows", {"sparse_mode": 3}),
    ("rows", {"sparse_mode": 0}),
    ("rows", {"atten_mask": None}),
    ("rows", {"key": randn(0, 4, 192), "value": randn(0, 4, 128), "actual_seq_kvlen": [0, 0, 0]}),
    ("rows", {"query_rope": randn(8, 4, 64), "key_rope": randn(20, 4, 64)}),
    ("packed", {"actual_seq_qlen": None}),
    ("packed", {"actual_seq_qlen": [3, 8]}),
    ("packed", {"actual_seq_qlen": [4, 3, 8]}),
    ("packed", {"actual_seq_qlen": [3, 4, 7]}),
    ("packed", {"actual_seq_kvlen": [2, 9, 4]}),
    ("packed", {"sparse_mode": 3}),
    ("packed", {"pre_tokens": -1}),
    ("packed", {"pre_tokens": -20, "next_tokens": 20}),
    ("packed", {"query": randn(8, 4, 64), "key": randn(4, 128, 128), "value": randn(4, 128, 128)}),
    ("packed", {name: randn(*packed()[name].shape, dtype=torch.float16) for name in ("query", "key", "value")}),
    (
        "packed",
        {"key": randn(8, 64, 256), "value": randn(8, 64, 256), "block_size": 64, "actual_seq_kvlen": [90, 9, 4]},
    ),
    ("prefill", {"sparse_mode": 0, "atten_mask": None}),
    ("prefill", {"sparse_mode": 3}),
    ("prefill", {"pre_tokens": 3, "next_tokens": -4}),
    ("prefill", {"atten_mask": None}),
    ("prefill", {"atten_mask": ~triangle()}),
    ("prefill", {"atten_mask": torch.ones(7, 150, dtype=torch.bool)}),
    ("prefill", {"actual_seq_kvlen": [6]}),
    ("prefill", {"key": randn(3, 64, 64), "value": randn(3, 64, 64), "block_size": 64, "actual_seq_kvlen": [100]}),
    ("latents", {"key_rope": None}),
    ("latents", {"query": randn(2, 1, 12, 512), "query_rope": randn(2, 1, 12, 64), "num_query_heads": 12}),
    ("latents", {"query": randn(2, 1, 8, 256), "key": randn(6, 16, 256), "value": randn(6, 16, 256)}),
    ("latents", {"query_rope": randn(2, 1, 8, 32), "key_rope": randn(6, 16, 32)}),
    ("latents", {"key": randn(6, 32, 512), "value": randn(6, 32, 512), "key_rope": randn(6, 32, 64), "block_size": 32}),
    ("gating", {"bias": randn(16)}),
    ("gating", {"group_count": 8, "k_group": 2}),
    ("gating", {"group_count": 3, "k_group": 2}),
    ("gating", {"k": 17}),
    ("gating", {"renorm": 1}),
    ("gating", {"x": randn(3, 2049, dtype=torch.float32), "bias": None}),
    ("gating_softmax", {"k": 17}),
    ("routing", {"expert_idx": torch.tensor([[1, 4], [0, 1], [1, 2]], dtype=torch.int32)}),
    ("routing", {"expert_idx": torch.tensor([[1, 3], [0, 1], [1, 2]])}),
    ("routing", {"expert_tokens_num_type": 0}),
    ("routing", {"expert_tokens_num_flag": False}),
    ("routing", {"expert_num": 0, "active_expert_range": [0, 0]}),
    ("grouped", {"group_list": ints(1, 0, 4, dtype=torch.int64)}),
    ("grouped", {"group_list": ints(1, 0, 5)}),
    ("grouped", {"weight": [randn(3, 32, 48, dtype=torch.float16)]}),
    ("grouped", {"weight": [randn(1, 32, 48)], "group_list": ints(6, dtype=torch.int64)}),
    ("grouped", {"weight": [randn(3, 32, 96)[..., ::2]]}),
    ("grouped", {"bias": [randn(3, 48)]}),
    ("grouped", {"x": [randn(32, 6).t()]}),
    ("grouped_int8", {"scale": [randn(3, 48, dtype=torch.float32)]}),
    ("grouped_int8", {"output_dtype": torch.float16}),
    ("grouped_int8", {"per_token_scale": None}),
    ("grouped_int8", {"per_token_scale": [randn(6)]}),
    ("grouped_int8", {"bias": [randn(3, 48, dtype=torch.float32)]}),
    ("grouped_int4", {"antiquant_offset": None}),
    ("grouped_int4", {"antiquant_scale": [randn(3, 2, 48, dtype=torch.float32)]}),
    ("grouped_int4", {"antiquant_scale": [randn(3, 3, 48)], "antiquant_offset": [randn(3, 3, 48)]}),
    ("grouped_int4", {"antiquant_scale": [randn(3, 1, 48)], "antiquant_offset": [randn(3, 1, 48)]}),
    ("grouped_int4", {"antiquant_scale": [randn(3, 48)]}),
    ("grouped_int4", {"x": [randn(6, 32, dtype=torch.float32)]}),
    ("grouped_int4", {"bias": [randn(3, 48)]}),
    ("grouped_int4", {"weight": [torch.zeros(3, 6, 32, dtype=torch.int32).mT]}),
    ("finalize", {"scales": randn(3, 2, dtype=torch.float32)}),
    ("finalize", {"expanded_src_to_dst_row": ints(2, 0, 4, 5, 1, 6)}),
    ("finalize", {"drop_pad_mode": 2}),
    ("quant", {"input": randn(3, 64, dtype=torch.float32)}),
    ("quant", {"input": randn(0, 64)}),
    ("product", {"pertoken_scale": torch.full((4,), 0.02)}),
    ("product", {"pertoken_scale": None}),
    ("product", {"scale": torch.full((48,), 0.01, dtype=torch.bfloat16), "output_dtype": torch.float16, "bias": None}),
    ("product", {"bias": randn(48, dtype=torch.float16)}),
    ("product", {"output_dtype": None}),
    ("int4_pack", {"weight": int4_codes() + 1}),
    ("int4_pack", {"weight": int4_codes().t()}),
    ("int4_pack", {"weight": int4_codes()[:, :12].contiguous()}),
    ("int4_product", {"antiquant_group_size": 48}),
    ("int4_product", {"antiquant_group_size": 64}),
    ("int4_product", {"antiquant_scale": randn(2, 16, dtype=torch.float32)}),
    ("int4_product", {"antiquant_offset": randn(1, 16)}),
    ("int4_product", {"bias": randn(16)}),
    ("int4_product", {"x": randn(3, 64, dtype=torch.float32)}),
    ("cast", {"acl_format": 4}),
    ("cast", {"input": randn(32, 64, dtype=torch.float32)}),
]


def run(name: str, changes: Call | None = None) -> Any:
    op, arguments = CALLS[name]
    given = {
        key: value
        for key, value in (arguments() | (changes or {})).items()
        if value is not None or key.startswith(("skip", "bias", "export"))
    }
    return getattr(torch.ops.npu, op)(**given)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_documented_is_taken(name: str) -> None:
    """And its results are as the vendor's Meta kernel says, which every call compares."""
    run(name)


@pytest.mark.parametrize(
    ("name", "changes"), BROKEN, ids=[f"{name}-{'-'.join(c)}-{i}" for i, (name, c) in enumerate(BROKEN)]
)
def test_what_is_not_is_refused(name: str, changes: Call) -> None:
    run(name)
    with pytest.raises((ContractError, RuntimeError)):
        run(name, changes)


@pytest.mark.parametrize(
    ("name", "changes"), [("norm", {"epsilom": 1.0}), ("decode", {"actual_seq_lengths_kv": [1, 2]})]
)
def test_names_are_the_schemas(name: str, changes: Call) -> None:
    with pytest.raises(RuntimeError, match="Declaration: npu::"):
        run(name, changes)


def test_every_body_has_a_call_here() -> None:
    assert {op for op, _ in CALLS.values()} == set(BODIES)


def test_pages_are_read_through_the_table() -> None:
    """Keys laid out in order give the same as pages in any order, and neither stale slots nor other pages are looked at."""
    call = decode()
    o, lse = run("decode")
    for b, n in enumerate(call["actual_seq_kvlen"]):
        pages = call["block_table"][b].long()
        k, v = (call[name][pages].view(-1, 2, 32)[:n].float() for name in ("key", "value"))
        q = call["query"][b, 0].float().view(2, 2, 32)
        scores = torch.einsum("hgd,nhd->hgn", q, k) * 0.2
        torch.testing.assert_close(lse[b, :, 0, 0], scores.logsumexp(-1).flatten())
        expected = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), v).view(4, 32)
        torch.testing.assert_close(o[b, 0].float(), expected, atol=1e-2, rtol=1e-2)
    for name in ("key", "value"):
        call[name][[0, 2, 5]] = torch.nan  # pages of nobody
        call[name][4, 4:] = call[name][3, 5:] = torch.nan  # past the ends
    assert torch.equal(torch.ops.npu.npu_fused_infer_attention_score_v2(**call)[0], o)


def one_token(call: Call, query: Tensor, table: Tensor, num_keys: int, first: int) -> tuple[Tensor, Tensor]:
    """What a query [4, D] sees of the keys [first, num_keys): o [4, D], lse [4]."""
    hidden = torch.arange(table.numel() * 128) < first
    alone = {"query": query[None, None], "actual_seq_kvlen": [num_keys], "block_table": table[None], "sparse_mode": 0}
    alone |= {"input_layout": "BSND", "atten_mask": hidden[None, None, None]}
    given = {k: v for k, v in (call | alone).items() if k not in ("actual_seq_qlen", "pre_tokens", "next_tokens")}
    o, lse = torch.ops.npu.npu_fused_infer_attention_score_v2(**given)
    return o[0, 0], lse[0, :, 0, 0]


@pytest.mark.parametrize("before", [2**31 - 1, 6, 0])
def test_a_longer_query_sees_what_its_tokens_see_one_by_one(before: int) -> None:
    call = prefill()
    o, lse = run("prefill", {"pre_tokens": before})
    for i in range(7):
        num_keys = 144 + i
        expected = one_token(call, call["query"][0, i], call["block_table"][0], num_keys, num_keys - 1 - before)
        torch.testing.assert_close(o[0, i], expected[0], atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(lse[0, :, i, 0], expected[1])


def test_queries_in_one_call_see_what_their_tokens_see_one_by_one() -> None:
    call, (o, lse) = packed(), run("packed")
    row = 0
    for length, total, table in zip((3, 1, 4), call["actual_seq_kvlen"], call["block_table"], strict=True):
        for i in range(length):
            num_keys = total - length + 1 + i
            expected = one_token(call, call["query"][row], table, num_keys, num_keys - 5)
            torch.testing.assert_close(o[row], expected[0], atol=1e-2, rtol=1e-2)
            torch.testing.assert_close(lse[row, :, 0], expected[1])
            row += 1


@pytest.mark.parametrize("band", [True, False])
def test_rows_see_keys_of_their_own_req(band: bool) -> None:
    """All of them where there is no band; else those up to their own place, the last query's being the last key."""
    call, (o, lse) = rows(), run("rows", {} if band else {"sparse_mode": 0, "atten_mask": None})
    for (start, end), (first, last) in zip(((0, 3), (3, 4), (4, 8)), ((0, 7), (7, 16), (16, 20)), strict=True):
        for row in range(start, end):
            own = last - (end - 1 - row)
            seen = slice(max(first, own - 5), own) if band else slice(first, last)
            scores = torch.einsum("hd,nhd->hn", call["query"][row].float(), call["key"][seen].float()) * 0.2
            expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), call["value"][seen].float())
            torch.testing.assert_close(o[row].float(), expected, atol=1e-2, rtol=1e-2)
            torch.testing.assert_close(lse[row, :, 0], scores.logsumexp(-1))


def test_experts_get_their_rows_and_give_them_back() -> None:
    call = routing()
    rows, place, counts, _ = run("routing")
    assert counts.tolist() == [1, 3, 1, 1]
    for t in range(3):
        for k in range(2):
            assert torch.equal(rows[place[2 * t + k]], call["x"][t])
    by_choice = place.view(3, 2).t().contiguous().view(-1)
    weights = torch.tensor([[1.0, 2.0], [0.5, 0.5], [0.0, 3.0]])
    back = torch_npu.npu_moe_finalize_routing(rows.float(), None, None, None, weights, by_choice, None)
    torch.testing.assert_close(back, call["x"].float() * weights.sum(1, keepdim=True))
