"""Made-up steps, to measure what steps cost."""

import torch

from weaveinf.cache.batch import Batch
from weaveinf.config import PAGE_SIZE


def rehearsal(rows: int, context: int, longest: int, vocab_size: int, decode: bool = False) -> Batch:
    """Made-up tokens behind `context` cached ones, of few long sequences (`longest` tokens at most, in the
    same pages) or of one each (decode); the cache holds whatever it holds."""
    each = 1 if decode else longest - context
    lengths = [min(each, rows - first) for first in range(0, rows, each)]
    pages = torch.arange(-(-longest // PAGE_SIZE), dtype=torch.int32)
    positions = (context + torch.cat([torch.arange(n) for n in lengths])).int()
    seq_lens = context + torch.tensor(lengths, dtype=torch.int32)
    return Batch(
        input_ids=torch.arange(rows) * 7919 % vocab_size,
        positions=positions,
        slot_mapping=positions,  # the pages are in order
        cu_seqlens_q=torch.tensor([0, *lengths]).cumsum(0).int(),
        seq_lens=seq_lens,
        num_prompt_tokens=seq_lens,
        block_table=pages.expand(len(lengths), -1).contiguous(),
        state_slot=torch.arange(len(lengths), dtype=torch.int32),
        logit_rows=torch.tensor([rows - 1]),
    )
