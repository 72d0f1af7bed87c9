"""`Checkpoint`: a folder with config.json and safetensors files, local or fetched from the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sglang_core import demo
from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import WeightSpec

FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # never a pickle, never code
LEFT = ["consolidated*", "*/*"]  # the same weights once more, in another format
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}  # quantised: never cast


def resolve_folder(model_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: a local one, the embedded demo, or a hub id (fetched where it is not cached).

    Raises ConfigError with the way out where there is none. Without `weights`, only the small files are fetched.
    """
    if model_path == "demo":
        return Path(demo.path())
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".json" and folder.is_file() and not weights:
        return folder
    if folder.exists():
        raise ConfigError(f"model_path={model_path!r} is a file; give the folder that holds it and config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path) or model_path.startswith("."):
        raise ConfigError(f"model_path={model_path!r} is no folder here and no hub id (owner/name)")
    return fetch(model_path, revision, [p for p in FETCHED if weights or p != "*.safetensors"])


def fetch(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    at = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=LEFT))
    except GatedRepoError as e:
        raise ConfigError(
            f"{at} is gated: accept its terms on its hub page, then set HF_TOKEN to a token that may read it"
        ) from e
    except RevisionNotFoundError as e:
        raise ConfigError(f"{at}: no such revision on the hub; set --revision") from e
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise ConfigError(
            f"{at} is no folder here and the hub has no such model (or it is private: set HF_TOKEN); check --model-path"
        ) from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ConfigError(
            f"{at} is not in the local hub cache and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set): "
            f"fetch it where there is a network with `hf download {repo_id}`, or give --model-path a local folder"
        ) from e


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises WeightError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise WeightError(f"{path.parent} has no {path.name}; it must hold a model in Hugging Face format") from e
    except (OSError, ValueError) as e:
        raise WeightError(f"{path} cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise WeightError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json; `folder` may also be such a file itself, for random weights."""
    return read_json(folder if folder.is_file() else folder / "config.json")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is, from the file's header; no byte of it has been read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "BF16"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The safetensors files of a folder. Iterating gives names in file order, so that reading is sequential."""

    folder: Path
    tensors: dict[str, TensorEntry] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read every file's header. Raises WeightError for pickles, missing shards and broken files."""
        tensors: dict[str, TensorEntry] = {}
        for file in _weight_files(folder):
            with opened(file) as f:
                for name in f.offset_keys():
                    view = f.get_slice(name)
                    tensors[name] = TensorEntry(file, tuple(view.get_shape()), view.get_dtype())
        return cls(folder, tensors)

    def by_file(self) -> Iterator[tuple[Path, list[str]]]:
        files: dict[Path, list[str]] = {}
        for name, entry in self.tensors.items():
            files.setdefault(entry.file, []).append(name)
        yield from files.items()


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise WeightError(f"{file} is no whole safetensors file ({e}); download it again") from e


@contextmanager
def open_file(file: Path) -> Iterator[WeightFile]:
    """One memory-mapped file."""
    with opened(file) as f:
        yield WeightFile(f)


class WeightFile:
    """Reads parts of tensors: only the pages of the file that a part lies on are touched."""

    def __init__(self, f: Any) -> None:
        self._f = f

    def read(self, name: str, spec: WeightSpec) -> list[Tensor]:
        """The part of a tensor as views into the mapped file, one a range. Valid while the file is open."""
        if spec.ranges is None:
            return [self._f.get_tensor(name)]
        view, before = self._f.get_slice(name), (slice(None),) * spec.dim
        return [view[(*before, slice(start, stop))] for start, stop in spec.ranges]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        return _shards(index)
    if (single := folder / SINGLE).exists():
        return [single]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        found = (
            f" (it has {', '.join(pickles[:3])}: pickles can run code when read, so they are refused)"
            if pickles
            else ""
        )
        raise WeightError(
            f"{folder} has no *.safetensors file{found}; use a revision with safetensors or convert it once with "
            "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return files


def _shards(index: Path) -> list[Path]:
    shards = sorted(set(read_json(index).get("weight_map", {}).values()))
    if odd := [s for s in shards if Path(s).name != s or not s.endswith(".safetensors")]:
        raise WeightError(f"{index} names {odd[0]!r}, which is no safetensors file of its folder")
    if missing := [s for s in shards if not (index.parent / s).is_file()]:
        raise WeightError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; download it again"
        )
    return [index.parent / s for s in shards]
