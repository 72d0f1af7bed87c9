"""Decode tokens/s of the engine against Hugging Face generate: same shape, random weights, bf16, SDPA, same batch.

    python benchmarks/serving/decode_vs_hf.py [--device D] [--shape qwen3-0.6b] [--batch-sizes 8,32] [--runs 5]

Both answer the same prompts greedily to the same length. A decode rate is batch * (N - 1) / (t_N - t_1): the time of N
tokens less that of one, so that prefill cancels out. Rounds alternate; the ratio is taken within a round. The prefix cache
is off, as Hugging Face has none. On a CPU without bf16 units Hugging Face is faster in float32: --their-dtype float32
compares with that. Hugging Face gets as many threads as the engine, and runs on the host CPU: compare host
devices with it only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from shapes import DEFAULT_SHAPE, dummy_engine_settings, model_folder, save, spread
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_core import Engine
from sglang_core.bench.workload import Prompt, random_ids

SEED = 0
INPUT_LEN, OUTPUT_LEN = 128, 33


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shape", default=DEFAULT_SHAPE)
    parser.add_argument("--batch-sizes", default="8,32")
    parser.add_argument("--input-len", type=int, default=INPUT_LEN)
    parser.add_argument("--output-len", type=int, default=OUTPUT_LEN)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--their-dtype", choices=("bfloat16", "float32"), help="Hugging Face's, if not the engine's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    batch_sizes = [int(size) for size in args.batch_sizes.split(",")]
    facts = {}
    with model_folder(args.shape) as folder:
        their_dtype = args.their_dtype or args.dtype
        theirs = hugging_face(folder, getattr(torch, their_dtype))
        settings = dummy_engine_settings(folder, args.device) | {
            "dtype": args.dtype,
            "max_running_requests": max(batch_sizes),
        }
        with Engine(**settings, disable_radix_cache=True) as engine:
            what = f"{args.shape} in {args.dtype} on {engine.info.device}, Hugging Face in {their_dtype}"
            print(f"{what}, {args.input_len} in, {args.output_len} out, {args.runs} rounds", flush=True)
            for size in batch_sizes:
                prompts = random_ids(
                    size, input_len=args.input_len, output_len=1, vocab_size=engine.info.vocab_size, seed=SEED
                )
                facts[str(size)] = compare(ours(engine), theirs, prompts, args.output_len, args.runs)
    save(args.json, facts)


Generate = Callable[[list[list[int]], int], None]


def ours(engine: Engine) -> Generate:
    def generate(input_ids: list[list[int]], num_tokens: int) -> None:
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        answers = engine.generate(input_ids=input_ids, sampling_params=sampling)
        assert all(a["meta_info"]["completion_tokens"] == num_tokens for a in answers)

    return generate


def hugging_face(folder: str, dtype: torch.dtype) -> Generate:
    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None

    def generate(input_ids: list[list[int]], num_tokens: int) -> None:
        ids = torch.tensor(input_ids)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape == (len(input_ids), len(input_ids[0]) + num_tokens)

    return generate


def compare(
    first: Generate, second: Generate, prompts: list[Prompt], output_len: int, rounds: int
) -> dict[str, object]:
    input_ids = [prompt.input_ids or [] for prompt in prompts]
    for generate in (first, second):
        generate([ids[:8] for ids in input_ids], 2)
    pairs = []
    for i in range(rounds):
        order = (first, second) if i % 2 == 0 else (second, first)
        rates = {generate: decode_rate(generate, input_ids, output_len) for generate in order}
        pairs.append((rates[first], rates[second]))
    ratios = [a / b for a, b in pairs]
    print(f"batch {len(prompts)}: decode tokens/s")
    print(f"  sglang-core   {spread([a for a, _ in pairs])}")
    print(f"  Hugging Face  {spread([b for _, b in pairs])}")
    print(f"  ratio         {spread(ratios)}", flush=True)
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "hugging_face": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def decode_rate(generate: Generate, input_ids: list[list[int]], output_len: int) -> float:
    """Tokens/s after the first token of each answer."""
    seconds = []
    for num_tokens in (1, output_len):
        started = time.perf_counter()
        generate(input_ids, num_tokens)
        seconds.append(time.perf_counter() - started)
    return len(input_ids) * (output_len - 1) / (seconds[1] - seconds[0])


if __name__ == "__main__":
    main()
