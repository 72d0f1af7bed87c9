"""What the prefix tree is keyed by."""

from __future__ import annotations

from sglang_core.types import Req


def cache_key(req: Req, start: int = 0, stop: int | None = None) -> list[int]:
    """Ids of positions `[start, stop)` as the prefix tree is keyed by them: all known ones by default. Not to be changed."""
    if start == 0 and stop is None and not req.output_ids:  # no copy: the policies ask this of every req that waits
        return req.input_ids if req.cache_ids is None else req.cache_ids
    end = req.num_tokens if stop is None else stop
    if req.cache_ids is None:
        return req.token_ids(start, end)
    return (req.cache_ids + req.output_ids)[start:end]
