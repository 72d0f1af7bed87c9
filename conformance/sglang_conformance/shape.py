"""What each field of a report looks like: a report is made by one program and read by another, on another machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from sglang_conformance import mustpass
from sglang_conformance.perf.figures import Perf
from sglang_conformance.result import Verdict

Check = Callable[[Any], bool]


def is_list(of: Check) -> Check:
    return lambda x: isinstance(x, list) and all(map(of, x))


def is_dict(of: Check, *keys: str) -> Check:
    """Of strings to `of`, these keys among them."""
    return lambda x: isinstance(x, dict) and {*keys} <= set(x) and all(map(of, x.values()))


def is_record(**fields: Check) -> Check:
    """With just these keys."""
    return lambda x: isinstance(x, dict) and set(x) == set(fields) and all(of(x[key]) for key, of in fields.items())


def is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x)


def is_hash(x: Any) -> bool:
    return isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None


def is_count(x: Any) -> bool:
    return type(x) is int and x >= 0


def is_seconds(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x < 1e9


def is_moment(x: Any) -> bool:
    """A time with its offset from UTC."""
    try:
        return datetime.fromisoformat(x).tzinfo is not None
    except (TypeError, ValueError):
        return False


def is_version(x: Any) -> bool:
    return isinstance(x, str) and re.fullmatch(r"\d+\.\d+", x) is not None


def is_perf(x: Any) -> bool:
    """The figures of a run that measured, the reason of one that could not, or none."""
    if x is None or (isinstance(x, dict) and set(x) == {"error"}):
        return x is None or is_text(x["error"])
    try:
        return Perf.from_json(x).seconds >= 0
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def is_bool(x: Any) -> bool:
    return isinstance(x, bool)


def is_str(x: Any) -> bool:
    return isinstance(x, str)


FACT: Check = lambda x: isinstance(x, str | int | float | bool)  # noqa: E731
TEXTS = is_list(is_text)
FIELDS: dict[str, Check] = {
    "schema": is_count,
    "made": is_moment,
    "api_version": is_version,
    "versions": is_dict(is_text, "sglang-core", "sglang-conformance", "torch", "python", "platform"),
    "packages": is_dict(is_hash, "sglang_core", "sglang_conformance"),
    "mustpass_sha256": is_hash,
    "tier": lambda x: x in (mustpass.FAST, mustpass.FULL),
    "partial": is_bool,
    "strict": is_bool,
    "seed": lambda x: type(x) is int,
    "seconds": is_seconds,
    "device": is_record(
        backend=is_text,
        index=is_count,
        path=is_text,
        name=is_text,
        score=lambda x: type(x) is int,
        total_memory=is_count,
        facts=is_dict(FACT),
        versions=lambda x: bool(x) and is_dict(is_text)(x),
        notes=is_list(is_record(name=is_text, found=is_text, fix=is_str)),
        problem=lambda x: x == "",  # it was opened
    ),
    "profiles": TEXTS,
    "levels": is_dict(lambda x: x in ("no", "native", "emulated", "reference")),
    "claims": is_list(
        is_record(
            op=is_text,
            formats=TEXTS,
            dtypes=TEXTS,
            support=is_text,
            requires=TEXTS,
            unmet=lambda x: x is None or is_text(x),
        )
    ),
    "waivers": is_list(is_record(cases=is_text, reason=is_str, url=is_text, expires=is_text)),
    "counts": is_dict(is_count, *(verdict.value for verdict in Verdict)),
    "problems": TEXTS,
    "untested_claims": TEXTS,
    "explain": is_list(
        is_record(op=is_text, fmt=is_text, dtype=is_text, provider=is_str, why=is_text, kernels=TEXTS),
    ),
    "results": is_list(lambda x: isinstance(x, dict)),  # `load` has read them
    "perf": is_perf,
    "digest": is_hash,
}


def misshapen(data: dict[str, Any]) -> list[str]:
    """Fields that are not there, are not known, or cannot be what they say, in sentences."""
    found = [f"it lacks {', '.join(missing)}"] if (missing := sorted(set(FIELDS) - set(data))) else []
    if unknown := sorted(set(data) - set(FIELDS)):
        found.append(f"it has {', '.join(unknown)}, which no report of this suite has")
    for name, check in FIELDS.items():
        if name in data and not check(data[name]):
            hint = "; the backend's probe gives DeviceInfo no versions" if _unversioned(name, data) else ""
            found.append(f"its {name} is not what a report has there: {str(data[name])[:80]!r}{hint}")
    return found


def _unversioned(name: str, data: dict[str, Any]) -> bool:
    return name == "device" and isinstance(data[name], dict) and not data[name].get("versions")
