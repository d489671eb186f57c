"""What really ran: blocks, seams and waits of a rank's latest steps, half by half.

Blocks and seams are wrapped while somebody wants to know; nothing is called here otherwise.
"""

import json
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam
from weaveinf.models.layers import Block

KEPT_STEPS = 16


class Span(NamedTuple):
    """Something of a half of a step; seconds of the monotonic clock (CUDA events until `Recorder.read`).

    kind: "block", "seam" or "wait" (for a seam to end). layer: -1 for the embedding.
    """

    step: int
    half: int
    kind: str
    name: str
    layer: int
    start: float
    end: float


class Recorder:
    """Keeps the spans of the latest steps of one rank; on CUDA, as the device came to them."""

    def __init__(self, device: torch.device) -> None:
        self.steps: deque[list[Span]] = deque(maxlen=KEPT_STEPS)
        self._origin: Any = None
        self._host_origin = 0.0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._host_origin = time.monotonic()
            self._origin = _mark()
        self._half = 0
        self._at = ("embedding", -1)
        self._number = 0

    def begin(self, number: int) -> None:
        """What comes now belongs to this step."""
        self._number = number
        self.steps.append([])

    def now(self) -> Any:
        """The moment, or where the current stream has come to."""
        return time.monotonic() if self._origin is None else _mark()

    def read(self) -> list[list[Span]]:
        """The kept steps, in seconds; waits for the device."""
        if self._origin is None:
            return list(self.steps)
        torch.cuda.synchronize()

        def seconds(at: Any) -> float:
            if isinstance(at, float):
                return at
            return self._host_origin + float(self._origin.elapsed_time(at)) / 1e3

        def told(span: Span) -> Span:
            return span._replace(start=seconds(span.start), end=seconds(span.end))

        return [[*map(told, spans)] for spans in self.steps]

    def add(self, kind: str, start: Any, end: Any) -> None:
        name, layer = self._at
        self.steps[-1].append(Span(self._number, self._half, kind, name, layer, start, end))

    def chain(self, chain: Sequence[tuple[Block, Joint]]) -> list[tuple[Block, Joint]]:
        """The same chain, its blocks recorded."""
        places = [("embedding", -1)]
        places += [(name, layer) for layer in range(len(chain) // 2) for name in ("attention", "mlp")]
        return [(self._block(block, at), joint) for (block, joint), at in zip(chain, places, strict=True)]

    def seams(self, seams: Sequence[Seam]) -> list[Seam]:
        """The same seams, recorded; the first is that of the first half."""
        return [RecordedSeam(self, seam, half) for half, seam in enumerate(seams)]

    def enter(self, half: int) -> None:
        """The blocks and seams that come now are of this half."""
        self._half = half

    def _block(self, block: Block, at: tuple[str, int]) -> Block:
        def recorded(x: Tensor, batch: Any, out: Tensor) -> Any:
            self._at = at
            began = self.now()
            result = block(x, batch, out)
            if isinstance(result, Generator):
                return self._voting(result, at, self._half)
            self.add("block", began, self.now())
            return result

        return recorded

    def _voting(
        self, block: Generator[Tensor, Tensor, Any], at: tuple[str, int], half: int
    ) -> Generator[Tensor, Tensor, Any]:
        """A span for each part between votes, during which the other half may run."""
        total: Any = None
        while True:
            self._at, self._half = at, half
            began = self.now()
            try:
                ballot = block.send(total)
            except StopIteration as end:
                return end.value
            finally:
                self.add("block", began, self.now())
            total = yield ballot


class RecordedSeam:
    """A seam that tells a recorder when it ran, and how long was waited for it."""

    def __init__(self, recorder: Recorder, seam: Seam, half: int) -> None:
        self.name, self.why, self.fused, self.ctas = seam.name, seam.why, seam.fused, seam.ctas
        self.open, self.gather, self.insert, self.close = seam.open, seam.gather, seam.insert, seam.close
        self._recorder, self._seam, self._half = recorder, seam, half
        self.ran = seam.ran
        self._of = recorder._at

    def partial(self) -> Tensor:
        self._recorder.enter(self._half)
        return self._seam.partial()

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        self._of = self._recorder._at
        self._seam.start(joint, kept, ctas)

    def finish(self) -> Tensor:
        recorder = self._recorder
        began = recorder.now()
        x = self._seam.finish()
        ended = recorder.now()
        recorder.enter(self._half)
        recorder._at = self._of
        recorder.add("wait", began, ended)
        self.ran = self._seam.ran
        recorder.add("seam", *self.ran)
        return x


def _mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def summary(spans: Sequence[Span]) -> str:
    """One line about some steps of one rank: seams, how much of them lay under blocks, waits."""
    total: dict[str, float] = {"block": 0.0, "seam": 0.0, "wait": 0.0}
    for span in spans:
        total[span.kind] += span.end - span.start
    seams, under = hidden_seams(spans)
    hidden = under / seams if seams else 0.0
    return (
        f"blocks {total['block'] * 1e3:.1f} ms, seams {total['seam'] * 1e3:.1f} ms, "
        f"{hidden:.0%} of them hidden, waits {total['wait'] * 1e3:.1f} ms"
    )


def hidden_seams(spans: Sequence[Span]) -> tuple[float, float]:
    """Seconds of a rank's seams, and for how many of them a block of its ran meanwhile."""
    blocks, seams = (
        np.array([(span.start, span.end) for span in spans if span.kind == kind]).reshape(-1, 2)
        for kind in ("block", "seam")
    )
    both = np.minimum(seams[:, None, 1], blocks[:, 1]) - np.maximum(seams[:, None, 0], blocks[:, 0])
    return float((seams[:, 1] - seams[:, 0]).sum()), float(both.clip(0).sum())


def collect(recorder: Recorder, ranks: Ranks) -> dict[int, list[Span]]:
    """The kept spans of all ranks, on every rank; every rank calls it."""
    mine = json.dumps([span for step in recorder.read() for span in step])
    return {rank: [Span(*span) for span in json.loads(said)] for rank, said in enumerate(ranks.agree(mine))}


def write(file: Path, ranks: Mapping[int, Sequence[Span]]) -> str:
    """Writes a Chrome trace (chrome://tracing, ui.perfetto.dev) and, beside it, a picture of one step.

    Returns a line that says what rank 0 did and what was written. OSError when it cannot be.
    """
    did = summary(ranks[0])
    events: list[dict[str, Any]] = []
    for rank, spans in ranks.items():
        for track, name in enumerate(("", "compute", "seams")):
            what = {"name": f"rank {rank}"} if not track else {"name": name}
            kind = "thread_name" if track else "process_name"
            events.append({"ph": "M", "pid": rank, "tid": track, "name": kind, "args": what})
        events += [_event(rank, span) for span in spans]
    file.write_text(json.dumps({"traceEvents": events}) + "\n")
    try:
        draw(file.with_suffix(".png"), ranks)
    except ImportError:
        return f"{did}: {file} (for a picture too: pip install matplotlib)"
    return f"{did}: {file} and {file.with_suffix('.png')}"


def _event(rank: int, span: Span) -> dict[str, Any]:
    place = span.name if span.layer < 0 else f"{span.name} {span.layer}"
    return {
        "ph": "X",
        "pid": rank,
        "tid": 2 if span.kind == "seam" else 1,
        "name": place if span.kind == "block" else f"{span.kind} after {place}",
        "ts": span.start * 1e6,
        "dur": (span.end - span.start) * 1e6,
        "args": {"step": span.step, "half": "AB"[span.half]},
    }


_LOOKS = {
    ("block", 0): ("#2b6cb0", "blocks of half A"),
    ("block", 1): ("#dd6b20", "of half B"),
    ("seam", 0): ("#90cdf4", "seams of half A"),
    ("seam", 1): ("#fbd38d", "of half B"),
    ("wait", 0): ("#e2e8f0", "waiting"),
}


def draw(file: Path, ranks: Mapping[int, Sequence[Span]]) -> None:
    """A PNG of the latest step that has two halves, or of the one with the longest block: a row of blocks and
    one of seams for each rank; none where nothing ran. ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not ranks[0]:
        return

    woven = [span.step for span in ranks[0] if span.half]
    chosen = max(woven) if woven else max(ranks[0], key=lambda span: span.end - span.start).step
    figure = Figure(figsize=(14, 1 + 1.3 * len(ranks)), dpi=110)
    axes = figure.add_subplot()
    origin = min(span.start for spans in ranks.values() for span in spans if span.step == chosen)
    for rank, spans in ranks.items():
        for span in (span for span in spans if span.step == chosen):
            row = 2.5 * (len(ranks) - 1 - rank) + (span.kind != "seam")
            left, width = (span.start - origin) * 1e3, (span.end - span.start) * 1e3
            colour, _ = _LOOKS[span.kind, 0 if span.kind == "wait" else span.half]
            axes.barh(row, width, left=left, height=0.9, color=colour, edgecolor="white", linewidth=0.3)
    rows = [2.5 * (len(ranks) - 1 - rank) + part for rank in ranks for part in (1, 0)]
    axes.set_yticks(rows, [f"rank {rank} {part}" for rank in ranks for part in ("blocks", "seams")])
    axes.set_xlabel("ms")
    legend = [Patch(color=colour, label=label) for colour, label in _LOOKS.values()]
    figure.legend(handles=legend, ncols=5, loc="upper center", frameon=False)
    figure.savefig(file, bbox_inches="tight")
