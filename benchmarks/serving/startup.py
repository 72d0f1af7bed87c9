"""How long people wait: import, --help, --version, and a server that is ready on the demo model.

    python benchmarks/serving/startup.py [--device D] [--runs 9] [--server-runs 3]

Each figure is the median over fresh processes. The bare interpreter is measured beside them in the same rounds. "Ready" is
from starting the process to the first 200 of /readyz.
"""

from __future__ import annotations

import argparse
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

from shapes import save, spread

READY_LIMIT = 120  # seconds
POLL = 0.02
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import sglang_core": ["-c", "import sglang_core"],
    "sglang-core --help": ["-m", "sglang_core", "--help"],
    "sglang-core --version": ["-m", "sglang_core", "--version"],
    "sglang-core serve --help": ["-m", "sglang_core", "serve", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--server-runs", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.runs):
        for name, argv in COMMANDS.items():
            seconds[name].append(time_command(argv))
    seconds["server ready on demo"] = [time_server(args.device) for _ in range(args.server_runs)]
    for name, values in seconds.items():
        print(f"{name:<26} {spread(values)} s")
    save(args.json, {name: statistics.median(values) for name, values in seconds.items() if values})


def time_command(argv: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def time_server(device: str) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [
        sys.executable,
        "-m",
        "sglang_core",
        "serve",
        "--model-path",
        "demo",
        "--device",
        device,
        "--port",
        str(port),
    ]
    started = time.perf_counter()
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not is_ready(port):
            if server.poll() is not None or time.perf_counter() - started > READY_LIMIT:
                assert server.stderr is not None
                server.kill()
                raise SystemExit(f"the server did not get ready:\n{server.stderr.read().decode()}")
            time.sleep(POLL)
        return time.perf_counter() - started
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
