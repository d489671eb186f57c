"""Who holds which page of the cache, and which pages hold which tokens.

A page is `block_size` positions of every pool. A full page may be published under a hash that
covers everything that shaped it (its own tokens, all before them, a salt, a selector's settings);
who comes with the same prefix holds the same page, without a copy. A page that nobody holds keeps
its contents until it is needed: unpublished ones go first, then the least recently used.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile

import numpy as np


def legal_cut(position: int, num_prompt_tokens: int, row_align: int) -> int:
    """The last position up to `position` where a request's tokens may be cut into two runs.

    Inside the prompt only multiples of `row_align` are; the prompt's end and every position behind
    it are too. Scheduler chunks, prefix hits and the cuts of the weave all ask here.
    """
    return position if position >= num_prompt_tokens else position - position % row_align


class BlockAllocator:
    """Hands out pages 0 to num_blocks - 1 and knows which of them can be shared.

    `key`: random bytes of this process, 1 to 64, so that no prompt can be made to collide with
    another's pages. Not thread-safe: the scheduler alone uses it.
    """

    def __init__(self, num_blocks: int, block_size: int, key: bytes) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"the cache needs at least one page of one token, got {num_blocks} of {block_size}"
            )
        if not 1 <= len(key) <= 64:
            raise ValueError(f"the page hash needs a key of 1 to 64 bytes, got {len(key)}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._key = key
        self._holders = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # unheld, unpublished: a stack
        self._resting: OrderedDict[int, None] = OrderedDict()  # unheld, published: oldest first

    @property
    def num_free(self) -> int:
        """Pages that nobody holds; `allocate` can give this many."""
        return len(self._blank) + len(self._resting)

    def root(self, salt: bytes) -> bytes:
        """The hash that a chain of pages starts from."""
        return blake2b(salt, key=self._key, digest_size=16, person=b"weaveinf root").digest()

    def chain(self, parent: bytes, token_ids: Sequence[int], shapes: Sequence[bytes]) -> list[bytes]:
        """The hashes of the full pages of `token_ids`, which follow a prefix hashed to `parent`; shapes: what
        else shaped each page."""
        size = self.block_size
        words = np.asarray(token_ids, np.int64).tobytes()
        hashes = []
        for start, shape in zip(range(0, len(token_ids) // size * size * 8, size * 8), shapes, strict=True):
            page = blake2b(parent, key=self._key, digest_size=16, person=b"weaveinf page")
            page.update(words[start : start + size * 8])
            page.update(shape)  # last: all that comes before it has a fixed length
            parent = page.digest()
            hashes.append(parent)
        return hashes

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The published pages of the longest known beginning of `hashes`; takes no hold."""
        return [self._page_of[known] for known in takewhile(self._page_of.__contains__, hashes)]

    def num_resting(self, pages: Iterable[int]) -> int:
        """How many of `pages` count as free now and no longer do once held."""
        return sum(self._holders[page] == 0 for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these published pages."""
        for page in pages:
            if self._holders[page] == 0:
                del self._resting[page]
            self._holders[page] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` pages of no known contents, held once. `ValueError` if fewer are free."""
        if count > self.num_free:
            raise ValueError(f"{count} pages wanted, {self.num_free} of {self.num_blocks} are free")
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._resting.popitem(last=False)
                del self._page_of[self._hash_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, page_hash: bytes) -> None:
        """From now on this held page can be found under `page_hash`.

        Where the same contents were published before, the earlier page stays the shared one.
        """
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; give a request's pages in order of position.

        The last ones are forgotten first, as no page can be found without those before it.
        """
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise RuntimeError(f"page {page} was released more often than it was held")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._hash_of:
                    self._resting[page] = None
                else:
                    self._blank.append(page)

    def check(self, held: Iterable[Sequence[int]] = ()) -> None:
        """`RuntimeError` unless every page is accounted for, given every holder's pages."""
        holders = [0] * self.num_blocks
        for pages in held:
            if len(set(pages)) != len(pages):
                raise RuntimeError(f"one holder has a page twice: {pages}")
            for page in pages:
                holders[page] += 1
        if holders != self._holders:
            wrong = [p for p in range(self.num_blocks) if holders[p] != self._holders[p]]
            raise RuntimeError(f"pages with a wrong number of holders: {wrong}")
        free = [page for page in range(self.num_blocks) if holders[page] == 0]
        if sorted([*self._blank, *self._resting]) != free:
            raise RuntimeError("the free pages are not those that nobody holds")
        if {p: h for h, p in self._page_of.items()} != self._hash_of:
            raise RuntimeError("pages and hashes do not match one to one")
        if any(p in self._hash_of for p in self._blank) or self._resting.keys() - self._hash_of:
            raise RuntimeError("a free page is in the wrong list")
