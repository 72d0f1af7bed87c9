"""Ops whose definition is a handful of PyTorch's operators, which torch_npu has on the NPU: named here as what they are."""

from sglang_core.api.ops import OPS

embed_lookup = OPS["embed.lookup"].body
sample = OPS["sample.sample"].body
route = OPS["moe.route"].body
