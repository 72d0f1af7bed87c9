"""Quantised caches end to end: the logits are transformers' over the very keys and values that the codes stand for.

The reference rounds each key and value as the pool does, with the same arithmetic written once more, and computes on in float32.
What may differ is the order of float32 sums, and, where a number stands within that error of the middle of two codes, the
neighbouring code. BOUND is what a few such neighbours move logits by; where codes are coarse, the rounding as a whole moves them
more than tenfold.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from sglang_core import Engine
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.config import EngineConfig
from sglang_core.engine.resolve import resolve
from sglang_core.errors import ConfigError, WeightError
from tests.models.harness import PAGE_SIZE, Row, Stepper, load
from tests.models.test_parity import error
from tests.models.tiny import VOCAB, Reference, hf_model, reference
from tests.ops.paged_case import stored
from tests.weights.test_loader import Ranked

BOUND = {"float16": 4e-3, "bfloat16": 4e-3, "fp8_e4m3": 5e-2, "int8": 1e-2}
MODELS = ("llama3", "gemma2", "deepseek-v3")  # gemma2: windows and soft caps; deepseek: latents, by both paths
K_SCALES, V_SCALES = torch.tensor([0.004, 0.3]), torch.tensor([0.5, 0.02])  # a KV head of llama3
NUM_PROMPTS, PROMPT_LEN, ANSWER_LEN = 8, 6, 14
SAMPLING = {"temperature": 0, "max_new_tokens": ANSWER_LEN, "ignore_eos": True}
ONE = torch.ones(1)
KV_ONLY = {
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "config_groups": {},
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
}


class StoredCache(DynamicCache):
    """Keeps keys and values as a pool of `dtype` gives them back."""

    def __init__(self, dtype: torch.dtype, k_scale: Tensor = ONE, v_scale: Tensor = ONE) -> None:
        super().__init__()
        self.dtype, self.k_scale, self.v_scale = dtype, k_scale, v_scale

    def update(self, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Any:
        """k, v: [1, Hk, S, D]."""
        return super().update(self._stored(k, self.k_scale), self._stored(v, self.v_scale), *args, **more)

    def _stored(self, x: Tensor, scale: Tensor) -> Tensor:
        return stored(x[0].transpose(0, 1), self.dtype, scale).float().transpose(0, 1)[None]


@cache
def wanted(model: str, root: Path, kv_dtype: str, scaled: bool = False) -> tuple[Tensor, ...]:
    """transformers' logits of the reference's tokens with such a cache."""
    hf, ref = hf_model(model), reference(model, root)
    scales = (K_SCALES, V_SCALES) if scaled else (ONE, ONE)
    with torch.no_grad():
        return tuple(
            hf(torch.tensor([t]), past_key_values=StoredCache(KV_DTYPES[kv_dtype], *scales), use_cache=True)
            .logits[0]
            .float()
            for t in ref.tokens
        )


def in_steps(stepper: Stepper, tokens: list[int], sizes: tuple[int, ...]) -> Tensor:
    row, parts = Row(), []
    while row.num_tokens < len(tokens):
        size = sizes[len(parts) % len(sizes)]
        parts.append(stepper.step([(row, tokens[row.num_tokens :][:size])])[0])
    return torch.cat(parts)


@pytest.mark.parametrize("kv_dtype", BOUND)
@pytest.mark.parametrize("model", MODELS)
def test_prefill_chunks_decode_and_cache_hits(model: str, kv_dtype: str, checkpoints: Path) -> None:
    ref, want = reference(model, checkpoints), wanted(model, checkpoints, kv_dtype)
    stepper = Stepper(load(ref.folder, kv_dtype=kv_dtype))
    first = Row()
    batch = stepper.step([(first, ref.tokens[0]), (Row(), ref.tokens[1]), (Row(), ref.tokens[2])])
    assert max(error(a, b) for a, b in zip(batch, want, strict=True)) < BOUND[kv_dtype]
    for sizes in ((5, 3), (9, 1, 1)):
        assert error(in_steps(stepper, ref.tokens[0], sizes), want[0]) < BOUND[kv_dtype]
    hit = stepper.share_prefix(first, 3 * PAGE_SIZE)
    (ours,) = stepper.step([(hit, ref.tokens[0][3 * PAGE_SIZE :])])
    assert error(ours, want[0][3 * PAGE_SIZE :]) < BOUND[kv_dtype]


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8_e4m3", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_an_unrounded_cache_is_tenfold_off(model: str, kv_dtype: str, checkpoints: Path) -> None:
    plain = reference(model, checkpoints).logits
    off = min(error(a, b) for a, b in zip(plain, wanted(model, checkpoints, kv_dtype), strict=True))
    assert off > 10 * BOUND[kv_dtype]


def with_scales(folder: Path, ref: Reference, spelling: tuple[str, str], per_head: bool, **config: Any) -> Path:
    """A copy of a checkpoint, with scales under names like `model.layers.0.self_attn.{spelling}`."""
    tensors = {name: t for file in ref.folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for layer in range(3):
        for name, scales in zip(spelling, (K_SCALES, V_SCALES), strict=True):
            scale = scales.reshape(-1, 1, 1) if per_head else scales[0]
            tensors[f"model.layers.{layer}.self_attn.{name}"] = scale.to(
                torch.bfloat16 if per_head else torch.float32, copy=True
            )
    save_file(tensors, folder / "model.safetensors")
    hf_config = json.loads((ref.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf_config | config))
    return folder


SPELLINGS = [
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda names: names[0])
def test_scales_of_a_checkpoint_are_found_by_any_of_their_names(
    spelling: tuple[str, str], checkpoints: Path, tmp_path: Path
) -> None:
    ref = reference("llama3", checkpoints)
    model = load(with_scales(tmp_path, ref, spelling, per_head=False), kv_dtype="fp8_e4m3")
    (pool,) = Stepper(model).pools.values()
    for layer in range(3):
        assert pool.k_scale(layer).tolist() == [float(K_SCALES[0])] * 2
        assert pool.v_scale(layer).tolist() == [float(V_SCALES[0])] * 2


def test_scales_that_are_not_there_are_one_and_it_is_said(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    stepper = Stepper(load(reference("llama3", checkpoints).folder, kv_dtype="fp8_e4m3"))
    (pool,) = stepper.pools.values()
    assert all(scale.tolist() == [1.0, 1.0] for scale in pool.scales)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said.startswith("6 not in the checkpoint (model.layers.0.self_attn.k_scale, ") and said.endswith(
        "taken as 1"
    )


def test_a_cache_that_needs_no_scales_leaves_them_in_the_file(checkpoints: Path, tmp_path: Path) -> None:
    ref = reference("llama3", checkpoints)
    stepper = Stepper(load(with_scales(tmp_path, ref, ("k_scale", "v_scale"), per_head=False)))
    assert error(stepper.logits(ref.tokens[0]), ref.logits[0]) < 1e-4


@pytest.mark.parametrize("tp_heads", [None, (0, 1), (1, 2)], ids=["one rank", "rank 0 of 2", "rank 1 of 2"])
def test_a_scale_for_each_head(tp_heads: tuple[int, int] | None, checkpoints: Path, tmp_path: Path) -> None:
    scheme = KV_ONLY["kv_cache_scheme"] | {"strategy": "attn_head"}  # type: ignore[operator]
    ref = reference("llama3", checkpoints)
    config = {"quantization_config": KV_ONLY | {"kv_cache_scheme": scheme}}
    folder = with_scales(tmp_path, ref, ("k_scale", "v_scale"), per_head=True, **config)
    context = {} if tp_heads is None else {"tp": Ranked(tp_heads[0], 2)}
    (pool,) = Stepper(load(folder, kv_dtype="fp8_e4m3", **context)).pools.values()
    heads = slice(*(tp_heads or (0, 2)))
    assert torch.equal(pool.k_scale(2), K_SCALES.to(torch.bfloat16).float()[heads])
    assert torch.equal(pool.v_scale(0), V_SCALES.to(torch.bfloat16).float()[heads])


def test_scales_of_each_head_give_the_reference_and_leaving_them_out_does_not(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.K_SCALES", K_SCALES.to(torch.bfloat16).float())
    monkeypatch.setattr(f"{__name__}.V_SCALES", V_SCALES.to(torch.bfloat16).float())
    scheme = KV_ONLY["kv_cache_scheme"] | {"strategy": "attn_head"}  # type: ignore[operator]
    ref = reference("llama3", checkpoints)
    config = {"quantization_config": KV_ONLY | {"kv_cache_scheme": scheme}}
    folder = with_scales(tmp_path, ref, ("k_scale", "v_scale"), per_head=True, **config)
    want = wanted("llama3", checkpoints, "fp8_e4m3", scaled=True)
    stepper = Stepper(load(folder, kv_dtype="fp8_e4m3"))
    assert error(stepper.logits(ref.tokens[0]), want[0]) < BOUND["fp8_e4m3"]
    unscaled = Stepper(load(ref.folder, kv_dtype="fp8_e4m3"))
    assert error(unscaled.logits(ref.tokens[0]), want[0]) > 10 * BOUND["fp8_e4m3"]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_a_scale_that_was_not_calibrated_is_refused(
    bad: float, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.K_SCALES", torch.tensor([bad, 1.0]))
    folder = with_scales(tmp_path, reference("llama3", checkpoints), ("k_scale", "v_scale"), per_head=False)
    with pytest.raises(ConfigError, match="not positive"):
        load(folder, kv_dtype="fp8_e4m3")


def test_one_scale_for_both_is_not_guessed_at(checkpoints: Path, tmp_path: Path) -> None:
    ref = reference("llama3", checkpoints)
    folder = with_scales(tmp_path, ref, ("kv_scale", "v_scale"), per_head=False)
    with pytest.raises(WeightError, match=r"unexpected .*kv_scale"):
        load(folder, kv_dtype="fp8_e4m3")


@cache
def greedy(kv_dtype: str) -> dict[tuple[int, ...], list[int]]:
    """Prompts and transformers' greedy answers with such a cache, where every choice is clear by more than two errors."""
    hf, made, generator = hf_model("llama3"), {}, torch.Generator().manual_seed(3)
    while len(made) < NUM_PROMPTS:
        prompt = torch.randint(3, VOCAB, (PROMPT_LEN,), generator=generator).tolist()
        ids, clear = prompt, True
        while clear and len(ids) < PROMPT_LEN + ANSWER_LEN:
            cached = StoredCache(KV_DTYPES[kv_dtype])
            with torch.no_grad():
                best = hf(torch.tensor([ids]), past_key_values=cached, use_cache=True).logits[0, -1].topk(2)
            clear = float(best.values[0] - best.values[1]) > 2 * BOUND[kv_dtype]
            ids = [*ids, int(best.indices[0])]
        if clear:
            made[tuple(prompt)] = ids[PROMPT_LEN:]
    return made


SETTINGS: dict[str, dict[str, Any]] = {
    "cached": {},
    "chunked, no cache": {"chunked_prefill_size": 5, "disable_radix_cache": True},
    "retraction": {"max_total_tokens": 36, "disable_radix_cache": True},
    "strict": {"device": "strict"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "int8"])
def test_the_engine_gives_the_same_tokens(kv_dtype: str, name: str, checkpoints: Path) -> None:
    ref = reference("llama3", checkpoints)
    prompts = [list(prompt) for prompt in greedy(kv_dtype)]
    common = {"device": "cpu", "dtype": "float32", "in_process": True, "max_total_tokens": 512, "page_size": 4}
    with Engine(
        model_path=str(ref.folder), skip_tokenizer_init=True, kv_cache_dtype=kv_dtype, **(common | SETTINGS[name])
    ) as engine:
        rounds = 0
        while rounds < 2 or (name == "retraction" and rounds < 10 and not engine.stats()["retractions"]):
            answers = engine.generate(input_ids=prompts, sampling_params=SAMPLING)  # the second time from the cache
            assert [answer["output_ids"] for answer in answers] == list(greedy(kv_dtype).values())
            rounds += 1
        assert name != "retraction" or engine.stats()["retractions"] > 0, "the pool was too large to tell"


def test_auto_takes_what_the_checkpoint_was_calibrated_for(checkpoints: Path, tmp_path: Path) -> None:
    ref = reference("llama3", checkpoints)
    folder = with_scales(tmp_path, ref, ("k_scale", "v_scale"), per_head=False, quantization_config=KV_ONLY)
    config = {"model_path": str(folder), "device": "cpu", "dtype": "float32"}
    assert resolve(EngineConfig.from_flat(**config)).config.cache.kv_cache_dtype == "fp8_e4m3"
    assert resolve(EngineConfig.from_flat(**config, kv_cache_dtype="bf16")).config.cache.kv_cache_dtype == "bfloat16"
    unknown = KV_ONLY | {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}
    with_scales(tmp_path, ref, ("k_scale", "v_scale"), per_head=False, quantization_config=unknown)
    with pytest.raises(ConfigError, match=r"num_bits=4.*set --kv-cache-dtype to one of float32, bfloat16"):
        resolve(EngineConfig.from_flat(**config))
    assert resolve(EngineConfig.from_flat(**config, kv_cache_dtype="int8")).config.cache.kv_cache_dtype == "int8"


def test_a_cache_dtype_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'fp8_e5m2' is not one of .*fp8_e4m3.*did you mean 'fp8_e4m3'"):
        EngineConfig.from_flat(kv_cache_dtype="fp8_e5m2")
