"""Train the demo model on text made by corpus.py and write a checkpoint in bf16.

    python tools/demo_model/train.py --out sglang_core/demo

Takes about 30 minutes on two CPU cores: one process and one thread per core, which average their gradients. The same
seed and library versions give the same text and tokenizer; weights may differ in the last bits between machines.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import torch
import torch.distributed as dist
from rich.progress import Progress
from tokenizer import CONTEXT, END_OF_TEXT, TURN_END, TURN_START, train_tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB = 1536
ROW, ROWS = 256, 4  # of one process and step
LONG_ROW, LONG_EVERY = CONTEXT, 16  # now and then one row of the full context instead
PLAIN_SHARE = 0.05
IGNORED = -100

Document = tuple[list[int], list[int]]  # token ids; the same ids as labels, IGNORED where nothing is to be learned


def chat_document(tokenizer: PreTrainedTokenizerFast, system: str | None, chat: corpus.Chat) -> Document:
    """A chat as the template renders it, piece by piece; only the assistant's words are learned."""
    pieces = [(f"{TURN_START}system\n{system}{TURN_END}\n", False)] if system else []
    for turn in chat:
        pieces.append((f"{TURN_START}user\n{turn.user}{TURN_END}\n{TURN_START}assistant\n", False))
        pieces += [(f"{turn.answer}{TURN_END}", True), ("\n", False)]
    return _document(tokenizer, [*pieces, (END_OF_TEXT, False)])


def _document(tokenizer: PreTrainedTokenizerFast, pieces: list[tuple[str, bool]]) -> Document:
    encoded = [(tokenizer.encode(text), learned) for text, learned in pieces]
    ids = [i for piece, _ in encoded for i in piece]
    return ids, [i if learned else IGNORED for piece, learned in encoded for i in piece]


def documents(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Document]:
    rng = random.Random(seed)
    for system, chat in corpus.chats(seed):
        yield chat_document(tokenizer, system, chat)
        if rng.random() < PLAIN_SHARE:
            yield _document(tokenizer, [(corpus.plain(rng) + END_OF_TEXT, True)])


def batches(docs: Iterator[Document]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels), each int64[rows, length] without padding; every row starts where a document starts."""
    for step in itertools.count(1):
        rows, length = (1, LONG_ROW) if step % LONG_EVERY == 0 else (ROWS, ROW)
        packed = [_row(docs, length + 1) for _ in range(rows)]
        ids, labels = (torch.tensor(column) for column in zip(*packed, strict=True))
        yield ids[:, :-1], labels[:, 1:]


def _row(docs: Iterator[Document], length: int) -> Document:
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < length:
        more_ids, more_labels = next(docs)
        ids += more_ids
        labels += more_labels
    return ids[:length], labels[:length]


def new_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    sample = itertools.islice(corpus.chats(seed), 20_000)
    texts = [text for _, chat in sample for turn in chat for text in (turn.user, turn.answer)]
    return train_tokenizer([*texts, *corpus.SYSTEM_PROMPTS, "system", "user", "assistant"], VOCAB)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.05,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def loss_of(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learned = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), labels[learned])


def optimizer_of(model: Qwen3ForCausalLM, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def lr_factor(step: int, steps: int, warmup: int = 50) -> float:
    """Warm up, hold, then fall to zero over the last 40% of the steps."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (0.4 * steps))


def average_gradients(model: Qwen3ForCausalLM) -> None:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.view(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def train(model: Qwen3ForCausalLM, data: Iterator[tuple[Tensor, Tensor]], steps: int, lr: float) -> None:
    optimizer = optimizer_of(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    mean_loss, start = 0.0, time.monotonic()
    with Progress(disable=dist.get_rank() > 0) as progress:
        task = progress.add_task("training", total=steps)
        for step, (ids, labels) in enumerate(itertools.islice(data, steps), 1):
            loss = loss_of(model, ids, labels)
            loss.backward()
            average_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
            progress.update(task, advance=1, description=f"loss {mean_loss:.3f}")
            if step % 100 == 0 and dist.get_rank() == 0:
                clocks = f"{time.monotonic() - start:.0f} s, of this core {time.process_time():.0f} s"
                progress.print(f"step {step}/{steps}  loss {mean_loss:.3f}  {clocks}")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT]),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def worker(rank: int, args: argparse.Namespace, meeting_point: str) -> None:
    """One of the processes: the same model in each, other text in each."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # some kernels would leave both processes on one core
    torch.manual_seed(args.seed)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=args.processes)
    if args.start is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = new_tokenizer(args.seed)
        model = build_model(tokenizer)
    train(model, batches(documents(tokenizer, args.seed + rank)), args.steps, args.lr)
    if rank == 0:
        save(model, tokenizer, args.out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="go on from one, with its tokenizer")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, args=(args, f"{folder}/store"), nprocs=args.processes)


if __name__ == "__main__":
    main()
