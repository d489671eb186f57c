"""Log-probabilities over a vocabulary that is cut into shards: each rank's part, and the parts joined."""

import torch
from torch import Tensor

from weaveinf.ops.sampling import Shard, top

_LOWEST = torch.finfo(torch.float32).min


def logprob_parts(logits: Tensor, targets: Tensor, n: int, shard: Shard) -> Tensor:
    """What one rank knows of its rows' log-probabilities: float32 [rows, 3 + 2n] for
    `join_logprobs`.

    logits float32 [rows, width]; targets int64 [rows], global ids of any shard. Columns: largest
    logit, sum of exp(logit - largest), the target's logit (0 unless owned), the n largest logits,
    their ids.
    """
    peak = logits.amax(1, keepdim=True)
    total = (logits - peak.clamp(min=_LOWEST)).exp_().sum(1, keepdim=True)
    column = (targets - shard.start)[:, None]
    owned = (column >= 0) & (column < shard.width)
    target = logits.gather(1, column.clamp(0, shard.width - 1)).masked_fill_(~owned, 0.0)
    n = min(n, shard.width)
    if not n:
        return torch.cat((peak, total, target), 1)
    values, columns = top(logits, n)
    return torch.cat((peak, total, target, values, (columns + shard.start).float()), 1)


def join_logprobs(parts: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [ranks, rows, 3 + 2n'] -> log-softmax of the targets [rows], and of the n most
    likely tokens ids int64 and values [rows, up to n], ties by the lower id."""
    each = (parts.shape[2] - 3) // 2
    peak = parts[..., 0].amax(0)
    scaled = parts[..., 1] * (parts[..., 0] - peak).exp()
    peak, norm = peak[:, None], scaled.sum(0).log()[:, None]
    values = parts[..., 3 : 3 + each].permute(1, 0, 2).flatten(1)
    ids = parts[..., 3 + each :].permute(1, 0, 2).flatten(1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)[:, :n].long()
    chosen = parts[..., 2].sum(0)[:, None] - peak - norm  # in this order large logits cost no digits
    return chosen.squeeze(1), ids, values[:, :n] - peak - norm
