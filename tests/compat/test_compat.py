"""The import name `sglang`: the same objects under another name, and words for what is not there."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPAT = ROOT / "compat"


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    paths = f"import sys; sys.path[:0] = [{str(COMPAT)!r}, {str(ROOT)!r}]; "
    return subprocess.run(
        [sys.executable, "-c", paths + argv[0], *argv[1:]], capture_output=True, text=True, check=False
    )


def test_names_are_the_cores_own() -> None:
    script = "import sglang as sgl, sglang_core; assert sgl.__version__ == sglang_core.__version__; print(sgl.Engine is sglang_core.Engine)"
    done = python(script)
    assert done.stdout == "True\n", done.stderr


def test_import_is_light() -> None:
    done = python("import sglang; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_a_missing_name_says_whose_sglang_this_is() -> None:
    done = python("import sglang; sglang.nonsense")
    assert "sglang.nonsense does not exist here: this `sglang` is sglang-compat" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "99999", "--model-path", "demo"], "--port 99999 must be between 0 and 65535"),
        (["--attention-backend", "fa3"], "use --kernel attn.paged=PROVIDER"),
    ],
)
def test_launch_server_is_serve(flags: list[str], words: str) -> None:
    run = "import runpy; runpy.run_module('sglang.launch_server', run_name='__main__')"
    done = python(run, *flags)
    assert done.returncode == 2
    assert words in done.stderr


def test_distribution_owns_only_the_name() -> None:
    project = tomllib.loads((COMPAT / "pyproject.toml").read_text())
    assert project["project"]["name"] == "sglang-compat"
    assert [d.split(">")[0] for d in project["project"]["dependencies"]] == ["sglang-core"]
