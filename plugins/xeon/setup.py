"""Builds `sglang_xeon/_C.abi3.so`: plain C++ on torch's stable ABI, no Python symbols, seconds to compile."""

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import torch
except ImportError as e:
    raise SystemExit(
        "sglang-xeon is built against the torch that will run it, and torch cannot be imported here.\n"
        "Install torch>=2.11, then: pip install --no-build-isolation ./plugins/xeon"
    ) from e

TORCH = Path(torch.__file__).parent
SOURCES = sorted(path.name for path in Path(__file__).parent.glob("csrc/*.cpp"))
HEADERS = sorted(path.name for path in Path(__file__).parent.glob("csrc/*") if path.suffix in (".h", ".inl"))


class BuildKernels(build_ext):
    """Says what is missing before the compiler's own error would."""

    def run(self) -> None:
        machine = platform.machine()
        if machine not in ("x86_64", "AMD64"):
            raise SystemExit(f"sglang-xeon holds x86-64 kernels; this machine is {machine}. Use another backend.")
        compiler = os.environ.get("CXX", "g++").split()[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"sglang-xeon needs a C++17 compiler, and {compiler!r} is not on PATH.\n"
                "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++), or set CXX."
            )
        super().run()

    def build_extensions(self) -> None:
        """Files are compiled at once, as many as there are cores (or `-j`); setuptools itself is parallel over extensions only."""
        compile_files = self.compiler.compile

        def compile_at_once(sources: list[str], *args: Any, **kwargs: Any) -> list[str]:
            longest_first = sorted(sources, key=lambda source: not Path(source).name.startswith("isa_"))
            with ThreadPoolExecutor(self.parallel or len(os.sched_getaffinity(0))) as pool:
                jobs = {source: pool.submit(compile_files, [source], *args, **kwargs) for source in longest_first}
            return [made for source in sources for made in jobs[source].result()]

        self.compiler.compile = compile_at_once
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "sglang_xeon._C",
            sources=[f"csrc/{name}" for name in SOURCES],
            depends=[f"csrc/{name}" for name in HEADERS],
            include_dirs=[str(TORCH / "include"), str(TORCH / "include/torch/csrc/api/include")],
            library_dirs=[str(TORCH / "lib")],
            libraries=["torch_cpu"],
            # 2.11 is the oldest torch served. No -march: each isa_*.cpp raises the target for its own functions only.
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
                "-Wno-psabi",
                "-Werror=float-conversion",  # a float that an overload takes for an integer
                "-g0",
            ],
            extra_link_args=["-Wl,--strip-all"],
            py_limited_api=True,
            language="c++",
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
