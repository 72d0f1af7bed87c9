"""python -m sglang_npu_emulation.stubs: libraries in place of Ascend's driver, generated, so that torch_npu imports on a machine without one.

What they must have is read from torch_npu's own libraries: the shared objects that they name and nobody has, and the functions that they call and
nobody defines. Every function fails with "no device": nothing of a device can seem to work. Needs a C compiler and binutils.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent / "_stubs"
HOW = "python -m sglang_npu_emulation.stubs, with a C compiler and binutils on PATH"
NO_DEVICE = 107001  # of Ascend's error codes, "invalid device"


def vendor_libraries() -> list[Path]:
    """Of torch_npu, whether or not it can be imported."""
    root = _root("torch_npu")
    return [*sorted(root.glob("_C*.so")), *sorted(root.glob("lib/*.so"))]


def missing_objects(libraries: Iterable[Path]) -> list[str]:
    """Names of shared objects that the libraries need, and that neither they, nor torch, nor this system has."""
    libraries = list(libraries)
    there = {path.name for path in (*libraries, *_root("torch").glob("lib/*.so*"))}
    needed = {name for path in libraries for name in _needed(path)}
    return sorted(name for name in needed - there if not _loads(name))


def missing_functions(libraries: Iterable[Path]) -> list[str]:
    """Symbols that the libraries use, and that neither they, nor torch, nor this process defines."""
    libraries = list(libraries)
    used = {name for path in libraries for name in _symbols(path, "--undefined-only")}
    defined = {
        name for path in (*libraries, *_root("torch").glob("lib/*.so")) for name in _symbols(path, "--defined-only")
    }
    process = ctypes.CDLL(None)
    return sorted(name for name in used - defined if not hasattr(process, name))


def source(functions: Iterable[str]) -> str:
    """C. Neither arguments nor results are what the driver has: a caller looks at the code that comes back, and goes no further."""
    return "\n".join(f"long {name}(void) {{ return {NO_DEVICE}; }}" for name in functions) + "\n"


def generate(folder: Path = FOLDER) -> list[Path]:
    """One library with all functions, under the first missing name; the others are empty. Raises CalledProcessError."""
    libraries = vendor_libraries()
    functions, names = missing_functions(libraries), missing_objects(libraries)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, name in enumerate(names):
            code, out = Path(scratch, f"{name}.c"), folder / name
            code.write_text(source(functions if i == 0 else ()))
            subprocess.run(
                ["cc", "-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{name}", "-o", str(out), str(code)],
                check=True,
            )
            made.append(out)
    return made


def load(folder: Path = FOLDER) -> None:
    """Into this process, before torch_npu is imported: the linker then finds them by their names. Raises OSError where there are none."""
    found = sorted(folder.glob("*.so"))
    if not found:
        raise OSError(f"{folder} has no libraries in place of Ascend's driver; generate them: {HOW}")
    for path in found:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _root(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise OSError(f"{package} is not installed; pip install ./plugins/npu/emulation brings it")
    return Path(spec.origin).parent


def _needed(library: Path) -> list[str]:
    lines = _run("readelf", "-d", str(library)).splitlines()
    return [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]


def _symbols(library: Path, which: str) -> set[str]:
    """Without versions: a versioned symbol is of a library that has one, and none of those is the driver's. Weak ones may be missing."""
    rows = [line.split() for line in _run("nm", "-D", which, str(library)).splitlines()]
    if which == "--undefined-only":
        return {row[-1] for row in rows if row[0] == "U" and "@" not in row[-1]}
    return {row[-1].partition("@")[0] for row in rows}


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    made = generate()
    print(f"{FOLDER}: {', '.join(path.name for path in made)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
