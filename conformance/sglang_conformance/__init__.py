"""The conformance suite of sglang-core backends."""

__version__ = "0.1.0"
