"""Adapters in a running engine: each request its own, loaded and unloaded while others run, and nothing kept that should not be."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_core import Engine, demo
from sglang_core.errors import ConfigError, EngineDeadError, QueueFullError, RequestError

PROMPTS = ["The capital of France is", "Seven plus two is"]
GREEDY = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
SETTINGS: dict[str, Any] = {
    "model_path": "demo",
    "device": "cpu",
    "dtype": "float32",
    "in_process": True,
    "max_total_tokens": 4096,
    "log_level": "error",
}
RANK = 3


def write(folder: Path, seed: int, rank: int = RANK) -> Path:
    """A random adapter of the demo model's query and down projections, strong enough to change what it says."""
    folder.mkdir(exist_ok=True)
    weights = load_file(demo.path() / "model.safetensors")
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, w in weights.items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{module}.lora_A.weight"] = torch.randn(rank, w.shape[1], generator=g) * 0.3
            pairs[f"{module}.lora_B.weight"] = torch.randn(w.shape[0], rank, generator=g) * 0.3
    save_file(pairs, folder / "adapter_model.safetensors")
    config = f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}, "target_modules": ["q_proj", "down_proj"]}}'
    (folder / "adapter_config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: str(write(root / name, seed)) for seed, name in enumerate("abcd", 1)}


@pytest.fixture(scope="module")
def alone(paths: dict[str, str]) -> dict[str | None, list[list[int]]]:
    """Each adapter's answers in an engine that serves only it."""
    answers: dict[str | None, list[list[int]]] = {}
    for name, path in paths.items():
        with Engine(**SETTINGS, lora_paths={name: path}) as engine:
            answers[name] = ids(engine.generate(PROMPTS, GREEDY, lora_path=name))
    with Engine(**SETTINGS) as engine:
        answers[None] = ids(engine.generate(PROMPTS, GREEDY))
    return answers


@pytest.fixture
def engine(paths: dict[str, str]) -> Iterator[Engine]:
    with Engine(**SETTINGS, lora_paths={n: paths[n] for n in "ab"}, max_loras_per_batch=2, max_lora_rank=4) as engine:
        yield engine


def ids(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def test_each_request_of_a_batch_gets_its_own(engine: Engine, alone: dict[str | None, list[list[int]]]) -> None:
    assert len({str(answer) for answer in alone.values()}) == 5  # all differ
    names: list[str | None] = ["a", None, "b", "a"]
    got = ids(engine.generate([PROMPTS[0]] * 4, GREEDY, lora_path=names))
    assert got == [alone[name][0] for name in names]
    again = ids(engine.generate([PROMPTS[0]] * 4, GREEDY, lora_path=names))  # prefixes are cached now, and not shared
    assert again == got


def test_more_adapters_than_slots_take_turns(
    engine: Engine, paths: dict[str, str], alone: dict[str | None, list[list[int]]]
) -> None:
    for name in "cd":
        engine.load_lora_adapter(name, paths[name])
    names: list[str | None] = [*"abcd", None] * 4
    got = ids(engine.generate([PROMPTS[0]] * len(names), GREEDY, lora_path=names))
    assert got == [alone[name][0] for name in names]
    stats = engine.stats()
    assert stats["lora_adapters"] == 4 and stats["lora_adapters_on_device"] == 2 and stats["lora_slot_writes"] >= 4
    for name in "abcd":  # evicted and written again, the same tokens
        assert ids(engine.generate(PROMPTS, GREEDY, lora_path=name)) == alone[name]


def test_other_weights_under_a_name_share_no_prefix(
    engine: Engine, paths: dict[str, str], alone: dict[str | None, list[list[int]]]
) -> None:
    prompt = " ".join(PROMPTS) * 4
    first = engine.generate(prompt, GREEDY, lora_path="a")
    cached = engine.generate(prompt, GREEDY, lora_path="a")
    assert cached["meta_info"]["cached_tokens"] > 0 and cached["output_ids"] == first["output_ids"]
    assert engine.generate(prompt, GREEDY, lora_path="b")["meta_info"]["cached_tokens"] == 0
    assert engine.generate(prompt, GREEDY)["meta_info"]["cached_tokens"] == 0
    engine.load_lora_adapter("a", paths["c"])
    other = engine.generate(prompt, GREEDY, lora_path="a")
    assert other["meta_info"]["cached_tokens"] == 0 and other["output_ids"] != first["output_ids"]
    assert ids(engine.generate(PROMPTS, GREEDY, lora_path="a")) == alone["c"]
    engine.load_lora_adapter("a", paths["a"])  # the first weights again: what was cached with them is right again
    assert engine.generate(prompt, GREEDY, lora_path="a")["meta_info"]["cached_tokens"] > 0


def test_loads_and_unloads_leave_running_requests_alone(
    engine: Engine, paths: dict[str, str], alone: dict[str | None, list[list[int]]]
) -> None:
    long = GREEDY | {"max_new_tokens": 120}
    want = {name: engine.generate(PROMPTS[0], long, lora_path=name)["output_ids"] for name in ("a", None)}
    got: dict[str | None, Any] = {}
    threads = [
        threading.Thread(target=lambda n=name: got.update({n: engine.generate(PROMPTS[0], long, lora_path=n)}))
        for name in ("a", None)
    ]
    for thread in threads:
        thread.start()
    for _ in range(3):
        engine.load_lora_adapter("c", paths["c"])
        assert ids(engine.generate(PROMPTS, GREEDY, lora_path="c")) == alone["c"]
        engine.unload_lora_adapter("c")
        with pytest.raises(RequestError, match="loaded: a, b"):
            engine.generate(PROMPTS, GREEDY, lora_path="c")
    for thread in threads:
        thread.join(60)
    assert {name: answer["output_ids"] for name, answer in got.items()} == want


def test_unload_waits_for_the_last_request(engine: Engine) -> None:
    stream = engine.generate(PROMPTS[0], GREEDY | {"max_new_tokens": 200}, stream=True, lora_path="a")
    next(stream)
    unloaded = threading.Thread(target=engine.unload_lora_adapter, args=("a",))
    unloaded.start()
    seen = sum(1 for _ in stream)
    unloaded.join(60)
    assert seen > 50 and not unloaded.is_alive()
    assert engine.stats()["lora_adapters"] == 1 and engine.stats()["lora_adapters_on_device"] <= 1
    with pytest.raises(RequestError, match="not loaded"):
        engine.unload_lora_adapter("a")


def test_a_load_that_fails_changes_nothing(
    engine: Engine, paths: dict[str, str], alone: dict[str | None, list[list[int]]], tmp_path: Path
) -> None:
    before = engine.stats()
    (write(tmp_path / "short", 0) / "adapter_model.safetensors").write_bytes(b"x" * 100)
    for path, said in {
        str(tmp_path / "nowhere"): "no folder here",
        str(tmp_path / "short"): "no whole safetensors file",
        str(write(tmp_path / "large", 0, rank=5)): "--max-lora-rank 5",
    }.items():
        for name in ("a", "new"):
            with pytest.raises(RequestError, match=said):
                engine.load_lora_adapter(name, path)
    with pytest.raises(RequestError, match="lora_name"):
        engine.load_lora_adapter("a@2", paths["a"])
    assert engine.stats()["lora_adapters"] == before["lora_adapters"] == 2
    assert ids(engine.generate(PROMPTS, GREEDY, lora_path="a")) == alone["a"]


def test_host_memory_is_bounded_and_comes_back(
    paths: dict[str, str], alone: dict[str | None, list[list[int]]], tmp_path: Path
) -> None:
    first = {"a": paths["a"], "own": str(write(tmp_path / "own", 7))}
    with Engine(**SETTINGS, lora_paths=first, max_loras_per_batch=1, max_loaded_loras=2, max_lora_rank=4) as engine:
        own = ids(engine.generate(PROMPTS, GREEDY, lora_path="own"))
        for name in "bc":
            engine.load_lora_adapter(name, paths[name])
            assert engine.stats()["lora_adapters_in_host_memory"] == 2
        for name in "abc":  # read again where it had left
            assert ids(engine.generate(PROMPTS, GREEDY, lora_path=name)) == alone[name]
        assert ids(engine.generate(PROMPTS, GREEDY, lora_path="own")) == own
        for name in "bc":
            engine.generate(PROMPTS, GREEDY, lora_path=name)
        write(tmp_path / "own", 8)
        with pytest.raises(RequestError, match="changed on disk"):
            engine.generate(PROMPTS, GREEDY, lora_path="own")
        stream = [engine.generate(PROMPTS[0], GREEDY | {"max_new_tokens": 300}, stream=True, lora_path=n) for n in "bc"]
        for each in stream:
            if each is stream[0]:
                next(each)
        waits = threading.Thread(target=_drain, args=(stream[1],), daemon=True)
        waits.start()
        while engine.stats()["waiting"] < 1:
            pass
        with pytest.raises(QueueFullError, match="--max-loaded-loras"):
            engine.load_lora_adapter("d", paths["d"])


def _drain(stream: Iterator[Any]) -> None:
    with contextlib.suppress(EngineDeadError):
        list(stream)


def test_input_logprobs_and_penalties_go_with_an_adapter(engine: Engine) -> None:
    def scored(name: str | None) -> Any:
        params = {"temperature": 0, "max_new_tokens": 4, "frequency_penalty": 0.5}
        answer = engine.generate(PROMPTS[0], params, return_logprob=True, logprob_start_len=0, lora_path=name)
        return answer["meta_info"]["input_token_logprobs"]

    assert scored("a") != scored(None) and scored("a") == scored("a")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"enable_lora": True}, "--max-lora-rank and --lora-target-modules"),
        ({"lora_paths": ["x="]}, "NAME=PATH"),
        ({"lora_paths": ["a=PATH", "a=PATH"]}, "given twice"),
        ({"lora_paths": ["a=PATH"], "max_lora_rank": 2}, "--max-lora-rank 3"),
        ({"lora_paths": ["a=PATH"], "max_loaded_loras": 3}, "at least 8"),
        ({"lora_paths": ["a=PATH"], "lora_target_modules": ["k_proj"]}, "takes no adapter"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: str, paths: dict[str, str]) -> None:
    if "lora_paths" in settings:
        settings = settings | {"lora_paths": [entry.replace("PATH", paths["a"]) for entry in settings["lora_paths"]]}
    with pytest.raises(ConfigError, match=said):
        Engine(**SETTINGS, **settings).shutdown()


def test_room_without_adapters_and_no_room_at_all(
    paths: dict[str, str], alone: dict[str | None, list[list[int]]]
) -> None:
    room = {"enable_lora": True, "max_lora_rank": 4, "lora_target_modules": ["all"], "max_loras_per_batch": 1}
    with Engine(**SETTINGS, **room) as engine:
        assert ids(engine.generate(PROMPTS, GREEDY)) == alone[None]
        engine.load_lora_adapter("d", paths["d"])
        assert ids(engine.generate(PROMPTS, GREEDY, lora_path="d")) == alone["d"]
    with Engine(**SETTINGS) as engine, pytest.raises(RequestError, match="--enable-lora"):
        engine.load_lora_adapter("d", paths["d"])


def test_steps_keep_the_rules_on_the_strict_backend(
    paths: dict[str, str], alone: dict[str | None, list[list[int]]]
) -> None:
    """Traced bucket by bucket, undeclared writes refused, freed pages poisoned."""
    strict = SETTINGS | {"device": "strict", "max_total_tokens": 512, "context_length": 64, "max_running_requests": 4}
    with Engine(**strict, lora_paths={"a": paths["a"]}, max_loras_per_batch=1, max_lora_rank=4) as engine:
        engine.load_lora_adapter("b", paths["b"])
        got = ids(engine.generate([PROMPTS[0]] * 3, GREEDY, lora_path=["a", None, "b"]))
    assert got == [alone[name][0] for name in ("a", None, "b")]


def test_two_ranks_load_and_run_the_same(paths: dict[str, str], alone: dict[str | None, list[list[int]]]) -> None:
    """In processes of their own: rank 1 hears of an adapter, reads it, and has it before the first step that needs it."""
    ranks = SETTINGS | {"in_process": False, "tp_size": 2, "lora_paths": {"a": paths["a"]}, "max_loras_per_batch": 1}
    with Engine(**ranks, max_lora_rank=4) as engine:
        engine.load_lora_adapter("b", paths["b"])
        names: list[str | None] = ["a", None, "b"]
        assert ids(engine.generate([PROMPTS[0]] * 3, GREEDY, lora_path=names)) == [alone[name][0] for name in names]
        engine.unload_lora_adapter("b")
        engine.load_lora_adapter("b", paths["c"])
        assert ids(engine.generate(PROMPTS, GREEDY, lora_path="b")) == alone["c"]
