"""Peak memory of loading a bfloat16 checkpoint that is quantised on the way, over the size of its files.

    python benchmarks/quant/load_peak.py [--layers 12] [--hidden 2048] [--experts 0] [--quantization none,fp8,int8,int4]
                                          [--backend cpu|xeon] [--packed-cache] [--json FILE]

With --packed-cache every format is loaded twice more: once writing its packed weights, once reading them ("kept").

Writes a random checkpoint, then loads it in a fresh process for each format and samples RssAnon of /proc/self/status: memory
that belongs to the process and that only swap could take back. The pages of the mapped files (RssFile) are the kernel's
cache: clean, shared with whoever else reads the files, and dropped whenever something needs the room; they are reported
beside it and not counted. What the process held before loading is subtracted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_core.backend.discovery import find_backend
from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.selection import OpTable
from sglang_core.layers.build import BuildContext, bind_model
from sglang_core.layers.quant_config import ONLINE, online_quant_config
from sglang_core.models.registry import create_model, model_class
from sglang_core.ops import OPS
from sglang_core.weights.checkpoint import read_config
from sglang_core.weights.dummy import dummy_part
from sglang_core.weights.loader import Wants, load_model
from sglang_core.weights.packed_cache import PackedCache

SHARD = 400 << 20  # bytes of a file, about
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0: a dense model")
    parser.add_argument("--quantization", default="none,fp8,int8,int4")
    parser.add_argument("--backend", choices=("cpu", "xeon"), default="cpu", help="xeon packs every weight as it loads")
    parser.add_argument(
        "--packed-cache", action="store_true", help="also with packed weights kept on disk, as a later start"
    )
    parser.add_argument("--kept", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "FORMAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], args.backend, args.kept)))
        return
    facts = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(folder, config(args.layers, args.hidden, args.experts))
        print(f"{size / MIB:,.0f} MiB of bfloat16 in {len(list(folder.glob('*.safetensors')))} files")
        print(f"{'format':10} {'held':>8} {'peak':>8} {'peak / file':>12} {'mapped files, peak':>20} {'seconds':>8}")
        kept = ("--kept", f"{name}/kept")
        ways: list[tuple[str, tuple[str, ...]]] = [("", ())]
        if args.packed_cache:
            ways += [(" first", kept), (" kept", kept)]
        for fmt in args.quantization.split(","):
            for label, options in ways:
                row = in_a_process("--measure", name, fmt, "--backend", args.backend, *options) | {"file": size}
                facts[fmt + label] = row | {"ratio": row["peak"] / size}
                sizes = " ".join(f"{row[key] / MIB:7,.0f}M" for key in ("held", "peak"))
                mapped = f"{row['mapped'] / MIB:19,.0f}M"
                print(f"{fmt + label:10} {sizes} {row['peak'] / size:12.2f} {mapped} {row['seconds']:8.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps(facts, indent=2) + "\n")


def in_a_process(*arguments: str) -> dict[str, float]:
    """What `measure` gives in a fresh process."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def config(layers: int, hidden: int, experts: int) -> dict[str, object]:
    """Llama's proportions; head and embedding are 13% of Llama-3-8B too."""
    common = {
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "vocab_size": max(256, hidden * layers // 2),
        "max_position_embeddings": 2048,
    }
    if not experts:
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "intermediate_size": hidden * 11 // 4,
        }
    width = max(128, hidden * 11 // 4 // experts // 128 * 128)
    return common | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": hidden,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": 2,
    }


def write_checkpoint(folder: Path, config: dict[str, object]) -> int:
    """Files as hubs have them, shard by shard. Gives their bytes."""
    (folder / "config.json").write_text(json.dumps(config))
    model = create_model(config)
    bind_model(model, context())
    shard: dict[str, torch.Tensor] = {}
    total, files = 0, 0
    specs = list(Wants(model).distinct())
    for i, spec in enumerate(specs):
        shard[spec.name] = torch.cat(dummy_part(spec, 0), dim=spec.dim).bfloat16().contiguous()
        size = sum(t.nbytes for t in shard.values())
        if size >= SHARD or i == len(specs) - 1:
            save_file(shard, folder / f"model-{files:05}.safetensors")
            total, files, shard = total + size, files + 1, {}
    return total


def context(name: str = "cpu") -> BuildContext:
    """In bfloat16. Quantised weights stay packed: on the reference backend no kernel wants them otherwise, xeon takes them all."""
    backend = find_backend(name)
    return BuildContext(
        table=OpTable(backend.probe()[0], backend, ops=OPS, page_size=16),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        context_length=2048,
        page_size=16,
    )


def measure(folder: Path, fmt: str, backend: str, kept: str | None = None) -> dict[str, float]:
    """Load in this process, with packed weights in `kept` where given -> bytes held afterwards and at the peak, and those of mapped files, and the time."""
    hf_config = read_config(folder)
    cls = model_class(hf_config)
    cfg = cls.read_config(hf_config)
    if fmt != "none":
        assert fmt in ONLINE, f"{fmt}: there are none, {', '.join(ONLINE)}"
        cfg = cfg.replace(quantization=online_quant_config(fmt, None))
    model, ctx = cls(cfg), context(backend)
    found = find_backend(backend)
    runtime = found.create_runtime(RuntimeContext(devices=tuple(found.probe()[:1])))
    cache = None if kept is None else PackedCache(Path(kept), runtime.alloc_packed)
    bind_model(model, ctx)
    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()  # what libraries allocate once
    before, start = memory()["RssAnon"], time.monotonic()
    with Peak() as peak:
        load_model(model, folder, ctx, progress=False, packed_cache=cache)
    seconds = time.monotonic() - start
    return {
        "held": memory()["RssAnon"] - before,
        "peak": peak.anonymous - before,
        "mapped": peak.mapped,
        "seconds": seconds,
    }


class Peak:
    """Samples this process' memory from a thread of its own, every millisecond or so."""

    def __enter__(self) -> Peak:
        self.anonymous = self.mapped = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            now = memory()
            self.anonymous, self.mapped = max(self.anonymous, now["RssAnon"]), max(self.mapped, now["RssFile"])


def memory() -> dict[str, int]:
    """RssAnon and RssFile, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in lines if words[0] in ("RssAnon:", "RssFile:")}


if __name__ == "__main__":
    main()
