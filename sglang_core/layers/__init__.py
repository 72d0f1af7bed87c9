"""Layers: shapes, sharding and bound ops; no kernels."""
