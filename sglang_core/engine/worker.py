"""An engine process: one rank. Started by the launcher as `python -m sglang_core.engine.worker`, told what to be on stdin."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from pathlib import Path

import msgspec

from sglang_core.engine.channel import PlanReceiver, ZmqEnd
from sglang_core.engine.lifeline import die_with_parent, read_launch
from sglang_core.errors import SglangError
from sglang_core.types import EngineFailed, EngineReady, StepPlan

log = logging.getLogger(__name__)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told: the flat config, its place, and the directory where the sockets are."""

    settings: dict[str, object]
    replica: int
    rank: int
    world_size: int
    directory: str
    log_level: str
    progress: bool


def main() -> int:
    launch = msgspec.json.decode(read_launch(), type=Launch)
    die_with_parent(Path(launch.directory))
    who = f"replica {launch.replica} " * (launch.settings.get("dp_size", 1) != 1) + f"rank {launch.rank}"
    logging.basicConfig(level=launch.log_level.upper(), format=f"%(asctime)s {who} %(levelname)s %(name)s: %(message)s")
    directory = Path(launch.directory)
    try:
        return _serve(launch, directory)
    except SglangError as e:  # the caller's mistake: said in one line, by rank 0's socket or ours
        _report_failure(directory, EngineFailed(error=str(e)))
        return 2
    except Exception as e:
        log.exception("rank %d cannot go on", launch.rank)
        _report_failure(directory, EngineFailed(error=f"{type(e).__name__}: {e}"))
        return 1


def _serve(launch: Launch, directory: Path) -> int:
    from sglang_core.config import EngineConfig  # after the lifeline is up: what follows takes seconds
    from sglang_core.engine.build import build_engine, build_follower

    config = EngineConfig.from_flat(**launch.settings)
    if launch.rank == 0:
        core = build_engine(
            config,
            world_size=launch.world_size,
            directory=directory,
            progress=launch.progress,
            replica=launch.replica,
        )
        end = ZmqEnd(directory)
        end.send(EngineReady(info=dict(core.info)))
        try:
            core.run(end)
        except Exception:  # logged by the loop, and said to the client
            return 1
        finally:
            end.close()
        return 0
    runner, max_in_flight = build_follower(
        config, launch.rank, world_size=launch.world_size, directory=directory, replica=launch.replica
    )
    receiver = PlanReceiver(directory, launch.rank)
    in_flight: deque[object] = deque()
    while True:
        message = receiver.receive()
        if not isinstance(message, StepPlan):
            runner.take(message)
            continue
        pending = runner.launch(message)
        in_flight.append(pending)
        if len(in_flight) >= max_in_flight:
            in_flight.popleft().result()  # type: ignore[attr-defined]


def _report_failure(directory: Path, failure: EngineFailed) -> None:
    end = ZmqEnd(directory)
    end.send(failure)
    end.close()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # device threads and collectives must not keep a finished rank alive
