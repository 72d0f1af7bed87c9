"""Claims: what is claimed where, version bounds, and waivers."""

from __future__ import annotations

from datetime import date

import pytest

from sglang_core.backend.claims import Claim, Claims, Support, Waiver
from sglang_core.errors import PluginError

WAIVER = {"reason": "slow driver", "url": "https://example.com/1", "expires": "2027-01-31"}


def test_the_first_claim_that_covers_decides() -> None:
    claims = Claims(
        (
            Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED),
            Claim(op="gemm.linear", formats=("dense",), dtypes=("bfloat16", "float16")),
        )
    )
    assert claims.support("gemm.linear", fmt="dense", dtype="bfloat16") is Support.NATIVE
    assert claims.support("gemm.linear", fmt="dense", dtype="float16") is Support.UNSUPPORTED
    assert claims.support("gemm.linear", fmt="int8", dtype="bfloat16") is Support.REFERENCE
    assert claims.support("norm.rms", dtype="bfloat16") is Support.REFERENCE


@pytest.mark.parametrize(
    ("requires", "support", "unmet"),
    [
        (("torch>=1.0",), Support.NATIVE, None),
        (("torch>=99",), Support.REFERENCE, "needs torch>=99, and"),
        (("torch>=1.0", "no-such-package>=1"), Support.REFERENCE, "which is not installed"),
    ],
)
def test_a_claim_holds_only_with_the_versions_it_requires(
    requires: tuple[str, ...], support: Support, unmet: str | None
) -> None:
    claim = Claim(op="norm.rms", requires=requires)
    assert Claims((claim,)).support("norm.rms") is support
    assert claim.unmet is None if unmet is None else unmet in str(claim.unmet)


def test_a_requirement_that_is_none_is_refused() -> None:
    with pytest.raises(PluginError, match="torch>=2.12"):
        Claim(op="norm.rms", requires=("torch newer than 2",))


def test_a_waiver_covers_titles_by_stars_only() -> None:
    waiver = Waiver(cases="attn.paged[window 1*-float32]", **WAIVER)
    assert waiver.covers("attn.paged[window 16-float32]")
    assert not waiver.covers("attn.paged[window 16-bfloat16]")
    assert not waiver.covers("attn.paged[window 50-float32]")
    assert not waiver.covers("xattn.paged[window 16-float32]")
    assert not Waiver(cases="norm.rms[ab]", **WAIVER).covers("norm.rmsa"), "brackets are no character class"


def test_a_waiver_holds_on_its_last_day_and_not_after() -> None:
    waiver = Waiver(cases="*", **WAIVER)
    assert not waiver.expired(date(2027, 1, 31))
    assert waiver.expired(date(2027, 2, 1))


@pytest.mark.parametrize("wrong", [{"url": "ask me"}, {"expires": "soon"}, {"url": ""}])
def test_a_waiver_needs_a_url_and_a_date(wrong: dict[str, str]) -> None:
    with pytest.raises(PluginError):
        Waiver(cases="*", **(WAIVER | wrong))
