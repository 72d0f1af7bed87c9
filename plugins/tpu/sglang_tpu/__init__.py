"""sglang-core on TPUs: steps traced through torchax and compiled whole by XLA."""
