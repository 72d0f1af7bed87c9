"""Devices for libtpu's compiler: it compiles for TPUs that are not here, on any host."""

from __future__ import annotations

import os

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from sglang_tpu.chips import Chip

# libtpu asks the machine what it is on as it loads, and that no other process has it: said here, it asks neither a metadata server nor for
# a device, and several processes compile at once.
SAID = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def mesh_of(chip: Chip, num_devices: int, axis: str) -> Mesh:
    """`num_devices` neighbours, along one axis. Compiling for them needs libtpu and no TPU.

    For processes that run nothing on a TPU: it sets environment variables that libtpu reads.
    """
    for name, value in SAID.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology(num_devices))
    return Mesh(np.array(topology.devices[:num_devices]), (axis,))
