"""What the kernels in Gluon take, for Hopper and for Blackwell, as facts. Imports neither torch nor triton."""

from __future__ import annotations

from sglang_core.api import SelectionContext

HOPPER, BLACKWELL = "hopper", "blackwell"  # the providers
ARCHS = {HOPPER: "sm_90", BLACKWELL: "sm_100"}
HALVES = ("bfloat16", "float16")
DIMS = ((64, 128, 192), (64, 128))  # of keys, of values: what shared memory holds two blocks of
ROWS = 128  # of a tile, which all query heads of a KV head must fit
LATENT = (512, 64)  # dims of a latent and of a rotated key
FP8 = ("fp8.tensor", "fp8.token_channel", "fp8.block128")


def device_limits(ctx: SelectionContext, arch: str) -> str | None:
    """What all of them have in common."""
    if not ctx.device.path.endswith(f"/{arch}"):
        return f"is for {arch}, whose instructions it consists of, not {ctx.device.path}"
    return None if ctx.site.dtype in HALVES else f"takes bfloat16 and float16, not {ctx.site.dtype}"


def attention_limits(ctx: SelectionContext, arch: str) -> str | None:
    """Attention, over packed rows and over a pool."""
    spec = ctx.site.spec
    if reason := device_limits(ctx, arch):
        return reason
    if spec.head_dim not in DIMS[0] or spec.v_head_dim not in DIMS[1]:
        return f"takes keys of 64, 128, 192 and values of 64, 128 dims, not {spec.head_dim} and {spec.v_head_dim}"
    if (group := spec.num_heads // spec.num_kv_heads) > ROWS:
        return f"takes at most {ROWS} query heads a KV head, not {group}"
    unknown = {
        "windows": spec.window,
        "soft caps": spec.soft_cap,
        "sinks": spec.has_sinks,
        "trees of drafts": spec.tree,
    }
    if found := [name for name, there in unknown.items() if there]:
        return f"takes no {', '.join(found)}"
    return None if spec.scale > 0 else f"takes a positive scale, not {spec.scale}"


def attention_pool_limits(ctx: SelectionContext, arch: str) -> str | None:
    return pool_limits(ctx) or attention_limits(ctx, arch)


def pool_limits(ctx: SelectionContext) -> str | None:
    """A page is copied as a box, or as several."""
    stored, page = ctx.site.spec.kv_dtype, ctx.page_size
    if stored not in ("auto", ctx.site.dtype):
        return f"reads keys as they are, and they are {stored}"
    if page < 16 or page & (page - 1):
        return f"takes pages of 16, 32, 64 and so on, not {page}; set --page-size"
    return None


def linear_limits(ctx: SelectionContext, arch: str) -> str | None:
    """Rows of codes and of results begin at multiples of 16 bytes, as TMA copies them."""
    if ctx.site.fmt not in FP8:
        return f"takes weights in {', '.join(FP8)}, not {ctx.site.fmt}"
    units = {"in": 16, "out": 8}
    if wrong := [f"{name}={ctx.site.dims[name]}" for name, unit in units.items() if ctx.site.dims.get(name, 0) % unit]:
        return f"takes an in of a multiple of 16 and an out of 8, not {', '.join(wrong)}"
    return device_limits(ctx, arch)


def latent_limits(ctx: SelectionContext, arch: str) -> str | None:
    """The sizes of DeepSeek-V2 and V3 and of models like them."""
    spec = ctx.site.spec
    if (spec.rank, spec.rope_dim) != LATENT:
        return f"takes latents of {LATENT[0]} dims and rotated keys of {LATENT[1]}, not {spec.rank} and {spec.rope_dim}"
    if spec.tree:
        return "takes no trees of drafts"
    if spec.scale <= 0:
        return f"takes a positive scale, not {spec.scale}"
    return pool_limits(ctx) or device_limits(ctx, arch)
