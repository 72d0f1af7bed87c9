"""Groups of ranks, their collectives, and which part of a tensor a rank holds."""
