"""Adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.conformance.mutants.bodies import Mutant, body


def adapters_of_their_neighbour(y: Tensor, x: Tensor, a: Tensor, b: Tensor, own: Tensor, *args: Any) -> Tensor:
    other = torch.where(own >= 0, (own + 1) % a.shape[0], own)
    return body("lora.apply", y, x, a, b, other, *args)  # type: ignore[no-any-return]


def adapter_without_scale(*args: Any) -> Tensor:
    return body("lora.apply", *args[:5], torch.ones_like(args[5]), *args[6:])  # type: ignore[no-any-return]


def adapter_of_those_without(y: Tensor, x: Tensor, a: Tensor, b: Tensor, own: Tensor, *args: Any) -> Tensor:
    return body("lora.apply", y, x, a, b, own % a.shape[0], *args)  # type: ignore[no-any-return]


def scale_of_the_first_part(*args: Any) -> Tensor:
    return body("lora.apply", *args[:5], args[5][:, :1].expand_as(args[5]), *args[6:])  # type: ignore[no-any-return]


def embeds_from_the_first_row(*args: Any) -> Tensor:
    """Forgets where this rank's part of the table starts."""
    return body("lora.embed", *args[:6], 0)  # type: ignore[no-any-return]


def expert_adapters_of_gate_only(*args: Any, **kwargs: Any) -> Tensor:
    given = args[6]
    scale = given.scale.clone()
    scale[..., 1] = 0
    return body("lora.experts", *args[:6], replace(given, scale=scale), args[7], **kwargs)  # type: ignore[no-any-return]


MUTANTS = {
    "adapters_of_their_neighbour": Mutant("lora.apply"),
    "adapter_without_scale": Mutant("lora.apply"),
    "adapter_of_those_without": Mutant("lora.apply"),
    "scale_of_the_first_part": Mutant("lora.apply"),
    "embeds_from_the_first_row": Mutant("lora.embed"),
    "expert_adapters_of_gate_only": Mutant("lora.experts"),
}
