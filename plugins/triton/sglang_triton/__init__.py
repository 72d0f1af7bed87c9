"""Triton kernels for sglang-core: one file an op family, a launcher with the op's signature in each."""
