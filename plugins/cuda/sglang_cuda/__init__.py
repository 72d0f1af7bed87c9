"""sglang-core on NVIDIA GPUs."""
