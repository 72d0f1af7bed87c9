from __future__ import annotations

import os

# JAX reads it once. Four devices on the host, for the tests of meshes; and the older of XLA's two code generators for hosts, which
# takes half the time for an interpreted kernel.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_cpu_use_fusion_emitters=false")
