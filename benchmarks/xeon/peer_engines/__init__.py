"""Engines that benchmarks/xeon/peers.py compares: children, workloads, checkpoints."""
