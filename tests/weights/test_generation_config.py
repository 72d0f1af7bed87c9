from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sglang_core.weights.generation_config import read_generation_config


def write(folder: Path, **settings: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_known_settings_are_read(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    folder = write(tmp_path, temperature=0.6, top_p=0.95, top_k=0, eos_token_id=[1, 2], do_sample=True, min_p=None, x=1)
    assert read_generation_config(folder) == {"temperature": 0.6, "top_p": 0.95, "top_k": -1, "eos_token_id": [1, 2]}


def test_senseless_values_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, temperature=-1, top_p="high", repetition_penalty=True, eos_token_id=[2, -3], top_k=20)
    with caplog.at_level(logging.WARNING):
        assert read_generation_config(folder) == {"top_k": 20}
    assert "temperature=-1" in caplog.text and "eos_token_id" in caplog.text
