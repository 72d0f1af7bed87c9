"""A part's cases under a time limit: what is finished is in a file, and the next run goes on behind it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "triton", "transformers", "numpy", "sglang-core", "sglang-triton", "sglang-cuda", "sglang-rocm")
SUMMARY = "summary"  # what conformance has beside its cases
ERROR = "_error"  # ends the key of what went wrong beside a case's own figures
Facts = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`run` gives facts for the file, and may raise. `seconds`: what it is expected to take; it is not begun with less left.
    `first`: the others need what it finds, and none is begun where it fails. `last`: of its process, in which it leaves a profiler behind."""

    name: str
    run: Callable[[], Facts]
    seconds: float = 10.0
    first: bool = False
    last: bool = False

    @property
    def most(self) -> float:
        """Seconds after which it is taken to hang."""
        return 2 * self.seconds + 30


@dataclass
class Session:
    """The file of one part: `{"about": ..., "done": {case: facts}, "failed": {case: why}, "begun": [case, what of it]}`.

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
    begun: tuple[str, str] = ("", "")  # the case under way, and what is tried beside what is known of it
    again: set[str] = field(default_factory=set)  # what failed in an earlier run, until it is tried in this one

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.load()
        self.lost("the run was ended while this was under way")
        self.again = set(self.failed)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.limit - (self.clock() - self.started)

    def load(self) -> None:
        """What is in the file, if it is of the same device, sizes and versions."""
        if self.path.exists():
            old = json.loads(self.path.read_text())
            if identity(old["about"]) == identity(self.about):
                self.about, self.done, self.failed = old["about"], old["done"], old["failed"]
                self.begun = tuple(old.get("begun", ("", "")))

    def todo(self, cases: Iterable[Case]) -> list[Case]:
        """Those not done, but for what failed in this run. What failed in an earlier one is tried last: it may hang."""
        left = [c for c in cases if c.name not in self.done and (c.name not in self.failed or c.name in self.again)]
        return sorted(left, key=lambda case: (not case.first, case.name in self.again))

    def run(self, cases: Iterable[Case], say: Callable[[str], None] = print, jobs: int = 1) -> bool:
        """Every case that is to do, `jobs` at a time, in this process: True where all are over, False where time ran out."""

        def ran(case: Case) -> Facts | None:
            return case.run() if self.left >= case.seconds else None

        whole = True
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(ran, case): case for case in self.todo(cases)}
            for future in as_completed(futures):
                if future.exception() is None and future.result() is None:
                    whole = False
                else:
                    self.attempt(replace(futures[future], run=future.result), say)
        if not whole:
            say("the time is over; run again to go on")
        return whole

    def has_time(self, case: Case, say: Callable[[str], None]) -> bool:
        if self.left >= case.seconds:
            return True
        say(f"{case.name}: needs about {case.seconds:.0f} s and {max(0, self.left):.0f} s are left; run again to go on")
        return False

    def attempt(self, case: Case, say: Callable[[str], None]) -> bool:
        """Run a case and note what it gives. False where it, or something that it tried beside, failed."""
        self.failed.pop(case.name, None)
        self.again.discard(case.name)
        try:
            self.record(case.name, case.run())
        except Exception as error:  # a kernel's or the device's: the other cases are still worth having
            self.failed[case.name] = f"{type(error).__name__}: {error}"
            self.begun = ("", "")
            self.save()
            say(f"{case.name}: FAILED\n{traceback.format_exc()}")
            return False
        say(f"{case.name}: {brief(self.done[case.name])}")
        return not any(key.endswith(ERROR) for key in self.done[case.name])

    def begin(self, name: str, facts: Facts | None = None, trying: str = "") -> None:
        """What is noted before something that may take the process with it. With `facts`, the case counts as done, and only `trying` is lost."""
        self.begun = (name, trying)
        if facts is not None:
            self.done[name] = self._signed(facts)
        self.save()

    def lost(self, how: str) -> None:
        """The process of the case under way is gone."""
        name, trying = self.begun
        self.begun = ("", "")
        if name in self.done:
            self.done[name][trying + ERROR] = how
        elif name:
            self.failed[name] = how
        if name:
            self.save()

    def forget(self, text: str) -> None:
        """What was finished and has `text` in its name is run again."""
        self.done = {name: facts for name, facts in self.done.items() if text not in name}

    def record(self, name: str, facts: Facts) -> None:
        self.done[name] = self._signed(facts)
        self.begun = ("", "")
        self.save()

    def _signed(self, facts: Facts) -> Facts:
        return facts | ({"source": self.source} if self.source else {})

    def save(self) -> None:
        """Whole or not at all: a session may be killed while it writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {"about": self.about, "done": self.done, "failed": self.failed, "begun": self.begun}
        text = json.dumps(document, indent=1) + "\n"
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


def identity(about: Facts) -> Facts:
    """Without the day, and without the driver: machines of one kind have one or another of its patches."""
    device = {name: value for name, value in about["device"].items() if name != "driver"}
    return {**about, "date": "", "device": device}


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
