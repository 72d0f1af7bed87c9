"""Ops whose definition is what XLA should compile: elementwise work, norms, routing and sampling, which it fuses by itself.

Each is the op's body, traced. A kernel by hand would only stand in the way of fusion.
"""

from __future__ import annotations

from typing import Any

from sglang_core.api.ops import OPS
from sglang_tpu.environment import on_device
from sglang_tpu.mesh import first_of_rank


def _embed_lookup(ids: Any, weight: Any, vocab_start: int = 0) -> Any:
    """As the op says. A mesh is traced as rank 0, whose rows are the first; another's come after as many as it has."""
    return OPS["embed.lookup"].body(ids, weight, vocab_start + first_of_rank(weight.shape[0]))


def _lora_embed(y: Any, ids: Any, a: Any, b: Any, token_adapter: Any, scale: Any, vocab_start: int = 0) -> Any:
    """As the op says; over a mesh as `_embed_lookup`."""
    return OPS["lora.embed"].body(y, ids, a, b, token_adapter, scale, vocab_start + first_of_rank(a.shape[1]))


norm_rms = on_device(OPS["norm.rms"].body)
norm_add_rms = on_device(OPS["norm.add_rms"].body)
norm_layer = on_device(OPS["norm.layer"].body)
rope_apply = on_device(OPS["rope.apply"].body)
act_gated = on_device(OPS["act.gated"].body)
embed_lookup = on_device(_embed_lookup)
logits_soft_cap = on_device(OPS["logits.soft_cap"].body)
logits_mask = on_device(OPS["logits.mask"].body)
logits_adjust = on_device(OPS["logits.adjust"].body)
sample = on_device(OPS["sample.sample"].body)
moe_route = on_device(OPS["moe.route"].body)
causal_conv1d = on_device(OPS["ssm.causal_conv1d"].body)
gated_delta_rule = on_device(OPS["ssm.gated_delta_rule"].body)
lora_apply = on_device(OPS["lora.apply"].body)
lora_embed = on_device(_lora_embed)
