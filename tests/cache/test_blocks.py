"""The page allocator: nothing lost, nothing shared by mistake, the least useful forgotten first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from weaveinf.cache.blocks import BlockAllocator, legal_cut

KEY = b"a key of this process"
SIZE = 2


class Holders(RuleBasedStateMachine):
    """Requests that take, publish, find and give back pages, against a plain model of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockAllocator(7, SIZE, KEY)
        self.held: list[list[int]] = []
        self.contents: dict[int, tuple[int, ...]] = {}  # page -> the prefix it was filled with
        self.prefixes: list[tuple[int, ...]] = []  # of each holder, as many pages as it holds

    def _chain(self, tokens: tuple[int, ...]) -> list[bytes]:
        return self.blocks.chain(
            self.blocks.root(b""), tokens, [b""] * (len(tokens) // self.blocks.block_size)
        )

    @rule(tokens=st.lists(st.integers(0, 1), max_size=5 * SIZE).map(tuple))
    def start(self, tokens: tuple[int, ...]) -> None:
        tokens = tokens[: len(tokens) // SIZE * SIZE]
        hashes = self._chain(tokens)
        hits = self.blocks.match(hashes)
        for i, page in enumerate(hits):
            assert self.contents[page] == tokens[: (i + 1) * SIZE]
        missing = len(hashes) - len(hits)
        free = self.blocks.num_free
        resting = self.blocks.num_resting(hits)
        if missing + resting > free:
            with pytest.raises(ValueError, match="pages wanted"):
                self.blocks.allocate(free + 1)
            return
        self.blocks.hold(hits)
        new = self.blocks.allocate(missing)
        assert self.blocks.num_free == free - missing - resting
        assert not set(new) & {page for pages in self.held for page in pages}
        assert not set(new) & set(hits)
        for i, page in enumerate(new, len(hits)):
            self.contents[page] = tokens[: (i + 1) * SIZE]
        self.held.append(hits + new)
        self.prefixes.append(tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.held) - 1))
        hashes = self._chain(self.prefixes[i])
        for page, page_hash in zip(self.held[i], hashes, strict=True):
            self.blocks.publish(page, page_hash)
        found = self.blocks.match(hashes)
        assert [self.contents[page] for page in found] == [
            self.prefixes[i][: (j + 1) * SIZE] for j in range(len(hashes))
        ]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.held) - 1))
        self.blocks.release(self.held.pop(i))
        self.prefixes.pop(i)

    @invariant()
    def accounts_balance(self) -> None:
        self.blocks.check(self.held)
        in_use = {page for pages in self.held for page in pages}
        assert self.blocks.num_free == 7 - len(in_use)


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**40), max_size=40), st.integers(1, 7), st.integers(0, 40))
def test_a_chain_can_be_continued(tokens: list[int], size: int, cut: int) -> None:
    blocks = BlockAllocator(1, size, KEY)
    shapes = [b"shape"] * (len(tokens) // size)
    whole = blocks.chain(blocks.root(b"salt"), tokens, shapes)
    assert len(whole) == len(tokens) // size
    first = min(cut // size, len(whole))
    parent = whole[first - 1] if first else blocks.root(b"salt")
    assert blocks.chain(parent, tokens[first * size :], shapes[first:]) == whole[first:]


def test_a_hash_covers_all_that_shaped_the_page() -> None:
    def last(tokens: list[int], salt: bytes = b"", shape: bytes = b"", key: bytes = KEY) -> bytes:
        blocks = BlockAllocator(1, 2, key)
        return blocks.chain(blocks.root(salt), tokens, [b""] * (len(tokens) // 2 - 1) + [shape])[-1]

    variants = [
        last([1, 2, 3, 4]),
        last([1, 2, 3, 5]),
        last([9, 2, 3, 4]),  # another prefix, the same page
        last([3, 4]),
        last([1, 2, 3, 4], salt=b"x"),
        last([1, 2, 3, 4], shape=b"x"),
        last([1, 2, 3, 4], key=b"another"),
    ]
    assert len(set(variants)) == len(variants)
    assert last([1, 2, 3, 4, 5]) == variants[0]


def test_the_least_recently_used_prefix_is_forgotten_first_and_from_its_end() -> None:
    blocks = BlockAllocator(5, 1, KEY)
    chains = [blocks.chain(blocks.root(b""), [i, 7], [b"", b""]) for i in range(2)]
    held = [blocks.allocate(2) for _ in chains]
    for pages, chain in zip(held, chains, strict=True):
        for page, page_hash in zip(pages, chain, strict=True):
            blocks.publish(page, page_hash)
    blocks.release(held[0])
    blocks.release(held[1])
    used_again = blocks.match(chains[0])
    blocks.hold(used_again)
    blocks.release(used_again)
    lengths = []
    for _ in range(5):
        blocks.allocate(1)
        lengths.append([len(blocks.match(chain)) for chain in chains])
    # The page that was never published goes first, then the older chain from its end.
    assert lengths == [[2, 2], [2, 1], [2, 0], [1, 0], [0, 0]]


def test_the_page_published_first_stays_the_shared_one() -> None:
    blocks = BlockAllocator(2, 1, KEY)
    chain = blocks.chain(blocks.root(b""), [3], [b""])
    first, second = blocks.allocate(2)
    blocks.publish(first, chain[0])
    blocks.publish(second, chain[0])
    assert blocks.match(chain) == [first]
    blocks.release([second])
    blocks.release([first])
    blocks.check()
    assert blocks.match(chain) == [first]


def test_check_finds_what_is_wrong() -> None:
    blocks = BlockAllocator(3, 1, KEY)
    pages = blocks.allocate(2)
    with pytest.raises(RuntimeError, match="wrong number of holders"):
        blocks.check([pages[:1]])
    with pytest.raises(RuntimeError, match="twice"):
        blocks.check([[pages[0], pages[0]]])
    blocks.release(pages)
    with pytest.raises(RuntimeError, match="more often"):
        blocks.release(pages[:1])


@pytest.mark.parametrize(
    ("num_blocks", "size", "key"), [(0, 1, KEY), (1, 0, KEY), (1, 1, b""), (1, 1, b"x" * 65)]
)
def test_settings_that_cannot_work_are_refused(num_blocks: int, size: int, key: bytes) -> None:
    with pytest.raises(ValueError, match="needs"):
        BlockAllocator(num_blocks, size, key)


@given(st.integers(0, 100), st.integers(1, 100), st.integers(1, 20))
def test_legal_cuts(position: int, prompt: int, align: int) -> None:
    cut = legal_cut(position, prompt, align)
    legal = [at for at in range(position + 1) if at >= prompt or at % align == 0]
    assert cut == legal[-1]
