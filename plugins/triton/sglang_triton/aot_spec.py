"""`AotSpec`: one compilation of a kernel that has to work without a device at hand. Each kernel module lists its own in `AOT`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_triton.tuning import Config, choose_for

POINTER = "*"
# Of what streams: 16 bytes a thread. AMD's waves are of 64 lanes, so tiles as large may leave less.
WIDE = {"sm_": ("ld.global.v4", "st.global.v4")}
# Of codes of fp8: two an instruction, saturated.
SATFINITE = dict.fromkeys(("sm_90", "sm_100"), "cvt.rn.satfinite.e4m3x2.f32")
WIDE_EVERYWHERE = WIDE | {"gfx9": "_store_dwordx4"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AotSpec:
    """A kernel as a model would launch it.

    `sizes` is what the launcher asks `tuning.choose` about; `signature` has the run-time parameters in Triton's words ("*bf16",
    "i32"), perhaps those of the module's other kernels too, and `constexprs` what no config gives. Pointers are taken as aligned to 16 bytes, and so are integers but for those in
    `odd`. `instructions`: by prefix of the architecture, what its assembly must have ("sm_90": "wgmma"), or several. `fixed`: tiles and
    launch options of a kernel that no config has.
    """

    op: str
    tuned_as: str = ""  # the op whose configs it takes, where that is another
    name: str = ""  # what sets it apart from the op's others: "gelu", "M=4096"
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int | str] = field(default_factory=dict)
    odd: tuple[str, ...] = ()
    instructions: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    fixed: Config | None = None
    archs: tuple[str, ...] = ()  # the only ones it is for; (): all

    @property
    def title(self) -> str:
        return f"{self.op}[{self.name}]" if self.name else self.op

    def config(self, arch: str) -> Config:
        return choose_for(arch, self.tuned_as or self.op, self.sizes) if self.fixed is None else self.fixed

    def attrs(self) -> dict[tuple[int, ...], list[list[object]]]:
        """What Triton finds out about arguments at a launch, as its compiler takes it."""
        types = [(i, name, self.signature.get(name, "")) for i, name in enumerate(self.kernel.arg_names)]
        whole = [i for i, name, of in types if of[:1] == POINTER or (of[:1] == "i" and name not in self.odd)]
        return {(i,): [["tt.divisibility", 16]] for i in whole}
