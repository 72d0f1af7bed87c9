"""One part in one call: `python -m benchmarks.gpu PART [--device cuda] [--out FOLDER]`; run.sh sets up what it needs and calls this."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import plots, watched
from benchmarks.gpu.session import SUMMARY, Session, about, source_of
from sglang_core.errors import SglangError

if TYPE_CHECKING:
    from benchmarks.gpu.opened import Opened

PARTS = ("build", "conformance", "kernels", "engine")
LIMIT = 540.0  # seconds
RESULTS = Path(__file__).with_name("results")
UNFINISHED = 3


def main(argv: list[str] | None = None) -> int:
    """0: all cases are over and none failed. 1: some failed. 2: no such device. 3: time ran out; run again."""
    args = parse(argv)
    from benchmarks.gpu.opened import Opened  # imports torch

    try:
        opened = Opened(args.device, small=args.small)
    except SglangError as error:
        print(f"benchmarks/gpu: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.part}.json"
    if args.fresh:
        path.unlink(missing_ok=True)
    elif (
        not path.exists() and (known := RESULTS / path.name).exists()
    ):  # another folder each time, as where machines are borrowed
        shutil.copyfile(known, path)
    source = source_of(Path(__file__).parents[2])
    session = Session(path, about(opened.facts, small=args.small), args.limit, source=source)
    if args.only and not args.keep:  # asked for by name: once more
        session.forget(args.only)
    whole = run(opened, session, args)
    failed = session.failed or session.done.get(SUMMARY, {}).get("fails")
    name = session.about["device"]["name"]
    title = f"{args.part}, {name}, {session.about['date']}{', SMALL: figures mean nothing' if args.small else ''}"
    drawn = plots.draw(args.part, session.done, path.with_suffix(".png"), title)
    print(f"{path}{' and a plot' if drawn else ''}: {len(session.done)} done, {len(session.failed)} failed")
    return UNFINISHED if not whole else int(bool(failed))


def run(opened: Opened, session: Session, args: argparse.Namespace) -> bool:
    """True where all cases are over. None is run in this process, which opens no device and forks."""
    if args.part == "conformance":
        from benchmarks.gpu import conformance

        return conformance.run(opened.chosen, session, args.only, small=args.small)
    if args.part == "build":
        from benchmarks.gpu import build

        listed = build.cases(args.device, opened.chosen.info.path, args.only, small=args.small)
        return session.run(listed, jobs=len(os.sched_getaffinity(0)))
    if args.part == "kernels":
        from benchmarks.gpu import kernels

        return watched.run(session, lambda: kernels.cases(opened, session, args.only), after=opened.release)
    from benchmarks.gpu import engine

    return watched.run(session, lambda: engine.cases(opened, session, args.only), after=opened.release)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a host: figures mean nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--keep", action="store_true", help="with --only: go on behind what is done")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"default: {LIMIT:.0f}")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs finished")
    where = Path(os.environ.get("OUT") or RESULTS)
    parser.add_argument("--out", type=Path, default=where, metavar="FOLDER", help="default: $OUT, else results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
