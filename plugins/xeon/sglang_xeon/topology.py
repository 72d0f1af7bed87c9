"""Which CPUs to compute on: one thread a physical core, within affinity, cgroup quota and one NUMA node. No torch here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """What this process may run on. `cores` groups the allowed logical CPUs of a physical core, `nodes` those of a NUMA node."""

    cores: tuple[tuple[int, ...], ...]
    nodes: tuple[frozenset[int], ...]
    quota: float | None = None  # CPUs' worth of time that the cgroup grants

    @property
    def num_cores(self) -> int:
        """Physical cores, no more than the quota pays for; at least one."""
        whole = len(self.cores) if self.quota is None else min(len(self.cores), math.ceil(self.quota))
        return max(whole, 1)

    def node_cores(self) -> list[list[int]]:
        """First logical CPU of each physical core, node by node; nodes without an allowed CPU are left out."""
        firsts = [core[0] for core in self.cores]
        groups = [[cpu for cpu in firsts if cpu in node] for node in self.nodes]
        return [g for g in groups if g] or [firsts]


def place(topology: Topology, *, rank: int = 0, world_size: int = 1, num_threads: int | None = None) -> list[int]:
    """The CPUs of one rank's compute threads, one a thread.

    Ranks go round the NUMA nodes and share a node's cores evenly. Alone, a rank stays on the node with the most cores, as
    weights read across sockets cost more than the cores there bring; an explicit num_threads may span nodes.
    """
    nodes = sorted(topology.node_cores(), key=len, reverse=True)
    nodes = nodes[: max(1, min(len(nodes), world_size))]
    mine = nodes[rank % len(nodes)]
    sharing = len(range(rank % len(nodes), world_size, len(nodes)))
    share = max(1, len(mine) // sharing)
    start = (rank // len(nodes)) * share
    cpus = [mine[i % len(mine)] for i in range(start, start + share)]
    limit = max(1, topology.num_cores // world_size)
    if num_threads is None:
        return cpus[:limit]
    rest = [core[0] for core in topology.cores if core[0] not in cpus]
    siblings = [cpu for core in topology.cores for cpu in core[1:]]
    return (cpus + rest + siblings)[:num_threads]


def home_node(topology: Topology, cpus: Sequence[int]) -> frozenset[int] | None:
    """The CPUs of the one NUMA node, of several, that `cpus` are all on; None where there is nothing to choose."""
    if len(topology.node_cores()) < 2:
        return None
    return next((node for node in topology.nodes if node.issuperset(cpus)), None)


def read_topology(root: str = "/") -> Topology:
    """This process's topology from /sys; one core a CPU and one node where /sys says nothing."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    base = Path(root)
    ids = {cpu: _core_id(base, cpu) for cpu in allowed}
    nodes = [parse_cpulist(_read(p)) for p in sorted(base.glob("sys/devices/system/node/node*/cpulist"))]
    return Topology(
        cores=group_cores(ids),
        nodes=tuple(frozenset(n) & set(allowed) for n in nodes) or (frozenset(allowed),),
        quota=parse_quota(_read(base / "sys/fs/cgroup/cpu.max")),
    )


def group_cores(ids: Mapping[int, object]) -> tuple[tuple[int, ...], ...]:
    """Logical CPU -> id of its core, to the CPUs of each core, in order of first CPU."""
    groups: dict[object, list[int]] = {}
    for cpu in sorted(ids):
        groups.setdefault(ids[cpu], []).append(cpu)
    return tuple(tuple(g) for g in groups.values())


def parse_cpulist(text: str) -> set[int]:
    """ "0-3,8" -> {0, 1, 2, 3, 8}"""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        cpus.update(range(int(low), int(high or low) + 1))
    return cpus


def parse_quota(text: str) -> float | None:
    """cgroup v2 `cpu.max`, "200000 100000" -> 2.0; None without a limit."""
    fields = text.split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return int(fields[0]) / int(fields[1])


def compact(cpus: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5", for logs."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _core_id(base: Path, cpu: int) -> Sequence[str] | int:
    folder = base / f"sys/devices/system/cpu/cpu{cpu}/topology"
    ids = _read(folder / "physical_package_id").strip(), _read(folder / "core_id").strip()
    return ids if all(ids) else cpu


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
