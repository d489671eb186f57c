"""Counters of what really ran, written by whoever runs, read by the CLI and the metrics."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median


@dataclass
class Trace:
    """What the steps of one engine were, and how long they took.

    Attributes:
        steps: number of steps by how they ran: "woven", "fused" or "plain".
        reasons: why a step was not woven, with its count.
        selector: the method that chooses what is read, "" for none; budget: of requests that name none.
        choices: what it counts (`Selector.counts`, the very same).
        told: what a recorded trace says of blocks, seams and waits, once it was written.
        seconds: duration of the latest steps, by their phase ("prefill" has a row that is not a
            decode row).
        on_step: called after each step with its phase, seconds and rows.
    """

    steps: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    selector: str = ""
    budget: int = 0
    choices: Counter[str] = field(default_factory=Counter)
    told: str = ""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    on_step: Callable[[str, float, int], None] | None = None

    KEPT = 4096

    def step(self, how: str, why: str, phase: str, seconds: float, rows: int) -> None:
        if self.on_step is not None:
            self.on_step(phase, seconds, rows)
        self.steps[how] += 1
        self.reasons[why] += 1
        times = self.seconds[phase]
        times.append(seconds)
        if len(times) > self.KEPT:
            del times[: self.KEPT // 2]

    def median_ms(self, phase: str) -> float | None:
        """Median duration in ms of the latest steps of a phase; None when there was none."""
        times = self.seconds[phase]
        return median(times) * 1e3 if times else None

    def summary(self) -> str:
        """One line: how many steps ran how, and why; another of what a selector did."""
        ran = ", ".join(f"{self.steps[how]} {how}" for how in ("woven", "fused", "plain"))
        why = "; ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common())
        steps = f"steps: {ran}" + (f" - {why}" if why else "")
        if not self.selector:
            return steps
        did = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in self.choices.items())
        return f"{steps}\n{self.selector}, budget {self.budget}: {did}"
