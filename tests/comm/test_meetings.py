"""The meetings of csrc/cuda/seam.cu, in every order in which ranks and blocks can take their steps.

A launch of a rank is blocks that each say to every peer's block of the same index that they came (by a number
that only grows, in a pad of its memory), wait for all of these, work on rows, and do both again.
The next launch begins when all blocks have ended, as on a stream; launches may have other numbers of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest

Enough = Callable[[int, int], bool]


class State(NamedTuple):
    """step[rank][block]: how far in its launch; launch[rank]; pad[rank][block][peer]; epoch[rank][block]."""

    launch: tuple[int, ...]
    step: tuple[tuple[int, ...], ...]
    pad: tuple[tuple[tuple[int, ...], ...], ...]
    epoch: tuple[tuple[int, ...], ...]


def put(rows: tuple, value: object, *at: int) -> tuple:
    """The nested tuple with another value there."""
    first, *rest = at
    inner = put(rows[first], value, *rest) if rest else value
    return (*rows[:first], inner, *rows[first + 1 :])


def explore(ranks: int, launches: tuple[int, ...], enough: Enough) -> tuple[int, list[str]]:
    """Number of states that can be reached, and what is wrong in any. launches: blocks of each."""
    most, peers = max(launches), ranks - 1
    # Steps of a block: a store for each peer, the wait; work; again; over.
    worked, over = peers + 2, 2 * peers + 3
    others = [[p for p in range(ranks) if p != r] for r in range(ranks)]
    zeros = (0,) * most
    first = State((0,) * ranks, (zeros,) * ranks, (((0,) * ranks,) * most,) * ranks, (zeros,) * ranks)
    seen, todo, wrong = {first}, [first], set()

    def ready(state: State, rank: int, block: int, epoch: int) -> bool:
        return all(enough(state.pad[rank][block][peer], epoch) for peer in others[rank])

    def after(state: State, rank: int, block: int) -> State | None:
        """The state when this block has taken its next step; None where it has to wait."""
        step, epoch = state.step[rank][block], state.epoch[rank][block]
        if step < peers or worked <= step < worked + peers:
            peer = others[rank][step if step < peers else step - worked]
            said = epoch + (1 if step < peers else 2)
            state = state._replace(pad=put(state.pad, said, peer, block, rank))
        elif step == peers:
            if not ready(state, rank, block, epoch + 1):
                return None
            if any(state.launch[peer] < state.launch[rank] for peer in others[rank]):
                wrong.add("a block goes on before a peer came: what it reads is not written")
        elif step == over - 1:
            if not ready(state, rank, block, epoch + 2):
                return None
            state = state._replace(epoch=put(state.epoch, epoch + 2, rank, block))
        return state._replace(step=put(state.step, step + 1, rank, block))

    while todo:
        state = todo.pop()
        following = []
        for rank in range(ranks):
            if state.launch[rank] == len(launches):
                continue
            blocks = launches[state.launch[rank]]
            if all(state.step[rank][block] == over for block in range(blocks)):
                for peer, block in product(others[rank], range(blocks)):
                    if state.launch[peer] == state.launch[rank] and state.step[peer][block] < worked:
                        wrong.add("a launch ends while a peer still reads and writes here")
                moved = state._replace(launch=put(state.launch, state.launch[rank] + 1, rank))
                following.append(moved._replace(step=put(moved.step, zeros, rank)))
                continue
            for block in range(blocks):
                if state.step[rank][block] < over and (moved := after(state, rank, block)) is not None:
                    following.append(moved)
        if not following and any(launch < len(launches) for launch in state.launch):
            wrong.add("all wait")
        todo += [one for one in following if one not in seen]
        seen.update(following)
    return len(seen), sorted(wrong)


def at_least(there: int, wanted: int) -> bool:
    return there >= wanted


@pytest.mark.parametrize(
    ("ranks", "launches"), [(2, (2, 2)), (2, (1, 2, 1)), (2, (2, 1, 2)), (3, (1, 1)), (3, (2, 1))]
)
def test_every_order(ranks: int, launches: tuple[int, ...]) -> None:
    states, wrong = explore(ranks, launches, at_least)
    assert states > 100 and wrong == []


def test_the_search_finds_what_is_wrong() -> None:
    """A wait for the very number misses it when a peer is one meeting ahead; no wait at all meets nobody."""
    assert explore(2, (1, 1), lambda there, wanted: there == wanted)[1] == ["all wait"]
    assert len(explore(2, (1, 1), lambda there, wanted: True)[1]) == 2
