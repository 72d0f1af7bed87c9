"""Two ranks over gloo give the logits of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.models.tiny import reference
from tests.models.tp_worker import logits

ROOT = Path(__file__).parents[2]
# One with a KV head for each rank and tied embeddings, one with a KV head for both and every bias, one fused, one Gemma.
CASES = (
    "qwen3",
    "llama-mqa",
    "phi3",
    "gemma2",
    "deepseek-v2",
    "deepseek-v3",
    "mixtral",
    "qwen2-moe",
    "gpt-oss",
    "qwen3-next",
)
DEALT = (
    "deepseek-v3",
    "mixtral",
    "gpt-oss",
)  # with whole experts on each rank: shared ones beside, none, biases in stacks
BOUND = 1e-5


def test_two_ranks_give_the_logits_of_one(checkpoints: Path, tmp_path: Path) -> None:
    cases = [f"{case}:1" for case in CASES] + [f"{case}:2" for case in DEALT]
    folders = {case: reference(case, checkpoints).folder for case in CASES}
    asked = [f"{folders[name]}:{ep_size}" for name, ep_size in (case.split(":") for case in cases)]
    out = tmp_path / "logits.safetensors"
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    args = [sys.executable, str(Path(__file__).with_name("tp_worker.py"))]
    ranks = [
        subprocess.Popen(
            [*args, str(rank), "2", str(tmp_path / "store"), str(out), *asked],
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
    one = {name: logits(folder, None) for name, folder in folders.items()}
    for case in cases:
        alone = one[case.split(":")[0]]
        scale = max(1.0, float(alone.abs().max()))
        assert float((shared[case] - alone).abs().max()) < BOUND * scale, case
