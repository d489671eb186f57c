"""What the parts of a step cost here: measured once for a model, its ranks and its machine, kept on disk."""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

import numpy as np

from weaveinf.weave.plan import Half, Stage, predict
from weaveinf.weave.timeline import Span

log = logging.getLogger("weaveinf")

ROWS = (8, 32, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of rows that are measured, as far as the settings allow them."""
STALE, STALE_MS = 1.6, 0.5
"""A kept profile holds while a seam takes what it says, within this factor or this time."""

Run = Callable[[int, int, int, int], list[Span]]
"""(rows, context before them, cut, CTAs of seams): every rank runs such a step; what was recorded of it."""
Table = Sequence[Sequence[float]]


@dataclass
class Profile:
    """`Costs` by measurement, in ms. rows: ascending; the others: at each of `rows`, one block or seam.

    seams, block_beside and seam_beside have a line for each of `seam_ctas`, of which the first is 0. The last
    two: how much slower a block and a seam are while the other runs, in a step of so many rows, cut.
    outside_whole, outside_woven: what such steps took beyond what these costs explain; less than nothing for
    the last layer, which drops rows. per_work: attention's ms for a row and a cached token that it reads.
    """

    num_layers: int
    rows: Sequence[int]
    embedding: Sequence[float]
    attention: Sequence[float]
    mlp: Sequence[float]
    seams: Table
    block_beside: Table
    seam_beside: Table
    outside_whole: Sequence[float]
    outside_woven: Sequence[float]
    per_work: float
    row_block: int = 16
    seam_ctas: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        tables = [self.seams, self.block_beside, self.seam_beside]
        by_rows = [self.embedding, self.attention, self.mlp, self.outside_whole, self.outside_woven]
        by_rows += [line for table in tables for line in table]
        if any(len(values) != len(self.rows) for values in by_rows):
            raise ValueError("not a time for each number of rows")
        if any(len(table) != len(self.seam_ctas) for table in tables):
            raise ValueError("not a line for each number of CTAs")

    def block(self, stage: Stage, rows: int, context: float, seam_ctas: int) -> float:
        """See `Costs.block`."""
        found = self._at(getattr(self, stage), rows)
        return found + self.per_work * rows * context if stage == "attention" else found

    def seam(self, rows: int, seam_ctas: int) -> float:
        """See `Costs.seam`."""
        return self._at(self._line(self.seams, seam_ctas), rows)

    def outside(self, rows: int, halves: int = 1) -> float:
        """See `Costs.outside`."""
        return self._at(self.outside_woven if halves > 1 else self.outside_whole, rows)

    def beside(self, rows: int, seam_ctas: int) -> tuple[float, float]:
        """See `Costs.beside`."""
        tables = self.block_beside, self.seam_beside
        block, seam = (np.interp(rows, self.rows, self._line(table, seam_ctas)) for table in tables)
        return float(block), float(seam)

    def _line(self, table: Table, seam_ctas: int) -> Sequence[float]:
        return table[self.seam_ctas.index(seam_ctas)]

    def _at(self, values: Sequence[float], rows: int) -> float:
        """Straight between what was measured, in proportion to the rows beyond."""
        if rows > self.rows[-1]:
            return values[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, values))


def measure(
    run: Run, num_layers: int, most_rows: int, most_tokens: int, seam_ctas: Sequence[int] = (0,)
) -> Profile:
    """Runs steps of several sizes, whole and woven, with seams of each of `seam_ctas` (0 first). Every rank
    calls it; each finds its own times."""
    rows = tuple(n for n in ROWS if n <= most_rows) or (most_rows,)
    whole: dict[tuple[int, int], list[list[Span]]] = defaultdict(list)
    woven: dict[tuple[int, int], list[list[Span]]] = defaultdict(list)
    for n, units in product(rows, seam_ctas):
        for _ in range(_tries(n)):
            whole[n, units].append(run(n, 0, 0, units))
            woven[n, units].append(run(n, 0, n // 2, units))
    means = {key: _means(tries) for key, tries in whole.items()}
    deep = min(rows[-1], max(rows[0], most_tokens // 4))
    before = max(0, min(most_tokens - deep, 3 * deep))
    per_work = 0.0
    if before:
        times = range(_tries(deep))
        near, far = (_means([run(deep, at, 0, 0) for _ in times])["attention"] for at in (0, before))
        per_work = max(0.0, far - near) / (deep * before)
    ones, none = ((1.0,) * len(rows),) * len(seam_ctas), (0.0,) * len(rows)
    found = Profile(
        num_layers=num_layers,
        rows=rows,
        embedding=tuple(means[n, 0]["embedding"] for n in rows),
        attention=tuple(max(0.0, means[n, 0]["attention"] - per_work * n * n / 2) for n in rows),
        mlp=tuple(means[n, 0]["mlp"] for n in rows),
        seams=tuple(tuple(means[n, units]["seam"] for n in rows) for units in seam_ctas),
        block_beside=ones,
        seam_beside=ones,
        outside_whole=none,
        outside_woven=none,
        per_work=per_work,
        seam_ctas=tuple(seam_ctas),
    )
    beside = [[_beside(woven[n, units], found, n, units) for n in rows] for units in seam_ctas]
    found = replace(
        found,
        block_beside=tuple(tuple(block for block, _ in line) for line in beside),
        seam_beside=tuple(tuple(seam for _, seam in line) for line in beside),
    )

    def outside(steps: Mapping[tuple[int, int], Any], n: int, units: int, halves: list[Half]) -> float:
        return _total(steps[n, units]) - predict(found, halves, (units, units))

    return replace(
        found,
        outside_whole=tuple(outside(whole, n, 0, [Half(n, n / 2)]) for n in rows),
        outside_woven=tuple(median(outside(woven, n, c, _halves(n)) for c in seam_ctas) for n in rows),
    )


def _halves(rows: int) -> list[Half]:
    """Of a prompt that is cut in its middle."""
    cut = rows // 2
    return [Half(cut, cut / 2), Half(rows - cut, (cut + rows) / 2)]


def _tries(rows: int) -> int:
    """Of a step of so many rows: small ones vary more, and are soon done."""
    return 9 if rows <= 128 else 3 if rows <= 512 else 2


def _total(tries: Sequence[Sequence[Span]]) -> float:
    """ms of a step."""
    return median(max(s.end for s in spans) - min(s.start for s in spans) for spans in tries) * 1e3


def _means(tries: Sequence[Sequence[Span]]) -> dict[str, float]:
    """ms of a block of each kind and of a seam; of the last layer, that drops rows, nothing."""
    found: dict[str, list[float]] = defaultdict(list)
    for spans in tries:
        last = max(span.layer for span in spans)
        times: dict[str, dict[Any, float]] = defaultdict(lambda: defaultdict(float))
        for span in spans:  # a block that votes has several
            if span.kind != "wait" and (span.layer < last or last == 0):
                kind = "seam" if span.kind == "seam" else span.name
                times[kind][span.name, span.layer] += (span.end - span.start) * 1e3
        for name, by_place in times.items():
            found[name].append(median(by_place.values()))
    return defaultdict(float, {name: min(values) for name, values in found.items()})


def _beside(
    tries: Sequence[Sequence[Span]], alone: Profile, rows: int, seam_ctas: int
) -> tuple[float, float]:
    """How much longer blocks take while a seam runs, and seams while a block runs, in such halves."""
    halves = _halves(rows)
    spans = min(tries, key=lambda spans: spans[-1].end - spans[0].start)
    inner = [span for span in spans if 0 <= span.layer < max(s.layer for s in spans)]
    blocks = [span for span in inner if span.kind == "block"]
    seams = [span for span in spans if span.kind == "seam"]
    took = sum(span.end - span.start for span in blocks)
    under = sum(max(0.0, min(b.end, s.end) - max(b.start, s.start)) for b in blocks for s in seams)
    if not took or not under:
        return 1.0, 1.0
    expected = sum(alone.block(cast(Stage, span.name), *halves[span.half], 0) for span in blocks) / 1e3
    block = max(1.0, 1 + (took / expected - 1) * took / under)
    beside = [s for s in inner if s.kind == "seam"]
    seam = mean((s.end - s.start) * 1e3 / alone.seam(halves[s.half].rows, seam_ctas) for s in beside)
    return min(block, 3.0), min(max(1.0, seam), 3.0)


def load(key: Mapping[str, Any], now: float) -> Profile | None:
    """The kept profile of `key`, unless a seam by itself takes another time `now` (ms) than then."""
    file = _file(key)
    try:
        found = json.loads(file.read_text())
        if found["key"] != key:
            raise ValueError("it is of another set-up")
        profile, then = Profile(**found["profile"]), float(found["seam_ms"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the profile %s is of no use (%s): measured anew", file, error)
        return None
    if not then / STALE <= now <= then * STALE and abs(now - then) > STALE_MS:
        log.warning("a seam takes %.2f ms, not %.2f as in %s: measured anew", now, then, file)
        return None
    return profile


def save(key: Mapping[str, Any], profile: Profile, now: float) -> None:
    """Keeps a profile, and what a seam takes now; without a place it is measured again next time."""
    file = _file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        whole = {"key": dict(key), "seam_ms": now, "profile": asdict(profile)}
        new.write_text(json.dumps(whole, indent=1) + "\n")
        new.replace(file)
    except OSError as error:
        log.warning("the profile is not kept: %s", error)


def _file(key: Mapping[str, Any]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache / "weaveinf" / "profiles" / f"{name}.json"
