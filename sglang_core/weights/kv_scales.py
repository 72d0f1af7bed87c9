"""Names that published checkpoints give the scales of cached keys and values, and the one name that layers ask for.

Read are, beside a layer's `self_attn.k_scale` and `self_attn.v_scale` (compressed-tensors, AutoFP8): `attn.k_scale`,
`k_proj.k_scale` and `v_proj.v_scale` (modelopt), `qkv_proj.k_scale`, and `k_proj.output_scale` (early exports). The single `kv_scale`
of the first exports is not: whether it fits keys or values better is not known.
"""

from __future__ import annotations

import re

_SCALE = re.compile(r"\.(?:(?:attn|qkv_proj|k_proj|v_proj)\.)?([kv])_scale$")
_OUTPUT = re.compile(r"\.([kv])_proj\.output_scale$")
_UNREAD = re.compile(r"_attn\.(?:attn\.|q_proj\.|qkv_proj\.)?(?:[qkv]|prob)_scale$")


def kv_scale_name(name: str) -> str:
    """`name`, or the name that layers have where it is that of a KV scale in another spelling."""
    return _OUTPUT.sub(r".\1_scale", _SCALE.sub(r".\1_scale", name))


def is_attention_scale(name: str) -> bool:
    """A scale that only a quantised cache (or quantised attention, which nothing here does) has a use for."""
    return _UNREAD.search(name) is not None
