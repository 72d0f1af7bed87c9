"""An Ascend NPU that is the host: every call of a fused op is checked against the vendor's schema, Meta kernel and documentation, and computed on the CPU."""
