"""The ops a kernel implements: signatures, spec dataclasses, and bodies to compare with. Imports torch.

`OPS["norm.rms"].body` is the definition of an op; a kernel of that op takes the same arguments.
"""

from __future__ import annotations

from sglang_core.ops import OPS, OpDef, op
from sglang_core.ops.activation import GateKind
from sglang_core.ops.attention import AttnBatch, AttnSpec, Plan, RaggedBatch
from sglang_core.ops.attention_plan import PlanStatic, Tiles
from sglang_core.ops.codes import CodeKind, Codes
from sglang_core.ops.formats import Fmt
from sglang_core.ops.lora import ExpertAdapters
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.moe import ExpertSpec, RouteSpec
from sglang_core.ops.rope import RopeSpec
from sglang_core.ops.rope_paged import HeadNorms
from sglang_core.ops.sampling import SampleParams
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StateBatch, StatePlan, StatePlanStatic
from sglang_core.ops.tree_mask import within_window
from sglang_core.ops.weight import PackedWeight

__all__ = [
    "OPS",
    "AttnBatch",
    "AttnSpec",
    "CodeKind",
    "Codes",
    "ExpertAdapters",
    "ExpertSpec",
    "Fmt",
    "GateKind",
    "GatedDeltaSpec",
    "HeadNorms",
    "MLASpec",
    "OpDef",
    "PackedWeight",
    "Plan",
    "PlanStatic",
    "RaggedBatch",
    "RopeSpec",
    "RouteSpec",
    "SampleParams",
    "StateBatch",
    "StatePlan",
    "StatePlanStatic",
    "Tiles",
    "op",
    "within_window",
]
