"""The engine: settles the config, starts the ranks, owns the step loop, and speaks to its clients."""
