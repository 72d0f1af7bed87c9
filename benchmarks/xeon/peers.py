"""We and the other engines that serve on a CPU, in turn on the same machine: same weights, same token ids, same threads.

    python benchmarks/xeon/install_peers.py                  # once
    python benchmarks/xeon/peers.py [--rounds 5] [--json FILE]
    python benchmarks/xeon/peers.py --quick                  # one shape, few rows and rounds: under 10 minutes
    python benchmarks/xeon/peers.py --quick --layers 2       # do all engines run, and agree?

Every engine is a process in its own environment, with a bound on each answer. Engines of a row are alive together and asked one after the
other, in another order each round; a ratio is the median over rounds of ours to the best peer's in the same round. Before a row is timed, what
each engine answers is scored by whole forwards of transformers: who computes nonsense quickly is out of the row. Machines are shared:
quote ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from install_peers import PEERS
from peer_engines import checkpoint, rows, servers
from peer_engines.child import Child, ChildError
from peer_engines.engines import LLAMA_CPP, OURS, OWN_VARIANTS, PLAIN, TRANSFORMERS, VLLM, Place, preloads, start
from peer_engines.rows import Row
from peer_engines.workloads import SERVERS, Workload, workloads
from sglang_xeon import isa

SHAPES = ("qwen3-0.6b", "llama-3.2-1b", "qwen3-moe-1.5b")
ENGINES = (OURS, *OWN_VARIANTS, VLLM, LLAMA_CPP, TRANSFORMERS)
SERVED_SHAPE = "qwen3-0.6b"
OWN_TARGETS = {
    f"{OURS} {fmt}{what}": target for fmt, target in (("int8", 1.8), ("int4", 3.0)) for what in ("", " and head")
}


def main() -> None:
    args = arguments()
    place = Place(peers=args.peers.resolve(), work=args.work.resolve(), threads=args.threads, eager=bool(args.layers))
    place.work.mkdir(parents=True, exist_ok=True)
    wanted = [engine for engine in ENGINES if engine in args.engines.split(",")]
    able = [engine for engine in wanted if report_missing(place, engine)]
    facts: dict[str, Any] = {"machine": machine(place), "rounds": args.rounds, "rows": [], "servers": {}}
    for shape in args.shapes.split(","):
        folder = checkpoint.checkpoint(shape, place.work, args.layers)
        for row in measure_shape(shape, folder, place, able, args):
            facts["rows"].append(row.facts() | bandwidth(row, folder, facts["machine"]))
            save(args.json, facts)
    if not args.no_servers:
        facts["servers"] = measure_servers(place, able, servers.Load(num_requests=args.requests), args.layers)
    save(args.json, facts)
    print("\n" + table(facts))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=PEERS, help="where install_peers.py put them")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "sglang-peers", help="checkpoints, logs"
    )
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--requests", type=int, default=servers.Load().num_requests, help="of the served load")
    parser.add_argument(
        "--layers",
        type=int,
        help="cut every shape to so many: vLLM is not compiled then; shows that engines run, not how fast",
    )
    parser.add_argument("--no-servers", action="store_true", help="leave out the served load")
    parser.add_argument("--quick", action="store_true", help="one shape, three rows, two rounds, no servers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.no_servers = min(args.rounds, 2), True
        if args.shapes == ",".join(SHAPES):
            args.shapes = SHAPES[0]
    if unknown := set(args.engines.split(",")) - set(ENGINES):
        parser.error(f"--engines {','.join(sorted(unknown))}: there are {', '.join(ENGINES)}")
    return args


def report_missing(place: Place, engine: str) -> bool:
    """Whether it can run; if not, says so."""
    why = place.missing(engine)
    if why is not None:
        print(f"without {engine}: {why}", flush=True)
    return why is None


def measure_shape(shape: str, folder: Path, place: Place, able: list[str], args: argparse.Namespace) -> list[Row]:
    """Rows in order; those that want a prefix cache come last, on engines of their own."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    wanted = [w for w in workloads(shape, vocab_size, quick=args.quick) if args.only in w.name]
    found: list[Row] = []
    for cache in (False, True):
        part = [workload for workload in wanted if workload.cache == cache]
        engines = [engine for engine in able if any(engine in workload.engines for workload in part)]
        if part and engines:
            found += measure_part(shape, folder, place, engines, part, cache, args.rounds)
    return found


def measure_part(
    shape: str, folder: Path, place: Place, engines: list[str], part: list[Workload], cache: bool, rounds: int
) -> list[Row]:
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for engine in dict.fromkeys([*engines, TRANSFORMERS]):  # the judge is there even where it is not measured
            try:
                children[engine] = stack.enter_context(start(engine, folder, place, cache=cache))
                print(f"{shape}: {engine} ready after {children[engine].ready:.1f} s", flush=True)
            except ChildError as error:
                print(f"{shape}: {engine} does not start: {error}", flush=True)
        judge = children.get(TRANSFORMERS)
        measured = {engine: child for engine, child in children.items() if engine in engines}
        found = []
        for workload in part:
            found.append(rows.run(shape, workload, measured, judge, rounds))
            print(line(found[-1].facts()), flush=True)
        return found


def measure_servers(place: Place, able: list[str], load: servers.Load, layers: int | None) -> dict[str, Any]:
    folder = checkpoint.checkpoint(SERVED_SHAPE, place.work, layers)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    found: dict[str, Any] = {}
    for engine in (engine for engine in SERVERS if engine in able):
        try:
            found[engine] = servers.measure(engine, folder, place, load, vocab_size)
        except ChildError as error:
            found[engine] = {"error": str(error)}
        print(f"served, {load.rate:g} requests/s: {engine} {found[engine]}", flush=True)
    return found


def machine(place: Place) -> dict[str, Any]:
    """What the figures were made on, with the read bandwidth measured now."""
    from kernels import limits  # builds limits.cpp

    return {
        "cpu": isa.cpu_name(isa.read_cpuinfo()),
        "isa": isa.host(),
        "kernel": platform.release(),
        "threads": place.threads,
        "read_bandwidth": limits(place.threads)[0],
        "vllm_preloads": [path.name for path in preloads(place)],
        "load": os.getloadavg()[0],
    }


def bandwidth(row: Row, folder: Path, machine: Mapping[str, Any]) -> dict[str, float]:
    """At batch 1 a dense model's step can take no less than its weights take to be read."""
    ours = row.median(OURS)
    if row.workload != "decode, batch 1" or ours is None or "moe" in row.shape:
        return {}
    return {"of_read_bandwidth": ours * checkpoint.weight_bytes(folder) / machine["read_bandwidth"]}


def table(facts: Mapping[str, Any]) -> str:
    peers = (VLLM, LLAMA_CPP, TRANSFORMERS)
    lines = [
        f"| shape | measure | {OURS} | {' | '.join(peers)} | ratio to the best | target | |",
        "|---|---" + "|---" * (len(peers) + 4) + "|",
    ]
    for row in facts["rows"]:
        figures = " | ".join(figure(row, engine) for engine in (OURS, *peers))
        ratio = row["ratio"]
        met = "" if ratio is None else "yes" if ratio >= row["target"] else "**no**"
        shown = "-" if ratio is None else f"{ratio:.2f}x of {row['best_peer']}"
        lines.append(
            f"| {row['shape']} | {row['workload']}, {row['unit']} | {figures} | {shown} | {row['target']:g}x | {met} |"
        )
    lines += own_formats(facts["rows"]) + served_rows(facts["servers"])
    noted = [
        row
        for row in facts["rows"]
        if row["failed"] or "of_read_bandwidth" in row or any(row["cached_tokens"].values())
    ]
    return "\n".join(lines + ["", *map(line, noted)])


def own_formats(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our other ways to keep a weight against our bfloat16, as it is and in 16 bits, where a row has them."""
    lines = []
    for row in rows:
        ours, plain = row["medians"].get(OURS), row["medians"].get(PLAIN)
        for engine in OWN_VARIANTS:
            figure = row["medians"].get(engine)
            if not (ours and plain and figure):
                continue
            target, ratio = OWN_TARGETS.get(engine), figure / plain
            met = "" if target is None else "yes" if ratio >= target else "**no**"
            what = f"{row['workload']}, {engine.removeprefix(OURS).strip()}, {row['unit']}"
            shown = f"{figure / ours:.2f}x of bf16, {ratio:.2f}x of plain"
            wanted = "" if target is None else f"{target:g}x"
            lines.append(f"| {row['shape']} | {what} | {figure:.4g} | - | - | - | {shown} | {wanted} | {met} |")
    return lines


def served_rows(served: Mapping[str, Any]) -> list[str]:
    """Lower is better in all of them."""
    measures = {
        "ready_s": "server ready, s",
        "itl_p99_ms": "served, p99 inter-token ms",
        "ttft_p99_ms": "served, p99 TTFT ms",
    }
    lines = [
        f"| {SERVED_SHAPE} | served | {engine} failed: {facts['error']} |"
        for engine, facts in served.items()
        if "error" in facts
    ]
    if any(engine not in served or "error" in served[engine] for engine in (OURS, VLLM)):
        return lines
    for key, name in measures.items():
        ours, theirs = served[OURS][key], served[VLLM][key]
        met = ours < 15 if key == "ready_s" else ours < theirs
        target = "< 15 s" if key == "ready_s" else "< vllm" if key == "itl_p99_ms" else ""
        mark = ("yes" if met else "**no**") if target else ""
        lines.append(
            f"| {SERVED_SHAPE} | {name} | {ours:.4g} | {theirs:.4g} | - | - | {ours / theirs:.2f}x | {target} | {mark} |"
        )
    return lines


def figure(row: Mapping[str, Any], engine: str) -> str:
    median = row["medians"].get(engine)
    return "failed" if engine in row["failed"] else "-" if median is None else f"{median:.4g}"


def line(row: Mapping[str, Any]) -> str:
    """A row for who watches, with all that the table has no column for."""
    parts = [f"{engine} {median:.4g}" for engine, median in row["medians"].items() if median is not None]
    if "of_read_bandwidth" in row:
        parts.append(f"weights read at {row['of_read_bandwidth']:.0%} of the measured bandwidth")
    parts += [
        f"{engine}: {tokens} prompt tokens from cache" for engine, tokens in row["cached_tokens"].items() if tokens
    ]
    parts += [f"{engine} FAILED: {why}" for engine, why in row["failed"].items()]
    return f"{row['shape']}, {row['workload']} ({row['unit']}): " + "; ".join(parts)


def save(path: Path | None, facts: object) -> None:
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
