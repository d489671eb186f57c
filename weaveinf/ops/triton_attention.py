"""Paged attention for CUDA in Triton: one kernel for prefill and decode, one that joins split contexts.

Shape legend: M query (row, head) pairs of one tile, N keys of one tile, D head dim, all powers of two and
masked. A tile holds the rows of one sequence with all query heads of one KV head, so every key and value is
read once for the whole group. Keys of one tile may be divided among several programs (flash decoding, Dao et
al. 2023), when rows are too few to fill the device; the joining kernel then weighs their results. The host
reads nothing back: the launch depends on shapes alone, so graphs can replay it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from weaveinf.ops.attention import Paged, Pair

LOG2E = 1.4426950408889634
_FILL = 264  # programs that occupy an H100 (132 SMs) twice


@triton.jit
def owner(starts, count, tile, ROWS: tl.constexpr):
    """Whose rows a tile of ROWS rows is of, where i has those from starts[i] to starts[i + 1].

    i owns tiles from starts[i] // ROWS + i on, which are as many as it can need: the last i whose first tile
    is not beyond this one.
    """
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _attend(
    q,
    pools,
    paged,
    out,
    lse,
    scale_log2,
    num_seqs,
    strides,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = softmax2(scale_log2 * q K^T) V over this program's share of the keys; lse = log2 of the sum.

    Grid: (row tiles, KV heads, SPLITS). WINDOW 0: none. With SPLITS 1 `lse` is unused. strides: of the
    table's rows; of rows and heads of q; of rows, heads and splits of out.
    """
    block_table, cu_seqlens_q, positions = paged
    table_stride, q_row_stride, q_head_stride, out_row_stride, out_head_stride, out_split_stride = strides
    ROWS: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    seq = owner(cu_seqlens_q, num_seqs, tile, ROWS)
    begin = tl.load(cu_seqlens_q + seq)
    end = tl.load(cu_seqlens_q + seq + 1)
    first_row = begin + (tile - (begin // ROWS + seq)) * ROWS
    if first_row < end:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        row = first_row + m // GROUP
        head = kv_head * GROUP + m % GROUP
        row_ok = (m // GROUP < ROWS) & (row < end)
        in_dim = d < HEAD_DIM
        row64 = row.to(tl.int64)
        own_ok = row_ok[:, None] & in_dim[None, :]
        own = q + row64[:, None] * q_row_stride + head[:, None] * q_head_stride + d[None, :]
        q_md = tl.load(own, mask=own_ok, other=0.0)
        position = tl.load(positions + row, mask=row_ok, other=-1)

        stop = tl.max(position) + 1
        start = 0
        if WINDOW > 0:
            earliest = tl.min(tl.where(row_ok, position, 2147483647))
            start = tl.maximum(earliest - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(stop - start, BLOCK_N), SPLITS) * BLOCK_N
            start = start + split * share
            stop = tl.minimum(stop, start + share)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc_md = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for key_start in range(start, stop, BLOCK_N):
            key_at = key_start + tl.arange(0, BLOCK_N)
            key_ok = key_at < stop
            page = tl.load(block_table + seq * table_stride + key_at // PAGE_SIZE, mask=key_ok, other=0)
            slot = (page.to(tl.int64) * PAGE_SIZE + key_at % PAGE_SIZE) * KV_HEADS + kv_head
            at_nd = slot[:, None] * HEAD_DIM + d[None, :]
            kv_mask = key_ok[:, None] & in_dim[None, :]
            k_nd = tl.load(pools[0] + at_nd, mask=kv_mask, other=0.0)
            s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * scale_log2
            seen = key_ok[None, :] & (key_at[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
            s_mn = tl.where(seen, s_mn, float("-inf"))

            new_top = tl.maximum(top, tl.max(s_mn, 1))
            # A row that has seen no key yet: any finite top, so that no inf - inf arises.
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            p_mn = tl.exp2(s_mn - safe_top[:, None])
            fade = tl.exp2(top - safe_top)
            total = total * fade + tl.sum(p_mn, 1)
            v_nd = tl.load(pools[1] + at_nd, mask=kv_mask, other=0.0)
            acc_md = acc_md * fade[:, None] + tl.dot(p_mn.to(v_nd.dtype), v_nd, input_precision="ieee")
            top = new_top

        acc_md = acc_md / tl.where(total == 0.0, 1.0, total)[:, None]
        own = out + split.to(tl.int64) * out_split_stride + row64[:, None] * out_row_stride
        own += head[:, None] * out_head_stride + d[None, :]
        tl.store(own, acc_md.to(out.dtype.element_ty), mask=own_ok)
        if SPLITS > 1:
            sums = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
            tl.store(lse + (row64 * (KV_HEADS * GROUP) + head) * SPLITS + split, sums, mask=row_ok)


@triton.jit
def _join(
    parts,
    lse,
    cu_seqlens_q,
    out,
    num_seqs,
    strides,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[row, head] = sum over splits of parts * 2^lse / sum of 2^lse. Grid: (rows, HEADS). strides: of
    splits of parts; of rows and heads of out."""
    parts_split_stride, out_row_stride, out_head_stride = strides
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if row < tl.load(cu_seqlens_q + num_seqs):  # rows of no sequence were not computed
        split = tl.arange(0, SPLITS)
        d = tl.arange(0, BLOCK_D)
        in_dim = d < HEAD_DIM
        weight = tl.load(lse + (row * HEADS + head) * SPLITS + split)
        weight = tl.exp2(weight - tl.max(weight))
        part = parts + split.to(tl.int64)[:, None] * parts_split_stride + (row * HEADS + head) * HEAD_DIM
        part_sd = tl.load(part + d[None, :], mask=in_dim[None, :], other=0.0)
        mean = tl.sum(part_sd * weight[:, None], 0) / tl.sum(weight)
        own = out + row * out_row_stride + head * out_head_stride + d
        tl.store(own, mean.to(out.dtype.element_ty), mask=in_dim)


def paged_attention(
    q: Tensor, pools: Pair, paged: Paged, scale: float, window: int | None = None, out: Tensor | None = None
) -> Tensor:
    """`weaveinf.ops.attention.paged_attention` on CUDA tensors of float32, bfloat16 or float16."""
    rows, heads, head_dim = q.shape
    page_size, kv_heads = pools[0].shape[1:3]
    table, starts, positions, _ = paged
    seqs = table.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if rows == 0 or seqs == 0:
        return out
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    wide = block_d > 256  # as latents are, of one KV head
    if wide and kv_heads == 1 and group > 16 and group % 16 == 0:
        # The sums of more heads would not stay in registers: they go as rows.
        n, flat = group // 16, (-1, 16, head_dim)
        spread = Paged(table, starts * n, positions.repeat_interleave(n))
        paged_attention(q.reshape(flat), pools, spread, scale, window, out.view(flat))
        return out
    # tl.dot wants 16 at least. Few rows (decode) take the smallest tile, prompts a large one; float32 has
    # no tensor cores, and larger tiles than these would not stay in registers.
    block_m = max(16, triton.next_power_of_2(group))
    if wide or q.dtype == torch.float32:
        block_n = 16 if wide else 32
    else:
        block_n = 64
        if rows > 4 * seqs:
            block_m = max(block_m, 128 if rows > 64 * seqs else 64)
    tiles = rows // (block_m // group) + seqs
    reach = table.shape[1] * page_size
    if window is not None:
        reach = min(reach, window + block_m // group)
    shares = splits(tiles * kv_heads, reach // (4 * block_n))
    parts, lse = out.unsqueeze(0), out
    if shares > 1:
        parts = torch.empty((shares, rows, heads, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((rows, heads, shares), dtype=torch.float32, device=q.device)
    strides = table.stride(0), *q.stride()[:2], parts.stride(1), parts.stride(2), parts.stride(0)
    _attend[(tiles, kv_heads, shares)](
        *(q, pools, (table, starts, positions), parts, lse, scale * LOG2E, seqs, strides),
        *(head_dim, kv_heads, group, page_size, window or 0, shares, block_m, block_n, block_d),
        num_warps=4 if block_m <= 64 else 8,
        num_stages=1 if wide else 2,
    )
    if shares > 1:
        strides = parts.stride(0), *out.stride()[:2]
        given = parts, lse, starts, out, seqs, strides, heads, head_dim, shares, block_d
        _join[(rows, heads)](*given, num_warps=2)
    return out


def splits(programs: int, longest: int, most: int = 32) -> int:
    """How many programs share the keys of one tile: a power of two that fills the device, at most
    `longest` (so that each has several key tiles when the context is as long as it can be) and `most`."""
    shares = 1
    while shares * 2 <= min(longest, most) and programs * shares * 2 <= _FILL:
        shares *= 2
    return shares
