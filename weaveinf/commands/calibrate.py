"""`weaveinf calibrate`: ranks the rotary planes of a model's heads for FASA, on a text."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.votes import GlooVotes
from weaveinf.config import PAGE_SIZE
from weaveinf.engine.tokenizer import load_tokenizer
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import fingerprint, load_model, resolve
from weaveinf.selectors import fasa
from weaveinf.selectors.selector import Budgets, Choosing, Heads, Selector
from weaveinf.weave.rehearsal import rehearsal
from weaveinf.weave.run import run as run_chain

QUERIES = 64
"""Tokens at the end of the text whose queries are asked."""
CHUNK = 2048
"""Tokens of the text that run at once."""
_CPU = torch.device("cpu")


def run(args: argparse.Namespace) -> None:
    path = resolve(args.model)
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer to read a text with")
    most = min(args.tokens, ModelConfig.from_path(path).max_model_len)
    tokens = tokenizer.encode(Path(args.text).read_text()[: 8 * most], 8 * most)[:most]
    found = torch.stack(calibrate(args.model, tokens, Path(args.out)))
    best = found.sort(dim=-1, descending=True).values[1:, :, : max(1, found.shape[-1] // 4)]
    print(f"{args.out}: ranked {found.shape[-1]} planes of each head on {len(tokens)} tokens")
    print(f"a plane of the best quarter alone finds {best.mean():.0%} of what the whole head reads most")


def calibrate(
    model: str, token_ids: Sequence[int], out: Path, count: int = 256, queries: int = QUERIES
) -> list[Tensor]:
    """Writes the table that `weaveinf.selectors.fasa` reads: each head's planes, those first that alone
    find most of the `count` tokens which the whole head finds best, for the last `queries` tokens of a text.

    Returns what was found: `fasa.agreement` of each layer, float32 [heads, planes].

    Raises:
        ValueError: when the text is shorter than the queries and what they are to find, or longer than the
            model takes; or for a model that cannot be loaded.
    """
    path = resolve(model)
    config = ModelConfig.from_path(path)
    if config.latents is not None or any(window is not None for window in config.windows):
        raise ValueError(f"fasa chooses by keys of heads that see all, which {config.architecture} has not")
    if not count + queries <= len(token_ids) <= config.max_model_len:
        raise ValueError(
            f"the text has {len(token_ids)} tokens: calibration wants at least {count + queries}, and the "
            f"model takes {config.max_model_len} at most"
        )
    keys, asked = _observe(path, config, token_ids, queries)
    found = [fasa.agreement(q, k, count) for q, k in zip(asked.queries, keys, strict=True)]
    fasa.save(out, path.resolve().name, fingerprint(path, config), found, config.num_kv_heads)
    return found


class Observer(Selector):
    """Lets every row read all, and keeps the rotated queries of the latest batch."""

    def __init__(self, heads: Heads) -> None:
        super().__init__(Budgets(heads, 0, 0, 0))
        self.queries = [torch.empty(0)] * heads.num_layers

    def choose(self, layer: int, q: Tensor, pool: Tensor, batch: Batch) -> Choosing:
        """See `Selector`."""
        self.queries[layer] = q
        return super().choose(layer, q, pool, batch)


@torch.inference_mode()
def _observe(
    path: Path, config: ModelConfig, token_ids: Sequence[int], queries: int
) -> tuple[list[Tensor], Observer]:
    """Every layer's rotated keys of the text [tokens, KV heads, D], and who has the queries of its end."""
    tokens = torch.tensor(token_ids)
    model = load_model(path, config, 0, 1, _CPU, torch.float32)
    pools = Pools(model.pool_specs, -(-len(tokens) // PAGE_SIZE), PAGE_SIZE, _CPU)
    observer = Observer(model.heads(max_num_seqs=1))
    model.bind(pools, observer)
    seam = LocalSeam(CHUNK, config.hidden_size, torch.float32, _CPU)
    votes = GlooVotes(None, 1, _CPU)
    # The last run is exactly of the tokens that ask: their queries are what the observer is left with.
    edges = [*range(0, len(tokens) - queries, CHUNK), len(tokens) - queries, len(tokens)]
    for start, end in pairwise(edges):
        run_chain(model.chain, [_batch(tokens, start, end)], [seam], votes)
    return [pool.flatten(0, 1)[: len(tokens)] for pool in pools["key"]], observer


def _batch(tokens: Tensor, start: int, end: int) -> Batch:
    """Tokens start to end of a text whose pages lie in order. All want logits, so that in the last layer too
    all ask."""
    made = rehearsal(end - start, start, len(tokens), 1)
    return replace(made, input_ids=tokens[start:end], logit_rows=torch.arange(end - start))
