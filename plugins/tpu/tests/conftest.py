from __future__ import annotations

import os

# Four devices on the host, for the tests of meshes: JAX reads it once.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
