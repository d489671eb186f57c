"""The Triton kernels against the torch references, for any device: on a GPU (tests/gpu/test_triton.py),
and in Triton's interpreter on CPU (tests/ops/test_triton.py), for which

    TRITON_INTERPRET=1 python -m tests.ops.triton_checks

runs all cases and prints what failed, as JSON: a process is interpreted as a whole or not at all.
Outputs are poisoned with NaN and lie in larger buffers, whose rest must stay untouched; sizes are odd.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.comm.cuda import world
from tests.comm.cuda.world import World
from weaveinf.ops import select
from weaveinf.ops.activation import silu_mul_reference
from weaveinf.ops.attention import Paged, paged_attention_reference
from weaveinf.ops.index import FP8, IndexKeys, quantize, scores_reference
from weaveinf.ops.moe import moe_reference, route
from weaveinf.ops.norm import Joint, add_rms_norm_reference, rms_norm_reference
from weaveinf.ops.rope import rope_reference_, write_kv_reference

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Absolute and relative tolerance per dtype: two roundings to it (float32: of the order of a long sum)."""


def close(got: Tensor, want: Tensor) -> None:
    tolerance = ROUNDING[want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def check_rms_norm(device: str, dtype: torch.dtype) -> None:
    from weaveinf.ops import triton_elementwise as kernels

    torch.manual_seed(1)
    for shape in ((5, 33), (3, 2, 24), (7, 256), (0, 16)):
        wide = torch.randn(*shape[:-1], shape[-1] + 3, device=device).to(dtype)
        x, weight = wide[..., : shape[-1]], torch.randn(shape[-1], device=device).to(dtype)
        want = rms_norm_reference(x, weight, 1e-5, 1.0)
        close(kernels.rms_norm(x, weight, 1e-5, 1.0), want)
        held = torch.full_like(wide, torch.nan)
        kernels.rms_norm(x, weight, 1e-5, 1.0, out=held[..., : shape[-1]])
        close(held[..., : shape[-1]], want)
        assert held[..., shape[-1] :].isnan().all()
        kernels.rms_norm(x, weight, 1e-5, 1.0, out=x)
        close(x, want)


def check_add_rms_norm(device: str, dtype: torch.dtype) -> None:
    from weaveinf.ops import triton_elementwise as kernels

    torch.manual_seed(2)
    for rows, width, ranks in ((1, 40, 1), (6, 33, 2), (3, 128, 4), (0, 8, 2)):
        partials = [
            torch.randn(rows, width + rank, device=device).to(dtype)[:, :width] for rank in range(ranks)
        ]
        residual = torch.randn(rows, width, device=device).to(dtype)
        weight = torch.randn(width, device=device).to(dtype)
        want_residual, want = residual.clone(), torch.empty_like(residual)
        joint = Joint(weight, 1e-6, 0.0, 0.5)
        add_rms_norm_reference(partials, want_residual, joint, want)
        out = torch.full_like(residual, torch.nan)
        assert kernels.add_rms_norm(partials, residual, joint, out) is out
        close(residual, want_residual)
        close(out, want)


def check_rope(device: str, dtype: torch.dtype) -> None:
    from weaveinf.ops import triton_elementwise as kernels

    torch.manual_seed(3)
    for rows, heads, head_dim, rotated in ((5, 3, 32, 32), (4, 5, 24, 20), (0, 2, 16, 16)):
        angle = torch.rand(64, rotated // 2, device=device) * 6
        cos_sin = torch.cat((angle.cos(), angle.sin()), 1)
        positions = torch.randint(64, (rows,), dtype=torch.int32, device=device)
        fused = torch.randn(rows, heads + 2, head_dim, device=device).to(dtype)
        want = fused.clone()
        rope_reference_(want[:, 1 : 1 + heads], cos_sin, positions)
        x = fused[:, 1 : 1 + heads]  # its neighbours must stay as they are
        assert kernels.rope_(x, cos_sin, positions) is x
        close(fused, want)


def check_write_kv(device: str, dtype: torch.dtype) -> None:
    from weaveinf.ops import triton_elementwise as kernels

    torch.manual_seed(4)
    rows, heads, head_dim = 7, 3, 20
    fused = torch.randn(rows, 2 * heads + 1, head_dim, device=device).to(dtype)
    k, v = fused[:, :heads], fused[:, heads : 2 * heads]
    slots = torch.randperm(24, device=device)[:rows].to(torch.int32)
    slots[3] = -1
    pools = [torch.full((6, 4, heads, head_dim), 7.0, device=device).to(dtype) for _ in range(2)]
    want = [pool.clone() for pool in pools]
    write_kv_reference(k, v, *want, slots)
    kernels.write_kv(k, v, *pools, slots)
    assert all(torch.equal(pool, expected) for pool, expected in zip(pools, want, strict=True))
    kernels.write_kv(k[:0], v[:0], *pools, slots[:0])


def check_silu_mul(device: str, dtype: torch.dtype) -> None:
    from weaveinf.ops import triton_elementwise as kernels

    torch.manual_seed(5)
    for rows, width in ((3, 21), (2, 2300), (0, 8)):
        gate_up = (4 * torch.randn(rows, 2 * width + 5, device=device)).to(dtype)[:, : 2 * width]
        want = silu_mul_reference(gate_up)
        close(kernels.silu_mul(gate_up), want)
        held = torch.full((rows, width + 2), torch.nan, dtype=dtype, device=device)
        kernels.silu_mul(gate_up, held[:, :width])
        close(held[:, :width], want)
        assert held[:, width:].isnan().all()


def check_attention(
    device: str,
    dtype: torch.dtype,
    group: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    kv_heads: int = 2,
    window: int | None = None,
    lengths: tuple[int, ...] = (37, 1, 70),
    rows_each: tuple[int, ...] = (9, 1, 1),
    consecutive: bool = True,
) -> None:
    """Sequences of `lengths` tokens, of which the last `rows_each` (or any so many) are queries."""
    from weaveinf.ops import triton_attention as kernels

    torch.manual_seed(6)
    blocks = [-(-length // page_size) for length in lengths]
    pages = torch.randperm(sum(blocks) + 2)
    # Pages that belong to nobody, and the unused ends of pages, hold NaN: reading them shows.
    pool = torch.full((2, len(pages), page_size, kv_heads, head_dim), torch.nan)
    table = torch.full((len(lengths), max(blocks) + 1), -1, dtype=torch.int32)
    positions = []
    for s, (length, count, rows) in enumerate(zip(lengths, blocks, rows_each, strict=True)):
        own, pages = pages[:count], pages[count:]
        table[s, :count] = own
        at = torch.arange(length)
        pool[:, own[at // page_size], at % page_size] = torch.randn(2, length, kv_heads, head_dim)
        last = torch.arange(length - rows, length)
        positions.append(last if consecutive else torch.randperm(length)[:rows].sort().values)
    starts = torch.tensor([0, *rows_each]).cumsum(0).to(torch.int32).to(device)
    where = torch.cat(positions).to(torch.int32).to(device)
    keys, values = pool.to(dtype).to(device)
    heads = kv_heads * group
    fused = torch.randn(len(where), heads + 3, head_dim, device=device).to(dtype)
    held = torch.full((len(where) + 2, heads, head_dim), torch.nan, dtype=dtype, device=device)
    arguments = ((keys, values), Paged(table.to(device), starts, where), head_dim**-0.5, window)
    q = fused[:, :heads]
    want = paged_attention_reference(q, *arguments)
    kernels.paged_attention(q, *arguments, out=held[:-2])
    close(held[:-2], want)
    assert held[-2:].isnan().all()
    close(kernels.paged_attention(q, *arguments), want)


def check_moe(
    device: str, dtype: torch.dtype, rows: int = 9, experts: int = 5, top_k: int = 2, used: int = 4
) -> None:
    """Of the experts, the first `used` are chosen; what no row chose holds NaN."""
    from weaveinf.ops import triton_moe as kernels

    torch.manual_seed(7)
    hidden, inner = 40, 88
    x = torch.randn(rows, hidden + 3, device=device).to(dtype)[:, :hidden]
    gate_up = torch.randn(experts, 2 * inner, hidden, device=device).to(dtype)
    down = (torch.randn(experts, hidden, inner, device=device) / 8).to(dtype)
    gate_up[used:] = down[used:] = torch.nan
    logits = torch.randn(rows, experts, device=device)
    logits[:, used:] = -torch.inf
    shares, ids = route(logits, top_k, renormalize=True)
    tables = [
        torch.tensor([one.data_ptr() for one in weights], dtype=torch.int64, device=device)
        for weights in (gate_up, down)
    ]
    got = kernels.moe(x, *tables, inner, shares, ids)
    assert got.dtype == torch.float32 and got.shape == (rows, hidden)
    if rows:
        # Products before the activation may round apart, and 88 of them are summed.
        want = moe_reference(x, list(gate_up), list(down), shares, ids)
        tolerance = 4 * ROUNDING[dtype]
        torch.testing.assert_close(got.to(dtype), want, atol=tolerance, rtol=tolerance)


def check_seam(device: str, dtype: torch.dtype, ranks: int, rows: int, hidden: int) -> None:
    """All ranks here, their rows in fewer programs than there are; who is missed is named."""
    from weaveinf.comm.triton_seam import TritonSeam

    sizes = dtype, hidden, ranks, rows, 2
    kernel = TritonSeam(dtype, hidden, ranks, torch.device(device))
    world.check_sums(World(kernel, sizes, device))
    if ranks > 1:
        kernel = TritonSeam(dtype, hidden, ranks, torch.device(device))
        world.check_a_rank_is_missing(World(kernel, sizes, device))


def check_seam_keeps(device: str, dtype: torch.dtype, ranks: int, rows: int, kept_rows: int) -> None:
    """The residual of kept rows comes from the ranks in whose shares they were."""
    from weaveinf.comm.triton_seam import TritonSeam

    torch.manual_seed(3)
    one = World(TritonSeam(dtype, 48, ranks, torch.device(device)), (dtype, 48, ranks, rows, 3), device)
    weight = 1 + one.draw(48)
    first = [one.draw(rows, 48) for _ in range(ranks)]
    one.run(first, weight, fresh=True)
    kept = torch.randperm(rows, device=device)[:kept_rows].sort().values
    call = one.call
    call.residual_at, call.old_residual_at = call.old_residual_at, call.residual_at
    call.old_rows, call.kept = rows, kept.data_ptr()
    one.rows = kept_rows
    second = [one.draw(kept_rows, 48) for _ in range(ranks)]
    xs = one.run(second, weight, fresh=False)
    residual = torch.zeros(kept_rows, 48, dtype=dtype, device=device)
    want = torch.empty_like(residual)
    for parts in ([part[kept] for part in first], second):
        add_rms_norm_reference(parts, residual, Joint(weight, 1e-5, 0.5, 0.75), want)
    for x in xs:
        close(x, want)


SPANS = ((0, 1), (3, 3), (0, 700), (28, 1400), (5, 64), (0, 0))
"""First candidate of each row, and where they end."""


def paged(device: str, dtype: torch.dtype, page_size: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Vectors of `shape` for each token of SPANS in scattered pages, NaN in slots that are no candidates, and
    the rows' tables, whose unused ends are -1."""
    blocks = [-(-end // page_size) for _, end in SPANS]
    pages = torch.randperm(sum(blocks) + 2)
    pool = torch.full((len(pages), page_size, *shape), torch.nan)
    table = torch.full((len(SPANS), max(blocks) + 1), -1, dtype=torch.int32)
    for r, ((first, end), count) in enumerate(zip(SPANS, blocks, strict=True)):
        table[r, :count], pages = pages[:count], pages[count:]
        at = torch.arange(first, end)
        pool[table[r, at // page_size].long(), at % page_size] = torch.randn(end - first, *shape)
    return pool.to(dtype).to(device), table.to(device)


def spans(device: str) -> tuple[Tensor, Tensor]:
    firsts, ends = torch.tensor(SPANS, dtype=torch.int32, device=device).T.contiguous()
    return firsts, ends


def check_votes(
    device: str, dtype: torch.dtype, group: int, kv_heads: int, dim: int, page_size: int, kind: str = "soft"
) -> None:
    """kind: "soft", "channels" (of twice as many; some are none), "bounds", "sums of bounds"."""
    from weaveinf.ops import triton_select as kernels

    torch.manual_seed(9)
    keys, table = paged(device, dtype, page_size, (kv_heads, dim))
    keys[table[2, 0].long(), 0, 0] = torch.nan  # a score that is none
    elements = dim // 2 if "bounds" in kind else 2 * dim if kind == "channels" else dim
    q = torch.randn(len(SPANS), group * kv_heads + 3, elements, device=device).to(dtype)[
        :, : group * kv_heads
    ]
    channels = None
    if kind == "channels":
        channels = torch.stack([torch.randperm(elements)[:dim] for _ in range(kv_heads)]).int().to(device)
        channels[:, -1] = -1
    firsts, ends = spans(device)
    where, width = (table, firsts, ends), int(ends.max()) + 3
    given = (width, dim**-0.5, channels, "sums" not in kind)
    want = select.votes_reference(q.double(), keys.double(), where, *given)
    got = kernels.votes(q, keys, where, *given)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(got, kernels.votes(q, keys, where, *given))


def check_index(device: str, dtype: torch.dtype, heads: int, dim: int, page_size: int, fp8: bool) -> None:
    from weaveinf.ops import triton_select as kernels

    torch.manual_seed(10)
    values, table = paged(device, dtype, page_size, (dim,))
    keys = IndexKeys(*quantize(values.nan_to_num())) if fp8 else IndexKeys(values)
    q = torch.randn(len(SPANS), heads + 2, dim, device=device).to(FP8).to(dtype)[:, :heads]
    weights, ends = torch.randn(len(SPANS), heads, device=device), spans(device)[1]
    width = int(ends.max()) + 3
    got = kernels.index_scores(q, weights, *keys, table, ends, width)
    want = scores_reference(q, weights, keys, table, ends, width)
    assert got.dtype == torch.float32 and got.shape == want.shape
    counts = torch.arange(width, device=device) < ends[:, None]
    torch.testing.assert_close(got[counts], want[counts], atol=1e-3, rtol=1e-4, equal_nan=True)


def check_top_k(device: str, dtype: torch.dtype, width: int, capacity: int, rows: int = 5) -> None:
    """Scores of few values and of many, signed zeros, infinities and NaN; of all rows but the first, not all
    count, nor are as many wanted."""
    from weaveinf.ops import triton_select as kernels

    torch.manual_seed(11)
    scores = torch.randn(rows, width, device=device).to(dtype).float()
    scores[1::2] = (scores[1::2] * 2).round() / 2
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0):
        scores[:, torch.randint(width, (3,))] = value
    ends = torch.randint(width + 1, (rows,), dtype=torch.int32, device=device)
    wanted = torch.randint(capacity + 1, (rows,), dtype=torch.int32, device=device)
    ends[0], wanted[0], ends[-1], wanted[-1] = width, capacity, 0, capacity
    got, want = (f(scores, ends, wanted, capacity) for f in (kernels.top_k, select.top_k_reference))
    assert all(map(torch.equal, got, want))


def check_places(device: str, dtype: torch.dtype) -> None:
    from weaveinf.ops import triton_select as kernels

    torch.manual_seed(12)
    table = torch.randperm(3 * 90, device=device).int().view(3, 90)[:, :77]
    for kv_heads, count, run in ((3, 5, 8), (1, 700, 1), (2, 7, 4), (2, 0, 1)):
        index = torch.randint(-1, 77 * 8 // run, (3, kv_heads, count), device=device).int()
        want = select.places_reference(index, table, 8, run)
        assert torch.equal(kernels.places(index, table, 8, run), want)


def check_beside_keys(device: str, dtype: torch.dtype) -> None:
    """What is written beside the keys; the rest must stay as it is."""
    from weaveinf.ops import triton_select as kernels

    torch.manual_seed(13)
    keys = torch.randn(9, 12, 3, 24, device=device).to(dtype)
    pages, counts = torch.tensor([[7, 0, 4], [12, 1, 9]], device=device)
    rows = torch.randn(5, 7, 24, device=device).to(dtype)[:, 2:5]
    channels = torch.stack([torch.randperm(24, device=device)[:6] for _ in range(3)]).int()
    channels[1, 4] = -1
    slots = torch.tensor([17, -1, 107, 0, 5], dtype=torch.int32, device=device)
    bounds, pool = (torch.full(s, 7.0, device=device).to(dtype) for s in ((9, 3, 48), (9, 12, 3, 6)))
    want_bounds, want_pool = bounds.clone(), pool.clone()
    for page, count in zip(pages.tolist(), counts.tolist(), strict=True):
        held = keys[page, :count]
        want_bounds[page] = torch.cat([held.amax(0), held.amin(0)], -1)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            kept = rows[row].gather(1, channels.clamp(min=0).long()).masked_fill(channels < 0, 0)
            want_pool.flatten(0, 1)[slot] = kept
    kernels.write_bounds(keys, bounds, pages, counts)
    kernels.write_channels(rows, pool, channels, slots)
    assert torch.equal(bounds, want_bounds) and torch.equal(pool, want_pool)


CASES: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "rms_norm": (check_rms_norm, {}),
    "add_rms_norm": (check_add_rms_norm, {}),
    "rope": (check_rope, {}),
    "write_kv": (check_write_kv, {}),
    "silu_mul": (check_silu_mul, {}),
    "experts": (check_moe, {}),
    "experts: no rows": (check_moe, {"rows": 0}),
    "experts: one row": (check_moe, {"rows": 1, "experts": 16, "top_k": 4, "used": 15}),
    "experts: one for all rows": (check_moe, {"rows": 70, "experts": 3, "top_k": 1, "used": 1}),
    "experts: many rows": (check_moe, {"rows": 150, "experts": 4, "top_k": 3}),
    "seam: one rank": (check_seam, {"ranks": 1, "rows": 5, "hidden": 40}),
    "seam: two ranks": (check_seam, {"ranks": 2, "rows": 7, "hidden": 33}),
    "seam: five ranks, one row": (check_seam, {"ranks": 5, "rows": 1, "hidden": 64}),
    "seam: eight ranks": (check_seam, {"ranks": 8, "rows": 37, "hidden": 16}),
    "seam: kept rows": (check_seam_keeps, {"ranks": 3, "rows": 20, "kept_rows": 8}),
    "seam: few kept rows of few": (check_seam_keeps, {"ranks": 4, "rows": 3, "kept_rows": 1}),
    "attention: one head a group": (check_attention, {"group": 1}),
    "attention: groups of 3": (check_attention, {"group": 3}),
    "attention: groups of 7": (check_attention, {"group": 7}),
    "attention: groups of 20": (check_attention, {"group": 20}),
    "attention: head_dim 16, pages of 8": (check_attention, {"head_dim": 16, "page_size": 8}),
    "attention: head_dim 80, pages of 24": (check_attention, {"head_dim": 80, "page_size": 24}),
    "attention: window 1": (check_attention, {"window": 1}),
    "attention: window 5": (check_attention, {"window": 5}),
    "attention: window 40, decode": (check_attention, {"window": 40, "rows_each": (1, 1, 1)}),
    # As where only some rows are kept; the second sequence has none.
    "attention: rows with gaps": (
        check_attention,
        {"lengths": (100, 9, 50, 20), "rows_each": (33, 0, 4, 20), "consecutive": False, "window": 40},
    ),
    # As over what was chosen: pages of one token, one KV head.
    "attention: chosen tokens": (
        check_attention,
        {"page_size": 1, "kv_heads": 1, "group": 3, "lengths": (37, 1, 600), "rows_each": (1, 1, 1)},
    ),
    "attention: tokens for a chunk": (
        check_attention,
        {"page_size": 1, "lengths": (90,), "rows_each": (50,)},
    ),
    # As of latents: one wide KV head, whose queries are many, or no multiple of a tile.
    "attention: wide": (
        check_attention,
        {"head_dim": 288, "kv_heads": 1, "group": 48, "lengths": (37, 5), "rows_each": (3, 1)},
    ),
    "attention: wide, groups of 5": (
        check_attention,
        {"head_dim": 264, "kv_heads": 1, "group": 5, "lengths": (37,), "rows_each": (1,), "page_size": 1},
    ),
    "votes": (check_votes, {"group": 2, "kv_heads": 2, "dim": 32, "page_size": 16}),
    "votes: groups of 7, pages of 5": (check_votes, {"group": 7, "kv_heads": 3, "dim": 24, "page_size": 5}),
    "votes: one KV head, pages of one": (
        check_votes,
        {"group": 20, "kv_heads": 1, "dim": 80, "page_size": 1},
    ),
    "votes: channels": (
        check_votes,
        {"group": 3, "kv_heads": 2, "dim": 16, "page_size": 16, "kind": "channels"},
    ),
    "votes: bounds": (check_votes, {"group": 1, "kv_heads": 2, "dim": 48, "page_size": 1, "kind": "bounds"}),
    "votes: sums of bounds": (
        check_votes,
        {"group": 4, "kv_heads": 2, "dim": 64, "page_size": 1, "kind": "sums of bounds"},
    ),
    "index scores": (check_index, {"heads": 5, "dim": 24, "page_size": 16, "fp8": False}),
    "index scores: eight bits": (check_index, {"heads": 32, "dim": 32, "page_size": 1, "fp8": True}),
    "top-k: few": (check_top_k, {"width": 7, "capacity": 3}),
    "top-k: more than there are": (check_top_k, {"width": 20, "capacity": 33}),
    "top-k: many rows": (check_top_k, {"width": 1500, "capacity": 256, "rows": 9}),
    "top-k: split": (check_top_k, {"width": 5001, "capacity": 700, "rows": 3}),
    "places": (check_places, {}),
    "bounds, channels": (check_beside_keys, {}),
    # Several programs share one row's keys; some have none.
    "attention: split": (check_attention, {"lengths": (600, 3), "rows_each": (1, 1), "group": 1}),
    "attention: split, window": (check_attention, {"lengths": (600, 3), "rows_each": (2, 1), "window": 300}),
}


def failures(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Runs all cases: name -> traceback, empty where it passed."""
    found = {}
    for name, (check, arguments) in CASES.items():
        try:
            check(device, dtype, **arguments)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    return found


def repair_interpreter() -> None:
    """triton-lang/triton#9171: up to 3.6, int() of its one-element arrays fails with numpy 2.4."""
    from triton.runtime import interpreter

    patch_tensor: Any = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if __name__ == "__main__":
    repair_interpreter()
    torch.set_num_threads(1)
    # The interpreter computes bfloat16 wrongly; only a GPU shows that.
    print(json.dumps({str(t): failures("cpu", t) for t in (torch.float32, torch.float16)}))
