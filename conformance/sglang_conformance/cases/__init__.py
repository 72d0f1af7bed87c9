"""The cases, one file an op family. Each file adds its own to `case.CASES` when imported."""
