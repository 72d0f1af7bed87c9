"""How fast each op is, next to what the device itself can read and multiply: never a verdict."""
