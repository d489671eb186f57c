"""Whether and where to cut a step in two halves: the executor's loop, played on two resources.

Blocks run one after another, seams one after another, both side by side. What they cost comes from a
measured profile (weave/profile.py) or from the data of a GPU (weave/waves.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

Stage = Literal["embedding", "attention", "mlp"]

GAIN = 0.98
"""A cut must be predicted to take at most this share of the whole step."""
NEARER = 0.99
"""And at most this share of what a cut nearer to the middle takes: there costs were measured."""
_PLAYED = 3
"""Layers that are played; the others are like the last of them."""
_KEPT = 4096
"""Plans that are remembered."""


class Costs(Protocol):
    """What the parts of a step cost on one kind of machine, in ms."""

    num_layers: int
    row_block: int
    """Cuts are multiples of it."""
    seam_ctas: Sequence[int]
    """What seams may be given; 0: what they take with nothing beside them."""

    def block(self, stage: Stage, rows: int, context: float, seam_ctas: int) -> float:
        """A block of `rows` rows that read `context` cached tokens each, in the mean, on the units that
        a seam of `seam_ctas` leaves."""

    def seam(self, rows: int, seam_ctas: int) -> float:
        """A seam by itself."""

    def beside(self, rows: int, seam_ctas: int) -> tuple[float, float]:
        """How many times longer a block, and a seam of `seam_ctas`, take while the other runs, in a step of
        `rows`."""

    def outside(self, rows: int, halves: int = 1) -> float:
        """What a step, whole or in two halves, costs outside of blocks and seams."""


class Span(NamedTuple):
    """A block or the seam behind it (`what` is its stage, or "seam"), in ms since the step's first block."""

    half: int
    what: str
    start: float
    end: float


@dataclass(frozen=True)
class Plan:
    """How a step is to run.

    cut: rows of the first half; 0: the step runs whole, and `why` says for what reason. seam_ctas: of the
    seams that run under attention and under the MLP (see `Seam.ctas`). The times are
    predictions in ms; woven_ms is that of the best cut, taken or not.
    """

    cut: int
    seam_ctas: tuple[int, int]
    whole_ms: float
    woven_ms: float
    why: str


def unplanned(cut: int, why: str) -> Plan:
    """A plan that nobody has predicted anything of."""
    return Plan(cut, (0, 0), 0.0, 0.0, why)


class Half(NamedTuple):
    """Rows of a step, and how many cached tokens each of them reads in the mean."""

    rows: int
    context: float


def play(costs: Costs, halves: Sequence[Half], ctas: tuple[int, int], layers: int) -> list[Span]:
    """The executor's loop (weave/run.py) on one half or two: what starts and ends when, by its end."""
    both = range(len(halves))
    attention, mlp = ctas if len(halves) > 1 else (0, 0)
    given: dict[Stage, int] = {"embedding": mlp, "attention": attention, "mlp": mlp}
    blocks = {(stage, h): costs.block(stage, *halves[h], given[stage]) for stage in given for h in both}
    seams = {(units, h): costs.seam(halves[h].rows, units) for units in {attention, mlp, 0} for h in both}
    rows = sum(half.rows for half in halves)
    beside = {units: costs.beside(rows, units) for units in {attention, mlp}}
    line = _Line()
    chain: list[Stage] = ["embedding"]
    for _ in range(layers):
        chain += ["attention", "mlp"]
    for stage, next_given in zip(chain, [given[stage] for stage in chain[1:]] + [0], strict=True):
        for h in both:
            line.await_seam(h)
            line.block(h, stage, blocks[stage, h], beside[given[stage]])
            # The first half's seam lies under the second's same block, the second's under the first's next.
            line.start_seam(h, seams[next_given if h else given[stage], h])
    for h in both:
        line.await_seam(h)
    return line.spans


@dataclass
class _Seam:
    half: int
    work: float
    start: float


class _Line:
    """Time, and the seams under way: first in, first out."""

    def __init__(self) -> None:
        self.now = 0.0
        self.spans: list[Span] = []
        self._seams: list[_Seam] = []

    def start_seam(self, half: int, work: float) -> None:
        self._seams.append(_Seam(half, work, self.now))

    def await_seam(self, half: int) -> None:
        while any(seam.half == half for seam in self._seams):
            self._pass(self._seams[0].work, 1.0)

    def block(self, half: int, stage: Stage, work: float, beside: tuple[float, float]) -> None:
        start = self.now
        slow_block, slow_seam = beside
        while self._seams and work > 1e-12:
            time = min(work * slow_block, self._seams[0].work * slow_seam)
            work -= time / slow_block
            self._pass(time, slow_seam)
        self.now += work
        self.spans.append(Span(half, stage, start, self.now))

    def _pass(self, time: float, slow: float) -> None:
        """Time goes by; the first seam gets on."""
        self.now += time
        seam = self._seams[0]
        seam.work -= time / slow
        if seam.work <= 1e-12:
            self.spans.append(Span(seam.half, "seam", seam.start, self.now))
            del self._seams[0]
            if self._seams:
                self._seams[0].start = max(self._seams[0].start, self.now)


def predict(costs: Costs, halves: Sequence[Half], ctas: tuple[int, int]) -> float:
    """ms of a step, whole (one half) or woven (two)."""
    layers = min(costs.num_layers, _PLAYED)
    spans = play(costs, halves, ctas, layers)
    ends = [span.end for span in spans if span.what == "mlp" and span.half == 0]
    outside = costs.outside(sum(half.rows for half in halves), len(halves))
    return outside + spans[-1].end + (costs.num_layers - layers) * (ends[-1] - ends[-2:][0])


class Planner:
    """Picks the plan that is predicted to be fastest, never one that is predicted to lose."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._known: dict[tuple[int, int, int], Plan] = {}

    def plan(self, rows: int, work: float, first_work: float) -> Plan:
        """rows of the step; `work`: the cached tokens that all of them read together, `first_work`: those
        that the first half of the rows reads. Steps that hardly differ get the same plan."""
        context = max(work / max(rows, 1), 1.0)
        share = min(max(first_work / max(work, 1.0), 0.0), 1.0)
        key = rows, round(4 * math.log2(context)), round(16 * share)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = self._choose(rows, context, share)
        return self._known[key]

    def _choose(self, rows: int, context: float, share: float) -> Plan:
        costs = self._costs
        whole = predict(costs, [Half(rows, context)], (0, 0))
        pairs = [(attention, mlp) for attention in costs.seam_ctas for mlp in costs.seam_ctas]
        best, cut, ctas = math.inf, 0, (0, 0)
        for at in sorted(cuts(rows, costs.row_block), key=lambda at: abs(2 * at - rows)):
            halves = split(rows, context, share, at)
            # What seams get matters little for where to cut: all is tried only where that may be.
            if not cut or predict(costs, halves, ctas) < NEARER * best:
                best, ctas = min((predict(costs, halves, pair), pair) for pair in pairs)
                cut = at
        if not cut:
            return Plan(0, (0, 0), whole, whole, "too small to cut")
        if best > GAIN * whole:
            return Plan(0, (0, 0), whole, best, "predicted slower woven")
        return Plan(cut, ctas, whole, best, "predicted faster woven")


def cuts(rows: int, row_block: int) -> list[int]:
    """Where to cut may pay, ascending: multiples of the row block from a third to two thirds, close to one
    another at the half, where full waves are sought, and wide apart where only attention's share changes."""
    half, reach = round(rows / 2 / row_block), rows // 6 // row_block
    steps = [0] + [1 << i for i in range(reach.bit_length())]
    found = {(half + sign * step) * row_block for step in steps for sign in (-1, 1)}
    return sorted(at for at in found if 0 < rows <= 3 * at <= 2 * rows)


def split(rows: int, context: float, share: float, at: int) -> list[Half]:
    """The halves of a cut; `share` of the reading is the first half of the rows'. In between, the share grows
    with a quadratic through what is known: so it does within a prompt, and among equal rows."""
    slope, f = 4 * share - 1, at / rows
    first = min(max(slope * f + (1 - slope) * f * f, 0.0), 1.0)
    work = rows * context
    return [Half(at, first * work / at), Half(rows - at, (1 - first) * work / (rows - at))]
