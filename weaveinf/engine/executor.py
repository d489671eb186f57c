"""What the engine needs of whoever runs the ranks."""

from collections.abc import Callable
from typing import Protocol

from weaveinf.engine.step import Step, StepOutput
from weaveinf.engine.worker import Worker


class Executor(Protocol):
    """Runs steps on all ranks, in the order in which they were submitted.

    Both calls raise `RankDied` when a rank is gone; the executor is closed then.
    """

    ahead: int
    """Steps that gain from being submitted before the oldest one's output is collected: 0 where `submit`
    computes, 1 where a device does meanwhile."""

    worker: Worker
    """Rank 0's."""

    on_sent: Callable[[], None] | None
    """Called by `submit` when the ranks have the step, before this one computes: what is done then by other
    threads keeps no rank waiting."""

    @property
    def failure(self) -> Exception | None:
        """What ended the run, as soon as it is known, also between steps; None while all is well."""

    def silent(self) -> str | None:
        """The rank that has given no sign of life for too long; None while all have. Any thread may ask."""

    def submit(self, step: Step) -> None:
        """Sends a step to every rank."""

    def collect(self) -> StepOutput:
        """Waits for the oldest step whose output was not collected."""

    def close(self) -> None:
        """Ends all ranks; may be called again."""
