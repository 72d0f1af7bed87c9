"""The page on the strict backend names tests that exist, and every test of a broken rule is on it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "backends" / "strict.md").read_text()
FILES = [HERE / f"{name}.py" for name in ("test_strict", "test_strict_kernels", "test_strict_streams")]


def functions() -> set[str]:
    trees = [ast.parse(file.read_text()) for file in FILES]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def rows() -> list[list[str]]:
    table = [line for line in PAGE.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def test_every_rule_has_a_test_that_breaks_it() -> None:
    for rule, how, tests in rows():
        named = re.findall(r"`(\w+)`", tests)
        assert how, rule
        assert named, f"no test breaks: {rule}"
        assert set(named) <= functions(), f"{rule}: {set(named) - functions()} is no test"


def test_every_mistake_is_on_the_page() -> None:
    trees = [ast.parse(file.read_text()) for file in FILES]
    mistakes = {
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and [arg.arg for arg in node.args.args] in (["state", "fb", "model"], ["layer", "state", "fb"])
    }
    assert mistakes - {"honest"} <= set(re.findall(r"`(\w+)`", PAGE))
    assert len(mistakes) > 30
