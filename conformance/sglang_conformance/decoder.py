"""A decoder of two layers made of an env's ops, stepped the way the engine does it: two buckets, padding, pages that come and go.

The token that follows is made of its predecessor by integer arithmetic and not sampled, so that rounding cannot change what the
device feeds back to itself. Nothing here is a rule of its own: it is `fn(state, forward_batch)`, in small.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sglang_conformance.env import Env
from sglang_conformance.guard import unguarded
from sglang_core.backend.interface import Bucket
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.ops.attention import AttnBatch, AttnSpec, Plan
from sglang_core.ops.rope import RopeSpec, rope_table
from sglang_core.ops.weight import PackedWeight

LAYERS, WIDTH, VOCAB, PAGE_SIZE, PAGES, MAX_REQS, EPS = 2, 64, 96, 16, 14, 4, 1e-6
DECODE = Bucket(num_tokens=MAX_REQS, num_reqs=MAX_REQS, max_extend=1, num_pages=3)
PREFILL = Bucket(num_tokens=24, num_reqs=MAX_REQS, max_extend=20, num_pages=3)
# Weights are not scaled: this gives scores a deviation of a half, which rounding of half types does not upset.
SPEC = AttnSpec(num_heads=4, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.001)
ROPE = RopeSpec(head_dim=64, rotary_dim=64)


@dataclass(kw_only=True, slots=True)
class State:
    """What a step may change."""

    pool: Pool
    next_token_ids: Tensor  # int32[MAX_REQS + 1]; the last row is padding's

    def mutable_tensors(self) -> Iterator[Tensor]:
        yield from self.pool.leaves
        yield self.next_token_ids


@dataclass(kw_only=True, slots=True)
class Batch:
    """One step of T tokens over R reqs on the device, padded to its bucket."""

    token_ids: Tensor  # int32[T]; where token_slots >= 0, the id is next_token_ids[token_slots] instead
    token_slots: Tensor  # int32[T]
    positions: Tensor  # int32[T]
    sample_rows: Tensor  # int32[R]
    slots: Tensor  # int32[R]
    plan: Plan


@dataclass(kw_only=True, slots=True)
class Picked:
    """The token of each req, and its row among the token ids on the device."""

    ids: Tensor  # int32[R]
    slots: Tensor  # int32[R]


@dataclass(kw_only=True)
class Req:
    """`slot`: its row among the token ids on the device."""

    slot: int
    pages: list[int] = field(default_factory=list)
    length: int = 0


class Decoder(nn.Module):
    """Weights are buffers, as a runtime that lifts them wants them."""

    def __init__(self, env: Env) -> None:
        super().__init__()
        self._attn = {name: unguarded(op) for name, op in env.paged_ops(SPEC, PAGE_SIZE).items()}
        self._rms = unguarded(env.op("norm.rms", dims={"M": WIDTH}))
        self._embed = unguarded(env.op("embed.lookup", dims={"V": VOCAB}))
        self._rope = unguarded(env.op("rope.apply", spec=ROPE, dims={"D": SPEC.head_dim}))
        q, kv = SPEC.num_heads * SPEC.head_dim, SPEC.num_kv_heads * SPEC.head_dim
        self._sizes = [q, kv, kv]
        self.table, self.norm = nn.Buffer(env.normal(VOCAB, WIDTH)), nn.Buffer(env.normal(WIDTH, mean=1.0))
        self.rope = nn.Buffer(env.place(rope_table(ROPE, PAGE_SIZE * DECODE.num_pages)))
        self.qkv = nn.ModuleList(self._weight(env, q + 2 * kv, WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(self._weight(env, WIDTH, q) for _ in range(LAYERS))
        self.head = self._weight(env, VOCAB, WIDTH)
        self._linears = {}
        for n, k in ((q + 2 * kv, WIDTH), (WIDTH, q), (VOCAB, WIDTH)):
            self._linears[n, k] = unguarded(env.op("gemm.linear", fmt="dense", dims={"in": k, "out": n}))

    @staticmethod
    def _weight(env: Env, n: int, k: int) -> PackedWeight:
        dtype = str(env.dtype).removeprefix("torch.")
        site = OpSite(op="gemm.linear", layer="Conformance", dtype=dtype, fmt="dense", dims={"in": k, "out": n})
        return env.weight(n, k, site)

    def plan(self, batch: AttnBatch, device: torch.device) -> Plan:
        return self._attn["attn.plan"](SPEC, batch, device)  # type: ignore[no-any-return]

    def step(self, state: State, fb: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """-> hidden: [T, M], logits: [R, V], following ids: int32[R]."""
        on_device = state.next_token_ids[fb.token_slots.clamp(min=0)]
        ids = torch.where(fb.token_slots >= 0, on_device, fb.token_ids)
        h = self._embed(ids, self.table, 0)
        for layer in range(LAYERS):
            x = self._linear(self._rms(h, self.norm, EPS), self.qkv[layer])
            parts = torch.split(x, self._sizes, dim=-1)
            q, k, v = (torch.unflatten(part, -1, (-1, SPEC.head_dim)) for part in parts)
            q, k = self._rope(q, k, fb.positions, self.rope, ROPE)
            o = self._attn["attn.paged"](q, k, v, state.pool, layer, SPEC, fb.plan)
            h = h + self._linear(o.flatten(1), self.out[layer])
        rows = fb.sample_rows
        following = (ids[rows] * 5 + fb.positions[rows] + 3) % VOCAB
        return h, self._linear(self._rms(h[rows], self.norm, EPS), self.head), following

    def pick(self, state: State, picked: Picked) -> Tensor:
        """What sampling is to the engine: a step of its own, as the forward would read what it has overwritten if run twice."""
        state.next_token_ids.index_put_((picked.slots,), picked.ids)
        return picked.ids + 0

    def _linear(self, x: Tensor, w: nn.Module) -> Tensor:
        assert isinstance(w, PackedWeight)
        return self._linears[w.out_features, w.in_features](x, w, None)  # type: ignore[no-any-return]


class Stepper:
    """Compiles the decoder's step and runs it. What a step returns must stand until the second call after it: the engine keeps
    two steps in flight."""

    def __init__(self, env: Env) -> None:
        self.env, self.random, self.model = env, random.Random(env.seed), Decoder(env)
        spec = PoolSpec(
            num_layers=LAYERS,
            page_size=PAGE_SIZE,
            num_kv_heads=SPEC.num_kv_heads,
            head_dim=SPEC.head_dim,
            v_head_dim=SPEC.v_head_dim,
            dtype=env.dtype,
        )
        self.state = State(pool=env.pool(spec, PAGES), next_token_ids=env.place(_int([0] * (MAX_REQS + 1))))
        self._step = env.runtime.compile_step(self.model.step, self.state, (DECODE, PREFILL))
        self._pick = env.runtime.compile_step(self.model.pick, self.state, (DECODE, PREFILL))
        self._free = [int(page) + 1 for page in env.permutation(PAGES - 1)]
        self._standing: list[tuple[Tensor, Tensor]] = []  # what the call before returned, and what it was
        for bucket in (DECODE, PREFILL):  # at start: batches of padding
            self._call(self.batch([], bucket))

    def run(self, reqs: Sequence[tuple[Req, int]], bucket: Bucket) -> dict[str, Tensor]:
        """Extend each req by so many tokens: its last one as the device knows it, or new ones from the host.

        -> hidden: [tokens, M], logits: [reqs, V], without padding.
        """
        return self.call(self.batch(reqs, bucket), reqs)

    def call(self, batch: Batch, reqs: Sequence[tuple[Req, int]]) -> dict[str, Tensor]:
        hidden, logits = self._call(batch)
        return {"hidden": hidden[: sum(n for _, n in reqs)].clone(), "logits": logits[: len(reqs)].clone()}

    def _call(self, batch: Batch) -> tuple[Tensor, Tensor]:
        *made, following = self._step(batch)
        made.append(self._pick(Picked(ids=following, slots=batch.slots)))
        for now, then in self._standing:
            assert torch.equal(now.nan_to_num(), then.nan_to_num()), "a call changed what the call before it returned"
        self._standing = [(x, x.clone()) for x in made]
        return made[0], made[1]

    def batch(self, reqs: Sequence[tuple[Req, int]], bucket: Bucket) -> Batch:
        """Lay a step out and grant the pages it needs. A req that decodes, alone or among prefills, takes its id from the device."""
        env, tokens = self.env, bucket.num_tokens
        extends, prefixes = [n for _, n in reqs], [req.length for req, _ in reqs]
        for req, n in reqs:
            req.length += n
            while len(req.pages) * PAGE_SIZE < req.length:
                req.pages.append(self._free.pop())
        places = [(req, p) for (req, n), start in zip(reqs, prefixes, strict=True) for p in range(start, start + n)]
        ends = [sum(extends[: i + 1]) for i in range(len(reqs))]
        none = [0] * (bucket.num_reqs - len(reqs))
        decodes = [n == 1 and start > 0 for (_, n), start in zip(reqs, prefixes, strict=True)]
        source = [req.slot if decode else -1 for (req, n), decode in zip(reqs, decodes, strict=True) for _ in range(n)]
        batch = AttnBatch(
            cu_extend_cpu=_int([0, *ends, *(n + (ends or [0])[-1] for n in none)]),
            prefix_lens_cpu=_int(prefixes + none),
            seq_lens_cpu=_int([req.length for req, _ in reqs] + none),
            page_table_cpu=_int(
                [_padded(req.pages, bucket.num_pages) for req, _ in reqs] + [[0] * bucket.num_pages for _ in none]
            ),
            slot_mapping_cpu=_int(
                _padded([r.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for r, p in places], tokens)
            ),
            num_tokens=tokens,
            num_reqs=bucket.num_reqs,
            max_extend=bucket.max_extend,
            num_pages=bucket.num_pages,
            page_size=PAGE_SIZE,
            static=True,
        )
        return Batch(
            token_ids=env.place(_int(_padded([self.random.randrange(VOCAB) for _ in places], tokens))),
            token_slots=env.place(_int(_padded(source, tokens, -1))),
            positions=env.place(_int(_padded([p for _, p in places], tokens))),
            sample_rows=env.place(_int(_padded([end - 1 for end in ends], bucket.num_reqs))),
            slots=env.place(_int(_padded([req.slot for req, _ in reqs], bucket.num_reqs, MAX_REQS))),
            plan=self.model.plan(batch, env.device),
        )

    def release(self, req: Req) -> None:
        """Its pages go to whoever comes next, full of NaN."""
        self.state.pool.poison(req.pages)
        self._free = self._free + req.pages
        req.pages, req.length = [], 0

    def contents(self, reqs: Sequence[Req]) -> dict[str, Tensor]:
        """What the pool holds for each req, and the token ids on the device."""
        made = {"next ids": self.state.next_token_ids[:MAX_REQS].clone()}
        for req in reqs:
            slots = [req.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(req.length)]
            for layer in range(LAYERS):
                k, v = self.state.pool.gather(layer, self.env.place(_int(slots)))
                made |= {f"k{layer} of {req.slot}": k, f"v{layer} of {req.slot}": v}
        return made


def _padded(values: Sequence[int], size: int, value: int = 0) -> list[int]:
    return [*values, *[value] * (size - len(values))]


def _int(values: Sequence[int] | Sequence[list[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
