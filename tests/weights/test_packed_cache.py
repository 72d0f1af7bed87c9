"""`--packed-cache`: a second start reads what the first packed, bit for bit, or packs again; never anything else."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_core.backend.selection import OpTable
from sglang_core.errors import ConfigError
from sglang_core.layers.build import BuildContext, bind_model
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.quant_config import QuantConfig, Rule, online_quant_config
from sglang_core.layers.stored import DENSE
from sglang_core.models.registry import model_class
from sglang_core.ops import OPS
from sglang_core.weights import packed_file
from sglang_core.weights.checkpoint import Checkpoint, read_config
from sglang_core.weights.loader import load_model
from sglang_core.weights.packed_cache import PackedCache, PackedEntry
from sglang_core.weights.packed_file import UNFINISHED
from sglang_core.weights.packed_key import checkpoint_identity
from tests.layers.test_moe import CONFIG as MOE
from tests.models.harness import PAGE_SIZE
from tests.weights import scrambled
from tests.weights.test_loader import CONFIG, Ranked, checkpoint, logits

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_size": 32,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
TIED = {"tie_word_embeddings": True, "attention_bias": False}


def context(layout: str = "scrambled/1", **changes: Any) -> BuildContext:
    backend = scrambled.Scrambled(layout)
    return BuildContext(
        table=OpTable(backend.probe()[0], backend, ops=OPS, page_size=PAGE_SIZE),
        **{"dtype": torch.float32, "device": torch.device("cpu"), "context_length": 64, "page_size": PAGE_SIZE}
        | changes,
    )


def model_of(folder: Path, quantization: str | None = None) -> CausalLM:
    hf_config = read_config(folder)
    cls = model_class(hf_config)
    cfg = cls.read_config(hf_config)
    if quantization is not None:
        cfg = cfg.replace(quantization=online_quant_config(quantization, None))
    return cls(cfg)


def cache(folder: Path) -> PackedCache:
    return PackedCache(folder, lambda n: torch.empty(n, dtype=torch.uint8))


def start(source: Path, kept: Path, ctx: BuildContext | None = None, **model: Any) -> tuple[CausalLM, int]:
    """Load with the cache -> the model, and how many weights were packed."""
    scrambled.packed.clear()
    loaded = load_model(model_of(source, **model), source, ctx or context(), progress=False, packed_cache=cache(kept))
    return loaded, len(scrambled.packed)


def state(model: CausalLM) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def assert_same(a: CausalLM, b: CausalLM) -> None:
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    ours, theirs = state(a), state(b)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        y = theirs[name]
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride()), name
        assert torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)), name


def entry_of(source: Path, ctx: BuildContext | None = None, **model: Any) -> PackedEntry:
    made, ctx = model_of(source, **model), ctx or context()
    bind_model(made, ctx)
    entry = cache(source.parent / "unused").entry(made, ctx, checkpoint_identity(Checkpoint.open(source)))
    assert entry is not None
    return entry


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return checkpoint(folder)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.mark.parametrize("quantization", [None, "fp8", "int8", "int4"])
@pytest.mark.parametrize("config", [{}, TIED, MOE], ids=["dense", "tied", "moe"])
def test_a_second_start_packs_nothing_and_is_the_first(
    config: dict[str, Any], quantization: str | None, tmp_path: Path, kept: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
    sizes |= {"shared_expert_intermediate_size": 128}
    source = checkpoint(tmp_path, **config | sizes)
    first, packed = start(source, kept, quantization=quantization)
    assert packed > 8
    second, packed = start(source, kept, quantization=quantization)
    assert packed == 0
    assert_same(first, second)
    assert torch.equal(logits(first), logits(second))
    plain = load_model(model_of(source, quantization), source, context(), progress=False)
    assert_same(plain, second)


def test_what_is_taken_apart_at_load_is_loaded_as_ever(tmp_path: Path, kept: Path) -> None:
    """Latent attention keeps a matrix that its kernel packs a head at a time too, unpacked."""
    source = checkpoint(tmp_path, **MLA)
    first, packed = start(source, kept)
    second, again = start(source, kept)
    assert packed > again == MLA["num_hidden_layers"]
    assert_same(first, second)
    assert torch.equal(logits(first), logits(second))


def test_the_folder_holds_one_safetensors_file_that_others_may_not_read(source: Path, kept: Path) -> None:
    model, _ = start(source, kept)
    (file,) = kept.iterdir()
    assert file.name.startswith("LlamaForCausalLM-scrambled-0of1-") and file.suffix == ".safetensors"
    assert kept.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o777 == 0o600
    stored = load_file(file)
    for name, x in state(model).items():
        if "_bytes" in name or name.endswith(".bias"):
            assert torch.equal(stored[name], x), name
    assert not any("norm" in name or "embed" in name for name in stored), "those are read from the checkpoint"


def test_random_weights_are_kept_by_their_seed(source: Path, kept: Path) -> None:
    def packed(seed: int) -> int:
        scrambled.packed.clear()
        load_model(model_of(source), "", context(), load_format="dummy", seed=seed, packed_cache=cache(kept))
        return len(scrambled.packed)

    assert [packed(0) > 0, packed(0), packed(1) > 0] == [True, 0, True]


def rewrite(source: Path, **changes: object) -> None:
    (source / "config.json").write_text(json.dumps(CONFIG | changes))


def one_number_at_the_same_time(source: Path) -> None:
    """As a fine-tune that was unpacked from an archive with equal dates: only bytes differ."""
    file = source / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


CHANGES: dict[str, Any] = {
    "bytes": one_number_at_the_same_time,
    "time": lambda source: os.utime(source / "model.safetensors", ns=(1, 1)),
    "name": lambda source: (source / "model.safetensors").rename(source / "model-1.safetensors"),
    "config": lambda source: rewrite(source, rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_checkpoint_has_another_key(change: str, source: Path) -> None:
    before = entry_of(source).path
    assert entry_of(source).path == before
    CHANGES[change](source)
    assert entry_of(source).path != before


def test_another_way_of_loading_has_another_key(source: Path) -> None:
    ranks = [context(tp=Ranked(rank, 2)) for rank in (0, 1)]
    ways = [context(), context("scrambled/2"), context(dtype=torch.bfloat16), *ranks]
    paths = [entry_of(source, ctx).path for ctx in ways] + [
        entry_of(source, quantization=q).path for q in ("fp8", "int8")
    ]
    assert len(set(paths)) == len(paths)


def test_room_for_adapters_and_length_of_context_change_no_key(source: Path) -> None:
    assert entry_of(source, context(context_length=32, kv_dtype="bfloat16")).path == entry_of(source).path


def test_each_rank_has_a_file_of_its_own(source: Path, kept: Path) -> None:
    firsts = [start(source, kept, context(tp=Ranked(rank, 2)))[0] for rank in (0, 1)]
    assert len(list(kept.iterdir())) == 2
    for rank, first in enumerate(firsts):
        second, packed = start(source, kept, context(tp=Ranked(rank, 2)))
        assert packed == 0
        assert_same(first, second)


def middle_of(name: str) -> Any:
    """Where a tensor's bytes are in a file."""

    def offset(file: Path) -> int:
        size = int.from_bytes(file.read_bytes()[:8], "little")
        with safe_open(file, framework="pt") as f:
            names = f.offset_keys()
        about = json.loads(file.read_bytes()[8 : 8 + size])
        found = next(n for n in names if name in n)
        return 8 + size + sum(about[found]["data_offsets"]) // 2

    return offset


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


DAMAGES: dict[str, Any] = {
    "empty": lambda file: os.truncate(file, 0),
    "cut in the header": lambda file: os.truncate(file, 100),
    "cut in the data": lambda file: os.truncate(file, file.stat().st_size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a bit of the weights": lambda file: flip(file, middle_of("weight_bytes")(file)),
    "a bit of a bias": lambda file: flip(file, middle_of("bias")(file)),
    "a number in the header": lambda file: file.write_bytes(
        file.read_bytes().replace(b'\\"in_features\\": 32', b'\\"in_features\\": 31')
    ),
    "another's": lambda file: save_file({"x": torch.zeros(3)}, file),
    "another key": lambda file: file.write_bytes(other_key(file)),
}


def other_key(file: Path) -> bytes:
    """A whole file, sealed, of another model."""
    with safe_open(file, framework="pt") as f:
        metadata = dict(f.metadata()) | {"key": "{}"}
    found = dict(packed_file.PackedFile.open(file).read(lambda n: torch.empty(n, dtype=torch.uint8)))
    metadata.pop(packed_file.SEAL)
    packed_file.write(file, found, metadata, lambda n: None)
    return file.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_left_with_a_warning_and_made_anew(
    damage: str, source: Path, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, wanted = start(source, kept)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    DAMAGES[damage](file)
    assert file.read_bytes() != whole, "the damage is done"
    with caplog.at_level(logging.WARNING):
        second, packed = start(source, kept)
    assert packed == wanted and f"{file} is not used" in caplog.text
    assert_same(first, second)
    assert [path.read_bytes() for path in kept.iterdir()] == [whole]


def test_a_file_that_shrinks_while_it_is_read_is_left(
    source: Path, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, wanted = start(source, kept)
    (file,) = kept.iterdir()

    def cut(num_bytes: int) -> Tensor:
        os.truncate(file, 4096)
        return torch.empty(num_bytes, dtype=torch.uint8)

    scrambled.packed.clear()
    second = load_model(model_of(source), source, context(), progress=False, packed_cache=PackedCache(kept, cut))
    assert len(scrambled.packed) == wanted and "shorter" in caplog.text
    assert_same(first, second)


def test_a_full_disk_costs_a_warning(source: Path, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        model, _ = start(source, kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "is not written" in caplog.text and os.strerror(errno.EFBIG) in caplog.text
    assert list(kept.iterdir()) == []
    assert_same(model, load_model(model_of(source), source, context(), progress=False))


def test_what_a_killed_writer_left_goes_and_what_is_being_written_stays(source: Path, kept: Path) -> None:
    kept.mkdir()
    left, busy = kept / f"a.1{UNFINISHED}", kept / f"a.2{UNFINISHED}"
    left.write_bytes(b"half")
    with busy.open("wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        start(source, kept)
    assert not left.exists() and busy.exists()


def test_two_processes_at_once_both_start_and_leave_one_file(source: Path, kept: Path) -> None:
    """Their strings hash differently, and the key does not depend on it."""
    code = (
        "import sys; from pathlib import Path; from tests.weights.test_packed_cache import mixed_start;"
        "print(mixed_start(*map(Path, sys.argv[1:])))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(kept)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONHASHSEED": seed},
            text=True,
        )
        for seed in ("1", "2")
    ]
    packed = {int(process.communicate(timeout=120)[0]) for process in started}
    assert packed <= {0, len(entry_of(source).layers)} and [process.returncode for process in started] == [0, 0]
    assert len(list(kept.iterdir())) == 1
    assert mixed_start(source, kept) == 0


def mixed_start(source: Path, kept: Path) -> int:
    """Of a model whose configuration has a set in it -> how many weights were packed."""
    names = frozenset(f"model.layers.0.mlp.{name}" for name in "abcdefgh")
    cfg = model_of(source).cfg.replace(
        quantization=QuantConfig(method="mixed", rules=(Rule(stored=DENSE, names=names),))
    )
    scrambled.packed.clear()
    load_model(model_class(CONFIG)(cfg), source, context(), progress=False, packed_cache=cache(kept))
    return len(scrambled.packed)


def test_kernels_that_name_no_layout_keep_nothing(source: Path, kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        _, packed = start(source, kept, context(""))
        assert packed > 0
    assert "gemm.linear name no packed_layout" in caplog.text and list(kept.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match="packed_cache="):
        cache(source / "config.json")
