"""`TritonTuner`: what `sglang-core tune` asks of these kernels. It learns what a call chooses by listening to `tuning.choose`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_core.api import Choice, Knob, TuneContext, Tuner
from sglang_triton.aot import SHARED_LIMITS
from sglang_triton.search import SPACES, Space
from sglang_triton.tuning import ABOUT, Config, asking, choose, current_arch, in_force, source, user_path, user_table


class TritonTuner(Tuner):
    """Knobs are ops of the config files, with the sizes that a launch asked about."""

    def __init__(self, ctx: TuneContext) -> None:
        self.ctx, self.arch = ctx, current_arch()

    @property
    def source(self) -> str:
        return source(self.arch)

    def choices(self, call: Callable[[], object]) -> Sequence[Choice]:
        heard: dict[Knob, None] = {}

        def listen(op: str, sizes: Mapping[str, Any]) -> None:
            if op in SPACES:
                heard[Knob(op, tuple(sorted(sizes.items())))] = None

        with asking(listen):
            call()
        return [self._choice(knob) for knob in heard]

    def _choice(self, knob: Knob) -> Choice:
        sizes, space = dict(knob.sizes), SPACES[knob.name]
        now = in_force(knob.name, sizes)
        sensible = list(space.candidates(now, sizes))
        limit = SHARED_LIMITS.get(self.arch)
        fitting = [config for config in sensible if limit is None or space.shared(config, sizes) <= limit]
        return Choice(knob=knob, in_force=now, candidates=tuple(fitting), unfit=len(sensible) - len(fitting))

    @contextmanager
    def using(self, knob: Knob, config: Config) -> Iterator[None]:
        def answer(op: str, sizes: Mapping[str, Any]) -> Config | None:
            return config if Knob(op, tuple(sorted(sizes.items()))) == knob else None

        with asking(answer):
            yield

    def write(self, best: Mapping[Knob, Config], about: Mapping[str, str]) -> Path:
        """Entries of other sizes that are in the file stay there."""
        path = self.ctx.out or user_path(self.arch)
        user_table.cache_clear()
        ops = {op: list(entries) for op, entries in user_table(path, self.arch).items()}
        for knob, config in best.items():
            ops[knob.name] = _with(ops.get(knob.name, []), entry_of(knob, config), SPACES[knob.name])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text({ABOUT: dict(about)} | dict(sorted(ops.items()))))
        user_table.cache_clear()
        choose.cache_clear()
        return path


def entry_of(knob: Knob, config: Config) -> dict[str, Any]:
    grows = SPACES[knob.name].grows
    entry: dict[str, Any] = {"exactly": {name: value for name, value in knob.sizes if name not in grows}}
    if bounds := {name: value for name, value in knob.sizes if name in grows}:
        entry["up_to"] = bounds
    return entry | {"config": dict(config)}


def _with(entries: list[Any], new: Mapping[str, Any], space: Space) -> list[Any]:
    """One entry for equal conditions; the narrowest first, as the first that holds is taken."""
    kept = [e for e in entries if any(e.get(part) != new.get(part) for part in ("exactly", "up_to"))]

    def order(entry: Mapping[str, Any]) -> tuple[str, list[int]]:
        return json.dumps(entry["exactly"], sort_keys=True), [entry["up_to"][name] for name in space.grows]

    return sorted([*kept, new], key=order)


def _text(document: Mapping[str, Any]) -> str:
    """One line an entry, as the packaged files."""
    blocks = []
    for op, value in document.items():
        if op == ABOUT:
            blocks.append(f'  "{op}": {json.dumps(value)}')
        else:
            blocks.append(f'  "{op}": [\n' + ",\n".join(f"    {json.dumps(entry)}" for entry in value) + "\n  ]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
