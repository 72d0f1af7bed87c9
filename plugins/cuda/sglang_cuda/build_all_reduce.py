"""python -m sglang_cuda.build_all_reduce: compiles csrc/all_reduce.cu, with the nvcc on PATH, into this package. No GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "csrc" / "all_reduce.cu"
LIBRARY = Path(__file__).parent / "_all_reduce.so"
ARCHITECTURES = ("80", "90a", "100a")
HOW = "python -m sglang_cuda.build_all_reduce, with CUDA's nvcc on PATH"


def command(nvcc: str, output: Path, *more: str) -> list[str]:
    """Linked to the runtime statically: whichever CUDA PyTorch brings, both work in the one context of a device."""
    targets = ["-gencode=arch=compute_80,code=compute_80"]  # for those between and after
    targets += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    kind = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    return [nvcc, *kind, *targets, *more, "-o", str(output), str(SOURCE)]


def main() -> int:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc is not on PATH: install CUDA's toolkit. Without this, ranks sum by NCCL", file=sys.stderr)
        return 1
    return subprocess.run(command(nvcc, LIBRARY), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
