"""Train the demo adapter: a LoRA of the demo model that answers in capitals. Needs the `dev` extra, for peft.

    python tools/demo_adapter/train.py --out sglang_core/demo/adapters/capitals

The questions are those of the demo model's corpus, the answers too, but in capitals: the model has to spell what it otherwise says in
whole words. Takes about six minutes of one CPU core. The same seed and library versions give the same adapter up to the last bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import peft
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "demo_model"))

import corpus  # noqa: E402
from train import Document, batches, chat_document, loss_of, lr_factor  # noqa: E402  # the demo model's

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_BYTES = 500_000


def documents(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Document]:
    for system, chat in corpus.chats(seed):
        yield chat_document(tokenizer, system, [replace(turn, answer=turn.answer.upper()) for turn in chat])


def adapted(base: Path, rank: int) -> peft.PeftModel:
    """The demo model in float32 with a fresh adapter on every linear layer and the head."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, use_rslora=True, target_modules=[*LINEAR, "lm_head"], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def train(model: peft.PeftModel, docs: Iterator[Document], steps: int, lr: float) -> float:
    """-> the mean loss of late steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    mean_loss = 0.0
    with Progress() as progress:
        task = progress.add_task("training", total=steps)
        for step, (ids, labels) in enumerate(itertools.islice(batches(docs), steps), 1):
            loss = loss_of(model.base_model.model, ids, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
            progress.update(task, advance=1, description=f"loss {mean_loss:.3f}")
            if step % 100 == 0:
                progress.print(f"step {step}/{steps}  loss {mean_loss:.4f}")
    return mean_loss


def save(model: peft.PeftModel, out: Path) -> None:
    """PEFT's two files, the matrices in bfloat16."""
    card = out / "README.md"
    text = card.read_text() if card.exists() else None
    model.save_pretrained(out, save_embedding_layers=False)
    card.unlink(missing_ok=True)  # PEFT's template; the card is written by hand
    if text is not None:
        card.write_text(text)
    weights = out / "adapter_model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    config = out / "adapter_config.json"
    facts = json.loads(config.read_text()) | {"base_model_name_or_path": "demo"}
    facts["target_modules"].sort()  # a set in memory: its order differs from run to run
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    if (size := weights.stat().st_size) > MAX_BYTES:
        raise SystemExit(f"{weights} has {size} bytes, more than {MAX_BYTES}; choose a smaller --rank")
    print(f"{weights}: {size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=ROOT / "sglang_core" / "demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=13)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = adapted(args.base, args.rank)
    train(model, documents(tokenizer, args.seed), args.steps, args.lr)
    save(model, args.out)


if __name__ == "__main__":
    main()
