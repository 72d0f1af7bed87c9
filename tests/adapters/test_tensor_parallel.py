"""Two ranks over gloo, each with its part of every pair, give the logits of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.adapters.peft_adapters import save
from tests.adapters.test_parity import save_expert_adapter
from tests.adapters.tp_worker import logits
from tests.models.tiny import reference

ROOT = Path(__file__).parents[2]
BOUND = 1e-5


def test_two_ranks_give_the_logits_of_one(checkpoints: Path, tmp_path: Path) -> None:
    cases = [("llama3", "whole"), ("llama3", "embeddings"), ("qwen3", "rslora"), ("qwen3-next", "delta net")]
    pairs = []
    for case, name in cases:
        folder, _ = save(case, name, tmp_path / f"{case}-{name}")
        pairs.append(f"{reference(case, checkpoints).folder}:{folder}:1")
    base = reference("qwen3-moe", checkpoints).folder
    experts, *_ = save_expert_adapter(base, tmp_path / "experts")
    pairs += [f"{base}:{experts}:{ep_size}" for ep_size in (1, 2)]
    out = tmp_path / "logits.safetensors"
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    args = [sys.executable, str(Path(__file__).with_name("tp_worker.py"))]
    ranks = [
        subprocess.Popen(
            [*args, str(rank), "2", str(tmp_path / "store"), str(out), *pairs],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    shared = load_file(out)
    for pair in pairs:
        alone = logits(*pair.split(":")[:2], "1", None)
        scale = max(1.0, float(alone.abs().max()))
        assert float((shared[pair] - alone).abs().max()) < BOUND * scale, pair
