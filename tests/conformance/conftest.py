from __future__ import annotations

import pytest

KILLS = pytest.StashKey[list[tuple[str, str, str]]]()


@pytest.fixture
def kill_table(request: pytest.FixtureRequest) -> list[tuple[str, str, str]]:
    """(mutant, the case that killed it, why), of this whole run."""
    return request.config.stash.setdefault(KILLS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if kills := config.stash.get(KILLS, None):
        terminalreporter.section(f"{len(kills)} mutants killed")
        for mutant, case, why in sorted(kills):
            terminalreporter.line(f"{mutant:<36} {case:<48} {why[:120]}")
