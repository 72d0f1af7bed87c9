"""The HTTP front: routes, schemas, keys, metrics. It speaks to the engine through `engine.requests.Client` alone."""
