"""What the parts of a step cost here: measured once for a model, its ranks and its machine, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from weaveinf.weave.plan import Stage
from weaveinf.weave.timeline import Recorder, Span

log = logging.getLogger("weaveinf")

ROWS = (8, 32, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of rows that are measured, as far as the settings allow them."""
STALE, STALE_MS = 1.6, 0.5
"""A kept profile holds while a seam takes what it says, within this factor or this time."""

Run = Callable[[int, int, int, Recorder], None]
"""(rows, context before them, cut, recorder): every rank runs such a step, and records it."""


@dataclass
class Profile:
    """`Costs` by measurement, in ms. rows: ascending; the others: at each of `rows`, one block or seam.

    per_work: attention's ms for a row and a cached token that it reads. block_beside, seam_beside: how
    much slower a block and a seam are while the other runs.
    """

    num_layers: int
    rows: Sequence[int]
    embedding: Sequence[float]
    attention: Sequence[float]
    mlp: Sequence[float]
    seams: Sequence[float]
    per_work: float
    block_beside: float
    seam_beside: float
    row_block: int = 16
    seam_ctas: Sequence[int] = (0,)

    def block(self, stage: Stage, rows: int, context: float, seam_ctas: int) -> float:
        """See `Costs.block`."""
        found = self._at(getattr(self, stage), rows)
        return found + self.per_work * rows * context if stage == "attention" else found

    def seam(self, rows: int, seam_ctas: int) -> float:
        """See `Costs.seam`."""
        return self._at(self.seams, rows)

    def outside(self, rows: int) -> float:
        """See `Costs.outside`."""
        return 0.0

    def beside(self, rows: int) -> tuple[float, float]:
        """See `Costs.beside`."""
        return self.block_beside, self.seam_beside

    def _at(self, values: Sequence[float], rows: int) -> float:
        """Straight between what was measured, in proportion to the rows beyond."""
        if rows > self.rows[-1]:
            return values[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, values))


def measure(run: Run, num_layers: int, most_rows: int, most_tokens: int) -> Profile:
    """Runs steps of several sizes, whole and woven. Every rank calls it; each finds its own times."""
    rows = [n for n in ROWS if n <= most_rows] or [most_rows]
    whole = {n: _means(run, n, 0, 0) for n in rows}
    large = rows[-1]
    deep = min(large, max(rows[0], most_tokens // 4))
    before = max(0, min(most_tokens - deep, 3 * deep))
    per_work = 0.0
    if before:
        further = _means(run, deep, before, 0)["attention"] - _means(run, deep, 0, 0)["attention"]
        per_work = max(0.0, further) / (deep * before)
    attention = [whole[n]["attention"] - per_work * n * n / 2 for n in rows]
    block_beside, seam_beside = _beside(run, large, whole[large])
    return Profile(
        num_layers=num_layers,
        rows=tuple(rows),
        embedding=tuple(whole[n]["embedding"] for n in rows),
        attention=tuple(max(0.0, a) for a in attention),
        mlp=tuple(whole[n]["mlp"] for n in rows),
        seams=tuple(whole[n]["seam"] for n in rows),
        per_work=per_work,
        block_beside=block_beside,
        seam_beside=seam_beside,
    )


def _record(run: Run, rows: int, context: int, cut: int) -> list[Span]:
    recorder = Recorder()
    run(rows, context, cut, recorder)
    return recorder.steps[-1]


def _means(run: Run, rows: int, context: int, cut: int) -> dict[str, float]:
    """ms of a block of each kind and of a seam; of the last layer, that drops rows, nothing."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(3 if rows <= 512 else 2):
        spans = _record(run, rows, context, cut)
        last = max(span.layer for span in spans)
        times: dict[str, dict[Any, float]] = defaultdict(lambda: defaultdict(float))
        for span in spans:  # a block that votes has several
            if span.kind != "wait" and (span.layer < last or last == 0):
                kind = "seam" if span.kind == "seam" else span.name
                times[kind][span.name, span.layer] += (span.end - span.start) * 1e3
        for name, by_place in times.items():
            found[name].append(median(by_place.values()))
    return defaultdict(float, {name: min(values) for name, values in found.items()})


def _beside(run: Run, rows: int, alone: Mapping[str, float]) -> tuple[float, float]:
    """How much longer blocks take while a seam runs, and seams while a block runs."""
    spans = min((_record(run, rows, 0, rows // 2) for _ in range(2)), key=lambda s: s[-1].end - s[0].start)
    inner = [span for span in spans if 0 <= span.layer < max(s.layer for s in spans)]
    blocks = [span for span in inner if span.kind == "block"]
    seams = [span for span in spans if span.kind == "seam"]
    took = sum(span.end - span.start for span in blocks)
    under = sum(max(0.0, min(b.end, s.end) - max(b.start, s.start)) for b in blocks for s in seams)
    if not took or not under:
        return 1.0, 1.0
    expected = sum(alone[span.name] / 2 for span in blocks) / 1e3
    block = max(1.0, 1 + (took / expected - 1) * took / under)
    halves = [span.end - span.start for span in inner if span.kind == "seam"]
    return min(block, 3.0), min(max(1.0, mean(halves) * 1e3 / (alone["seam"] / 2)), 3.0)


def probe(run: Run, rows: int) -> float:
    """ms of a seam of `rows` rows, now. Every rank calls it."""
    return _means(run, rows, 0, 0)["seam"]


def load(key: Mapping[str, Any], now: float, rows: int) -> Profile | None:
    """The kept profile of `key`, unless a seam of `rows` rows takes another time `now` (ms)."""
    file = _file(key)
    try:
        found = json.loads(file.read_text())
        if found["key"] != key:
            raise ValueError("it is of another set-up")
        profile = Profile(**found["profile"])
        said = profile.seam(rows, 0)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the profile %s is of no use (%s): measured anew", file, error)
        return None
    if not said / STALE <= now <= said * STALE and abs(now - said) > STALE_MS:
        log.warning("a seam takes %.2f ms, not %.2f as in %s: measured anew", now, said, file)
        return None
    return profile


def save(key: Mapping[str, Any], profile: Profile) -> None:
    """Keeps a profile; without a place to keep it, it is measured again next time."""
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"key": dict(key), "profile": asdict(profile)}, indent=1) + "\n")
        new.replace(file)
    except OSError as error:
        log.warning("the profile is not kept: %s", error)


def _file(key: Mapping[str, Any]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache / "weaveinf" / "profiles" / f"{name}.json"
