"""Compiles what the Triton functions would launch on a Hopper GPU, on a machine without one.

    python -m tests.ops.triton_compile

calls them with tensors of realistic shapes; every launch becomes a compilation down to the cubin for
compute capability 9.0, with the specialisation that the launch would have. Nothing is run, so the kernels
are known to compile, and no more. Prints one line a kernel: name, dtype, grid, bytes, bytes of shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from weaveinf.comm.symmetric import Call
from weaveinf.comm.triton_seam import TritonSeam
from weaveinf.ops import triton_attention, triton_elementwise, triton_moe, triton_select
from weaveinf.ops.attention import Paged
from weaveinf.ops.index import FP8
from weaveinf.ops.norm import Joint


class Hopper:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching() -> None:
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(self.__name__, args[0].dtype if hasattr(args[0], "dtype") else "", grid, end=" ")
        wide = made.asm["ptx"].count(".v4.b32") + made.asm["ptx"].count(".v8.b")
        print(len(made.asm["cubin"]), made.metadata.shared, "wide" if wide else "narrow")

    triton.runtime.driver.set_active(Hopper())
    JITFunction.run = compile_only


def attention(dtype: torch.dtype, rows: int, seqs: int, window: int | None) -> None:
    """As rank 0 of 4 of Llama-3-70B would call it: 16 query heads, 2 KV heads of 128."""
    pools = torch.zeros(2, 4, 16, 2, 128, dtype=dtype)
    triton_attention.paged_attention(
        torch.zeros(rows, 20, 128, dtype=dtype)[:, :16],
        (pools[0], pools[1]),
        Paged(*(torch.zeros(*shape, dtype=torch.int32) for shape in ((seqs, 512), (seqs + 1,), (rows,)))),
        128**-0.5,
        window,
    )


def latents(dtype: torch.dtype, heads: int) -> None:
    """As DeepSeek-V3's latent attention would call it, over chosen tokens."""
    pool = torch.zeros(64, 1, 1, 576, dtype=dtype)
    table, starts = torch.zeros(8, 2048, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    q = torch.zeros(8, heads, 576, dtype=dtype)
    triton_attention.paged_attention(q, (pool, pool), Paged(table, starts, starts[:8]), 576**-0.5)


def elementwise(dtype: torch.dtype) -> None:
    hidden = torch.zeros(6, 8, 8192, dtype=dtype)
    weight = hidden[0, 0]
    triton_elementwise.rms_norm(hidden[0], weight, 1e-5)
    qkv = torch.zeros(8, 20, 128, dtype=dtype)
    triton_elementwise.rms_norm(qkv[:, :16], weight[:128], 1e-6)
    for ranks in (1, 4):
        partials = list(hidden[:ranks])
        triton_elementwise.add_rms_norm(partials, hidden[4], Joint(weight, 1e-5), hidden[5])
    positions = torch.zeros(8, dtype=torch.int32)
    triton_elementwise.rope_(qkv[:, :16], torch.zeros(64, 128), positions)
    pools = torch.zeros(2, 4, 16, 2, 128, dtype=dtype)
    triton_elementwise.write_kv(qkv[:, 16:18], qkv[:, 18:], pools[0], pools[1], positions)
    triton_elementwise.silu_mul(torch.zeros(8, 2 * 7168, dtype=dtype))


def choosing(dtype: torch.dtype, rows: int) -> None:
    """As rank 0 of 4 of Llama-3-70B, and an indexer as DeepSeek-V3.2's."""
    table = torch.zeros(rows, 8192, dtype=torch.int32)
    firsts = ends = torch.zeros(rows, dtype=torch.int32)
    where = table, firsts, ends
    q = torch.zeros(rows, 20, 128, dtype=dtype)[:, :16]
    keys = torch.zeros(4, 16, 2, 128, dtype=dtype)
    votes = triton_select.votes(q, keys, where, 8192 * 16, 1.0, None, True)
    channels = torch.zeros(2, 32, dtype=torch.int32)
    triton_select.votes(q, keys[..., :32].contiguous(), where, 8192 * 16, 1.0, channels, True)
    bounds = torch.zeros(4, 1, 2, 256, dtype=dtype)
    triton_select.votes(q, bounds, where, 8192, 1.0, None, False)
    index, _ = triton_select.top_k(votes[:, 0], ends, ends, 2048)
    triton_select.places(index.unsqueeze(1), table, 16, 1)
    triton_select.write_bounds(keys, bounds[:, 0], firsts.long(), ends.long())
    triton_select.write_channels(q[:, :2], keys[..., :32].contiguous(), channels, ends)
    q, weights = torch.zeros(rows, 64, 128, dtype=dtype), torch.zeros(rows, 64)
    triton_select.index_scores(q, weights, keys[:, :, 0].contiguous(), None, table, ends, 8192)
    eight = torch.zeros(4, 16, 128, dtype=FP8), torch.zeros(4, 16)
    triton_select.index_scores(q, weights, *eight, table, ends, 8192)


def experts(dtype: torch.dtype, rows: int) -> None:
    """As rank 0 of 8 of Mixtral-8x22B would call it."""
    hidden, inner, count = 6144, 2048, 8
    weights = torch.zeros(count, dtype=torch.int64)
    ids = torch.arange(2 * rows, dtype=torch.int32).view(rows, 2) % count
    triton_moe.moe(torch.zeros(rows, hidden, dtype=dtype), weights, weights, inner, torch.ones(rows, 2), ids)


def seam(dtype: torch.dtype, ranks: int) -> None:
    """Rank 1's, as Llama-3-70B would call it: first, later, with rows that were dropped, of one row."""
    call = Call(rank=1, rows=1000, old_rows=3000, fresh=1, patience_ns=120 * 10**9, weight=1 << 40)
    call.failed, call.said = 1 << 41, 1 << 42
    call.buffers[:] = [(5 + rank) << 40 for rank in range(8)]
    call.epochs[:] = call.buffers[:]
    kernel = TritonSeam(dtype, 8192, ranks, torch.device("cpu"))
    kernel(call, 16)
    call.fresh = 0
    kernel(call, 8)
    call.kept = 1 << 43
    kernel(call, 16)
    call.kept, call.rows = None, 1
    kernel(call, 16)


if __name__ == "__main__":
    torch.set_num_threads(1)
    compile_instead_of_launching()
    for rows, seqs, window in ((1000, 2, None), (1000, 2, 4096), (48, 8, None), (8, 8, 4096)):
        attention(torch.bfloat16, rows, seqs, window)
    attention(torch.float32, 8, 8, None)
    latents(torch.bfloat16, 128)
    latents(torch.float32, 16)
    elementwise(torch.bfloat16)
    choosing(torch.bfloat16, 1)
    choosing(torch.bfloat16, 100)
    for rows in (4, 100, 1000):
        experts(torch.bfloat16, rows)
    experts(torch.float32, 100)
    for dtype in (torch.bfloat16, torch.float32):
        seam(dtype, 8)
