"""Which pages a request can take over from others, and when it offers its own."""

from collections.abc import Callable
from itertools import takewhile

from weaveinf.cache.blocks import BlockAllocator, legal_cut
from weaveinf.engine.request import Request

Shape = Callable[[Request, int], bytes]
"""What else than the tokens shaped the page of a request that ends at a position (a selector's settings)."""


class Prefixes:
    """Prefix sharing of requests; the pages themselves are the allocator's."""

    def __init__(self, blocks: BlockAllocator, row_align: int, shape: Shape, publishes: bool) -> None:
        self._blocks = blocks
        self._publishes = publishes
        self._row_align = row_align
        self._shape = shape

    def hits(self, request: Request) -> list[int]:
        """Published pages that the request can start with, cut where a prompt may be cut."""
        pages = self._blocks.match(self._wanted(request))
        size, prompt = self._blocks.block_size, len(request.prompt_token_ids)
        while (cut := legal_cut(len(pages) * size, prompt, self._row_align)) != len(pages) * size:
            del pages[cut // size :]
        return pages

    def shares_soon(self, request: Request, num_hits: int, fresh: set[bytes]) -> bool:
        """Whether half of what the request would compute is being computed by the step at hand
        (`fresh`: the hashes of its pages), so that waiting for the next one is cheaper. So the n
        samples of one prompt compute it once."""
        if not fresh:
            return False
        count = len([*takewhile(fresh.__contains__, self._wanted(request)[num_hits:])])
        size = self._blocks.block_size
        return count > 0 and 2 * count * size >= request.num_known - num_hits * size

    def fills(self, request: Request, end: int) -> list[bytes]:
        """The hashes of the pages, not yet published, that are full once the known tokens before
        position `end` are computed."""
        if not self._publishes:
            return []
        return self._hashes(request, end // self._blocks.block_size)[request.num_published :]

    def publish(self, request: Request) -> None:
        """Offers the pages whose tokens are known and whose steps are scheduled."""
        size = self._blocks.block_size
        new = request.num_computed - request.num_published * size
        if self._publishes and new >= size:  # spares most decode steps the rest
            full = min(request.num_computed, request.num_known) // size
            hashes = self._hashes(request, full)
            for i in range(request.num_published, full):
                self._blocks.publish(request.blocks[i], hashes[i])
            request.num_published = full

    def _wanted(self, request: Request) -> list[bytes]:
        """The pages it would take: one token at least is left to compute, and a request whose
        prompt log-probabilities are wanted computes all of them."""
        if request.prompt_logprobs is not None and not request.output_token_ids:
            return []
        return self._hashes(request, (request.num_known - 1) // self._blocks.block_size)

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """The hashes of the first `count` pages, all of known tokens."""
        have = request.page_hashes
        if len(have) < count:
            parent = have[-1] if have else self._blocks.root(request.salt)
            size = self._blocks.block_size
            tokens = request.tokens(len(have) * size, count * size)
            ends = range((len(have) + 1) * size, count * size + 1, size)
            shapes = [self._shape(request, end) for end in ends]
            have += self._blocks.chain(parent, tokens, shapes)
        return have[:count]
