"""sglang-core on AMD GPUs."""
