"""Gemma 3, text: Gemma 2's layer with head norms and a rope of its own for windowed layers, all of which is config."""

from __future__ import annotations

from sglang_core.models.gemma2 import Gemma2ForCausalLM


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """The text-only checkpoints."""


class Gemma3ForConditionalGeneration(Gemma2ForCausalLM):
    """The language model of a vision-language checkpoint; its vision tower stays in the file."""

    renames = (("language_model.", ""), ("model.language_model.", "model."))
    ignored = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
