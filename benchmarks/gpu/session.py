"""A part's cases under a time limit: what is finished is in a file, and the next run goes on behind it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "triton", "transformers", "numpy", "sglang-core", "sglang-triton", "sglang-cuda", "sglang-rocm")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`run` gives facts for the file, and may raise. `seconds`: what it is expected to take; it is not begun with less left."""

    name: str
    run: Callable[[], Facts]
    seconds: float = 10.0


@dataclass
class Session:
    """The file of one part: `{"about": ..., "done": {case: facts}, "failed": {case: why}}`.

    A file of another device, other sizes or other versions is begun anew: figures of two of them do not belong in one table. What of this
    repository a case ran is in its facts, as `source`: a repaired kernel is measured with `--only`, and the rest need not be again.
    """

    path: Path
    about: Facts
    limit: float
    clock: Callable[[], float] = time.monotonic
    source: str = ""
    done: dict[str, Facts] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = self.clock()
        if self.path.exists():
            old = json.loads(self.path.read_text())
            if {**old["about"], "date": ""} == {**self.about, "date": ""}:
                self.done, self.failed = old["done"], old["failed"]
                self.about = old["about"]

    @property
    def left(self) -> float:
        """Seconds."""
        return self.limit - (self.clock() - self.started)

    def run(self, cases: Iterable[Case], say: Callable[[str], None] = print) -> bool:
        """Every case that is not done; what failed before is tried again. True where all are over; False where time ran out."""
        for case in cases:
            if case.name in self.done:
                continue
            if self.left < case.seconds:
                say(
                    f"{case.name}: needs about {case.seconds:.0f} s and {max(0, self.left):.0f} s are left; run again to go on"
                )
                return False
            self.failed.pop(case.name, None)
            try:
                self.record(case.name, case.run())
            except Exception as error:  # a kernel's or the device's: the other cases are still worth having
                self.failed[case.name] = f"{type(error).__name__}: {error}"
                self.save()
                say(f"{case.name}: FAILED\n{traceback.format_exc()}")
                continue
            say(f"{case.name}: {brief(self.done[case.name])}")
        return True

    def forget(self, text: str) -> None:
        """What was finished and has `text` in its name is run again."""
        self.done = {name: facts for name, facts in self.done.items() if text not in name}

    def record(self, name: str, facts: Facts) -> None:
        self.done[name] = facts | ({"source": self.source} if self.source else {})
        self.save()

    def save(self) -> None:
        """Whole or not at all: a session may be killed while it writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"about": self.about, "done": self.done, "failed": self.failed}, indent=1) + "\n"
        new = self.path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.path)


def brief(facts: Mapping[str, Any]) -> str:
    """One line of a case's figures."""
    words = []
    for name, value in facts.items():
        if isinstance(value, float):
            words.append(f"{name} {value:.4g}")
        elif isinstance(value, int | str) and value != "":
            words.append(f"{name} {value}")
    return ", ".join(words)


def about(device: Mapping[str, str], *, small: bool) -> Facts:
    """Date, device, and versions of what figures depend on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": dict(device),
        "small": small,
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := installed(name))},
    }


def source_of(root: Path) -> str:
    """A hash of the Python and configs of this repository: a copy of it need not have its history."""
    digest = hashlib.sha256()
    for folder in ("sglang_core", "conformance/sglang_conformance", "plugins", "benchmarks/gpu"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh") or (path.suffix == ".json" and path.parent.name == "configs"):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def installed(name: str) -> str:
    """A package's version; of one that is only on PYTHONPATH, "source"; "" where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        pass
    from importlib.util import find_spec

    return "source" if find_spec(name.replace("-", "_")) else ""
