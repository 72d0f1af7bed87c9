"""sglang-core's backend for x86-64 host CPUs."""
