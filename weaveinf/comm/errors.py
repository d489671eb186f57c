"""What goes wrong between ranks."""


class RankDied(RuntimeError):
    """A peer's process is gone, so nothing that needs all ranks can go on.

    `rank` is the peer (None when the transport does not tell which), `words` what is known of its end.
    """

    def __init__(self, rank: int | None, words: str) -> None:
        super().__init__(f"rank {rank} died: {words}" if rank is not None else f"a rank died: {words}")
        self.rank = rank
        self.words = words

    def __reduce__(self) -> tuple[type, tuple[int | None, str]]:
        return type(self), (self.rank, self.words)
