"""The seam between two blocks: partial sums over ranks, residual add, RMSNorm (DESIGN section 1)."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from weaveinf.ops.norm import Joint


class Seam(Protocol):
    """One pass after another: open, then for every block partial, start, finish.

    All ranks make the same calls with the same rows. A seam serves one half of a batch; two seams of one
    group may be interleaved. RankDied or TimeoutError from start, finish, gather and insert when a peer
    does not take part.
    """

    name: str
    """Which kind, for the log."""

    why: str
    """One line: why this kind was chosen."""

    fused: bool = False
    """Whether sum, add and norm are one kernel over the ranks' memory, with nothing to wait for a network."""

    ran: tuple[Any, Any] = 0.0, 0.0
    """When the latest start's work began and ended, in seconds of the monotonic clock, or two CUDA events;
    valid after finish."""

    ctas: Sequence[int] = (0,)
    """CTAs of a GPU that `start` may be given; 0, the first: what it takes with nothing beside it."""

    def open(self, rows: int) -> None:
        """Begins a pass of `rows` rows, the residual zero. ValueError beyond the seam's size."""

    def partial(self) -> Tensor:
        """[rows, hidden]: where the next block writes its partial sums. Content undefined before."""

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        """Begins the sum, the add and the norm; runs to its end by itself.

        kept: int64 ascending indices of the rows that go on. The block has then filled only
        partial()[:len(kept)], with these rows. ctas: one of `self.ctas`, the same on every rank.
        """

    def finish(self) -> Tensor:
        """x [rows, hidden], the same bits on every rank, valid until this seam's next start."""

    def gather(self, rows: Tensor) -> Tensor:
        """[len(rows), hidden]: whole residual rows, on every rank; every rank calls it."""

    def insert(self, rows: Tensor, values: Tensor) -> None:
        """Replaces whole residual rows; every rank calls it with the same values."""

    def close(self) -> None:
        """Releases its memory and leaves; idempotent, waits for nobody."""


def share_of(rows: int, size: int, rank: int) -> tuple[int, int]:
    """[first, last) of a rank's contiguous share of rows; the first ranks take the remainder."""
    each, extra = divmod(rows, size)
    first = rank * each + min(rank, extra)
    return first, first + each + (rank < extra)
