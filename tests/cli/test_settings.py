"""Flags and YAML from the config's fields: nothing is forgotten, and the user's word wins in the right order."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_core.cli.settings import flag_names
from sglang_core.cli.sglang_flags import UNSUPPORTED, why_unsupported
from sglang_core.config import EngineConfig, all_settings, setting_type

from .conftest import Cli, Outcome

Serve = Callable[..., EngineConfig]


@pytest.fixture
def serve(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """`serve(*argv)` -> the config that the server would start with."""
    got: list[EngineConfig] = []

    def fake(config: EngineConfig) -> int:
        got.append(config)
        return 0

    module = types.ModuleType("sglang_core.server.run")
    module.serve = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang_core.server.run", module)

    def run(*argv: str) -> EngineConfig:
        outcome = cli("serve", *argv)
        assert outcome.status == 0, outcome.err
        return got.pop()

    return run


def sample(branch: str, spec: Any) -> tuple[str, Any]:
    """A value for a setting that is not its default, as text and as it should arrive."""
    kind, _, repeated = setting_type(branch, spec.name)
    if spec.metadata["choices"]:
        text = next(
            c for c in spec.metadata["choices"][::-1] if c != spec.default or len(spec.metadata["choices"]) == 1
        )
        return text, text
    low = spec.metadata["low"] or 0
    value: Any = {str: "x", int: int(low) + 7, float: 0.5}[kind]
    return str(value), (value,) if repeated else value


@pytest.mark.parametrize(("branch", "spec"), list(all_settings()), ids=lambda x: getattr(x, "name", x))
def test_every_setting_has_a_flag_that_works(serve: Serve, branch: str, spec: Any) -> None:
    model = [] if spec.name == "model_path" else ["--model-path", "demo"]
    for name in flag_names(spec):
        if setting_type(branch, spec.name)[0] is bool:
            assert serve(*model, name).flat()[spec.name] is True
            assert serve(*model, f"--no-{name[2:]}").flat()[spec.name] is False
        else:
            text, value = ("demo", "demo") if spec.name == "model_path" else sample(branch, spec)
            assert serve(*model, name, text).flat()[spec.name] == value
            assert serve(*model, f"{name}={text}").flat()[spec.name] == value


def test_what_is_not_said_stays_at_its_default(serve: Serve) -> None:
    assert serve("--model-path", "demo") == EngineConfig.from_flat(model_path="demo")


def test_repeated_flags_add_up(serve: Serve) -> None:
    config = serve("--model", "demo", "--kernel", "a.b=x", "--kernel", "c.d=y")
    assert config.device.kernel == ("a.b=x", "c.d=y")


def test_negative_values_are_values(serve: Serve) -> None:
    assert serve("--model", "demo", "--chunked-prefill-size", "-1").schedule.chunked_prefill_size == -1


def test_sglang_launch_lines_carry_over(serve: Serve) -> None:
    """The flags that issue 2 names, as SGLang spells them."""
    line = (
        "--model-path demo --tokenizer-path demo --served-model-name m --device cpu --dtype bfloat16 --context-length 512"
        " --mem-fraction-static 0.5 --max-running-requests 8 --max-total-tokens 4096 --chunked-prefill-size 256"
        " --page-size 16 --schedule-policy fcfs --disable-radix-cache --disable-overlap-schedule --chat-template t.jinja"
        " --api-key k --admin-api-key a --load-format dummy --trust-remote-code --random-seed 3 --log-level info"
        " --enable-metrics --skip-tokenizer-init --tp 2 --host 0.0.0.0 --port 30001"
    )
    config = serve(*line.split())
    assert (config.server.port, config.parallel.tp_size, config.cache.disable_radix_cache) == (30001, 2, True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--port 99999", "--port 99999 must be between 0 and 65535"),
        ("--page-size 0", "--page-size 0 must be between 1 and 1024"),
        ("--port abc", "--port abc must be int"),
        ("--mem-fraction-static 2", "--mem-fraction-static 2.0 must be between 0.01 and 1.0"),
        (
            "--dtype float23",
            "--dtype 'float23' is not one of auto, float32, bfloat16, float16; did you mean 'float32'?",
        ),
    ],
)
def test_values_out_of_bounds_name_the_flag(cli: Cli, argv: str, words: str) -> None:
    outcome = cli("serve", "--model-path", "demo", *argv.split())
    assert (outcome.status, outcome.err) == (2, f"sglang-core serve: error: {words}\n")


# YAML


def with_yaml(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_yaml_takes_kebab_snake_alias_and_sections(serve: Serve, tmp_path: Path) -> None:
    text = "model: demo\npage-size: 32\ndisable_radix_cache: true\ntp: 2\nserver:\n  port: 1234\nkernel: [a.b=c]\n"
    config = serve(*with_yaml(tmp_path, text))
    assert config == EngineConfig.from_flat(
        model_path="demo", page_size=32, disable_radix_cache=True, tp_size=2, port=1234, kernel=("a.b=c",)
    )


def test_sections_may_be_named_as_settings_are(serve: Serve, tmp_path: Path) -> None:
    config = serve(*with_yaml(tmp_path, "model: {model-path: demo}\ndevice: {device: cpu}\n"))
    assert (config.model.model_path, config.device.device) == ("demo", "cpu")
    assert serve(*with_yaml(tmp_path, "model: demo\ndevice: cpu\n")) == config


def test_flags_win_over_the_file(serve: Serve, tmp_path: Path) -> None:
    file = with_yaml(tmp_path, "model-path: demo\nport: 1\npage-size: 8\ndisable-radix-cache: true\n")
    config = serve(*file, "--port", "2", "--no-disable-radix-cache")
    assert (config.server.port, config.cache.page_size, config.cache.disable_radix_cache) == (2, 8, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pagesize: 8", "unknown setting 'pagesize'; did you mean page-size?"),
        ("port: 1\nserver: {port: 2}", "port is set twice"),
        ("tp: 1\ntp-size: 2", "tp_size is set twice"),
        ("[1, 2]", "must hold `name: value` lines, not a list"),
        ("a: [", "cannot be read"),
        ("attention-backend: fa3", "use --kernel attn.paged=PROVIDER"),
        ("port: high", "port='high' must be int, not str"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(cli: Cli, tmp_path: Path, text: str, words: str) -> None:
    outcome = cli("serve", "--model-path", "demo", *with_yaml(tmp_path, text))
    assert outcome.status == 2
    assert words in outcome.err


def test_a_missing_file_is_named(cli: Cli) -> None:
    assert "--config nowhere.yaml cannot be read" in cli("serve", "--config", "nowhere.yaml").err


# SGLang's other flags


def test_flags_we_lack_are_flags_we_lack() -> None:
    ours = {name for _, spec in all_settings() for name in flag_names(spec)}
    assert not ours & set(UNSUPPORTED)


@pytest.mark.parametrize(
    "flag", ["--attention-backend", "--disable-cuda-graph", "--speculative-algorithm", "--pp-size"]
)
def test_an_sglang_flag_we_lack_says_so(cli: Cli, flag: str) -> None:
    for argv in ([flag, "x"], [f"{flag}=x"]):
        outcome = cli("serve", "--model-path", "demo", *argv)
        assert outcome.status == 2
        assert f"{flag} is an SGLang flag that sglang-core does not have: {UNSUPPORTED[flag]}" in outcome.err


def test_a_word_that_is_no_sglang_flag_is_not_taken_for_one() -> None:
    assert why_unsupported("--nonsense") is None


# Model paths


def model_error(cli: Cli, path: str) -> Outcome:
    outcome = cli("serve", "--model-path", path)
    assert outcome.status == 2
    return outcome


def test_no_model_asks_for_one(cli: Cli) -> None:
    outcome = cli("serve")
    assert outcome.status == 2
    assert "give --model-path" in outcome.err


def test_slips_of_the_pen_are_seen(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "models" / "qwen3-8b"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    assert "did you mean demo?" in model_error(cli, "demp").err
    assert "did you mean ./models/qwen3-8b?" in model_error(cli, "./models/qwen-8b").err
    assert f"did you mean {model}?" in model_error(cli, f"{model}b").err
    assert "models has no such folder" in model_error(cli, "./models/zzz").err
    assert "neither does /no" in model_error(cli, "/no/where").err
    monkeypatch.chdir(tmp_path / "models")
    assert "did you mean qwen3-8b?" in model_error(cli, "qwen3-8").err


def test_hub_ids_pass(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-4B").mkdir(parents=True)  # near, but the hub may well have the other
    (tmp_path / "gpt3").mkdir()  # no model
    for name in ("Qwen/Qwen3-8B", "gpt2"):
        assert serve("--model-path", name).model.model_path == name
