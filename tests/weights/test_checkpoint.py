from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

from sglang_core import demo
from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import WeightSpec
from sglang_core.weights import checkpoint
from sglang_core.weights.checkpoint import INDEX, Checkpoint, open_file, read_config, resolve_folder


def spec(dim: int, *ranges: tuple[int, int]) -> WeightSpec:
    return WeightSpec(name="w", shape=(6, 4), dtype=torch.float32, dim=dim, ranges=ranges or None)


def test_folders_the_demo_and_files(tmp_path: Path) -> None:
    assert resolve_folder(str(tmp_path)) == tmp_path
    assert read_config(resolve_folder("demo"))["model_type"] == "qwen3"
    assert resolve_folder("demo") == demo.path()
    with pytest.raises(ConfigError, match="is a file; give the folder"):
        resolve_folder(str(Path(demo.path()) / "config.json"))


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "a/b/c", "..", "name with space"])
def test_what_is_no_folder_and_no_hub_id(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if path == "..":
        path = "../nowhere"
    with pytest.raises(ConfigError, match="is no folder here and no hub id"):
        resolve_folder(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "hub cannot be reached.*HF_HUB_OFFLINE.*hf download owner/name"),
        (OSError("no network"), "hub cannot be reached"),
        (RepositoryNotFoundError, "no such model .or it is private: set HF_TOKEN"),
        (GatedRepoError, "is gated: accept its terms"),
        (RevisionNotFoundError, "no such revision on the hub; set --revision"),
    ],
)
def test_hub_failures_say_what_to_do(
    error: Exception | type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(error, type):
        error = error("no", response=httpx.Response(404, request=httpx.Request("GET", "http://hub")))

    def fetch(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    with pytest.raises(ConfigError, match=message):
        resolve_folder("owner/name", "main")


def test_only_data_is_fetched_and_weights_only_where_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fetch(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert "consolidated*" in ignore_patterns
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    resolve_folder("owner/name")
    resolve_folder("owner/name", weights=False)
    assert "*.safetensors" in asked[0]
    assert set(asked[0]) - set(asked[1]) == {"*.safetensors"}
    assert not {"*.py", "*.bin", "*.pt"} & set(asked[0])


def test_a_part_is_read_as_ranges(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    with open_file(tmp_path / "model.safetensors") as f:
        assert torch.equal(torch.cat(f.read("w", spec(0, (1, 2), (4, 6)))), whole[[1, 4, 5]])
        assert torch.equal(f.read("w", spec(1, (2, 4)))[0], whole[:, 2:])
        assert torch.equal(f.read("w", spec(0))[0], whole)


def test_shards_are_read_in_file_order(tmp_path: Path) -> None:
    save_file({"b": torch.ones(2), "a": torch.ones(5)}, tmp_path / "model-00001.safetensors")
    save_file({"c": torch.ones(3, 2)}, tmp_path / "model-00002.safetensors")
    save_file({"stray": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    weight_map = {"a": "model-00001.safetensors", "b": "model-00001.safetensors", "c": "model-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = Checkpoint.open(tmp_path)
    assert "stray" not in found.tensors
    assert [sorted(names) for _, names in found.by_file()] == [["a", "b"], ["c"]]
    assert found.tensors["c"].shape == (3, 2)
    (tmp_path / "model-00002.safetensors").unlink()
    with pytest.raises(WeightError, match=r"lacks 1 of 2 shards, first model-00002.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_names_files_of_its_folder_only(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightError, match="is no safetensors file of its folder"):
        Checkpoint.open(tmp_path)


def test_pickles_are_refused_and_the_fix_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(WeightError, match=r"pytorch_model.bin: pickles can run code.*save_pretrained"):
        Checkpoint.open(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-40])
    with pytest.raises(WeightError, match=r"model.safetensors is no whole safetensors file"):
        Checkpoint.open(tmp_path)
    with pytest.raises(WeightError, match=r"has no config.json"):
        read_config(tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightError, match="config.json"):
            read_config(tmp_path)
