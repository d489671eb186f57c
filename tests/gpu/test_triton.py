"""The Triton kernels on a real GPU, through the same cases as the interpreter's test, bfloat16 too.

Until these have passed on a machine with a GPU, the kernels count as compiled (for compute capability
9.0, tests/ops/test_triton.py) and interpreted, but never run.
"""

from __future__ import annotations

import pytest
import torch

from tests.ops.triton_checks import CASES
from weaveinf.ops import flash_attention
from weaveinf.ops.attention import Paged, paged_attention, paged_attention_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_against_reference(case: str, dtype: torch.dtype) -> None:
    check, arguments = CASES[case]
    check("cuda", dtype, **arguments)


@pytest.mark.parametrize("rows", [1, 700])
def test_attention_replays_in_a_graph(rows: int) -> None:
    """The launch reads nothing back, so a captured step stays right when its inputs change in place."""
    torch.manual_seed(0)
    length, pages, heads = 4096, 256, 8
    keys, values = torch.randn(2, pages, 16, 2, 128, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(pages, device="cuda").to(torch.int32)[None]
    starts = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    q = torch.randn(rows, heads, 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(rows, dtype=torch.int32, device="cuda")
    arguments = (q, (keys, values), Paged(table, starts, positions), 128**-0.5)
    out = paged_attention(*arguments)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(*arguments, out=out)
    positions += length - rows
    q.normal_()
    graph.replay()
    want = paged_attention_reference(*arguments)
    torch.testing.assert_close(out, want, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("rows", [1, 700])
@pytest.mark.parametrize("window", [None, 300])
def test_flash_attention_agrees(rows: int, window: int | None) -> None:
    pytest.importorskip("flash_attn_interface")
    torch.manual_seed(1)
    keys, values = torch.randn(2, 256, 16, 2, 128, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(256, device="cuda").to(torch.int32).view(2, 128)
    starts = torch.tensor([0, rows, 2 * rows], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([2000, 900], dtype=torch.int32, device="cuda")
    q = torch.randn(2 * rows, 8, 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.cat([torch.arange(n - rows, n, device="cuda") for n in (2000, 900)]).int()
    out = torch.full_like(q, torch.nan)
    arguments = (q, (keys, values), Paged(table, starts, positions, lengths), 128**-0.5, window)
    flash_attention.paged_attention(*arguments, out)
    want = paged_attention_reference(*arguments)
    torch.testing.assert_close(out, want, atol=1.6e-2, rtol=1.6e-2)
