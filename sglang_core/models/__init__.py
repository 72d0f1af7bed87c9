"""Models, one file per architecture in the paper's order, and the registry."""
