"""The Acme accelerator, which is the host CPU by another name."""
