"""Times weaveinf beside transformers and vLLM, in turns on the same machine, and prints the ratios.

    bench/peers/setup_transformers.sh && bench/peers/setup_vllm.sh      (once)
    .venv/bin/python bench/compare.py [--turns 15] [--only weaveinf vllm]

Every contender is started once and kept, stopped (SIGSTOP) while another is timed. In each turn all of them
run the same cell, one straight after the other, so that a slow minute of the machine touches all alike; a
ratio is the median over the turns of the ratios within a turn. A contender whose prefill the first turns
show to be OUT_OF_REACH in a cell runs no more turns of that cell, but for vLLM at 2 ranks. The table goes to
standard output and, with every single figure, to bench/results/. Where torch's products are faster in
float32 than in bfloat16, the peers run in float32 too, with weights twice as large.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median

import psutil
import torch
from machine import describe, linear_gflops
from make_model import DIRECTORY, write
from peers.cells import CELLS

BENCH = Path(__file__).parent
ROOT = BENCH.parent
LIMIT_S = 600.0  # for a contender to start, or to time one cell
SURVEY = 2  # turns that everything takes part in
OUT_OF_REACH = 2.0
DECODE_OVER_VLLM = 1.6
PREFILL_OVER_BEST = 1.1
PREFILL_OVER_BEST_MEAN = 1.2

Cell = tuple[int, int]
KEYS = ("prefill_ms", "decode_ms")


@dataclass(frozen=True)
class Contender:
    """One engine in one configuration."""

    engine: str
    tp: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        ranks = "1 process" if self.tp == 1 else f"{self.tp} ranks"
        return f"{self.engine}, {ranks}, {self.dtype}"

    @property
    def python(self) -> Path:
        if self.engine == "weaveinf":
            return Path(sys.executable)
        return BENCH / ".venvs" / self.engine / "bin" / "python"

    def command(self, model: Path) -> list[str]:
        script = BENCH / "peers" / f"time_{self.engine}.py"
        return [str(self.python), str(script), str(model), "--tp", str(self.tp), "--dtype", self.dtype]


def each_process(pid: int, act: Callable[[psutil.Process], None]) -> None:
    """Does something to a process and to all that it started, as far as they are still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in [*first.children(recursive=True), first]:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)


class Running:
    """A contender's processes: all of them stopped, except while one of its cells is timed."""

    def __init__(self, contender: Contender, model: Path) -> None:
        self.contender = contender
        self._noise = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() ends it
        self._process = subprocess.Popen(
            contender.command(model),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            start_new_session=True,
        )
        self._heard = b""
        self.about = self._answer()
        self._all(psutil.Process.suspend)

    def time(self, cell: Cell) -> dict[str, float]:
        """Milliseconds of the cell's prefill and of one decode step."""
        self._all(psutil.Process.resume)
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d %d\n" % cell)
        self._process.stdin.flush()
        found = self._answer()
        self._all(psutil.Process.suspend)
        return found

    def close(self) -> None:
        """Leaves no process of it, whatever state they are in."""
        self._all(psutil.Process.kill)
        self._process.wait()
        self._noise.close()

    def _all(self, act: Callable[[psutil.Process], None]) -> None:
        each_process(self._process.pid, act)

    def _answer(self) -> dict:
        """Its next JSON line; a RuntimeError with its last words when it ends or keeps silent instead."""
        deadline = time.monotonic() + LIMIT_S
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                line, newline, rest = self._heard.partition(b"\n")
                if newline:
                    self._heard = rest
                    if line.startswith(b"{"):
                        return json.loads(line)
                    continue
                if not ready.select(deadline - time.monotonic()):
                    raise self._failure(f"did not answer within {LIMIT_S:.0f} s")
                more = os.read(self._process.stdout.fileno(), 1 << 16)
                if not more:
                    raise self._failure("ended")
                self._heard += more

    def _failure(self, what: str) -> RuntimeError:
        self._noise.seek(0)
        tail = "".join(self._noise.readlines()[-15:])
        return RuntimeError(f"{self.contender.name} {what}:\n{tail}")


def contenders(only: list[str]) -> list[Contender]:
    """Everything that runs, in the order of a turn."""
    dtypes = ["bfloat16"]
    if linear_gflops(torch.float32) > linear_gflops(torch.bfloat16):
        dtypes.append("float32")
    found = [Contender("weaveinf", tp) for tp in (1, 2)]
    for engine in ("transformers", "vllm"):
        found += [Contender(engine, tp, dtype) for tp in (1, 2) for dtype in dtypes]
    found = [contender for contender in found if contender.engine in only]
    for contender in found:
        if not contender.python.exists():
            raise SystemExit(f"{contender.engine} is not set up: run bench/peers/setup_{contender.engine}.sh")
    return found


@dataclass
class Results:
    """All figures of all turns, and what they say."""

    about: dict[Contender, dict[str, object]]
    turns: dict[Cell, list[dict[Contender, dict[str, float]]]] = field(
        default_factory=lambda: {cell: [] for cell in CELLS}
    )

    def figure(self, contender: Contender, cell: Cell, key: str) -> float:
        """Milliseconds, the median over the turns."""
        return median(turn[contender][key] for turn in self.turns[cell] if contender in turn)

    def ratio(self, peer: Contender, ours: Contender, cell: Cell, key: str) -> float:
        """How many times longer the peer took, the median over the turns of both."""
        both = [turn for turn in self.turns[cell] if peer in turn and ours in turn]
        return median(turn[peer][key] / turn[ours][key] for turn in both)

    def in_reach(self, contender: Contender, cell: Cell) -> bool:
        """Whether it takes part in the next turn of a cell."""
        must = contender.engine == "weaveinf" or (contender.engine, contender.tp) == ("vllm", 2)
        if must or len(self.turns[cell]) < SURVEY:
            return True
        best = min(self.figure(peer, cell, "prefill_ms") for peer in self.about)
        return self.figure(contender, cell, "prefill_ms") <= OUT_OF_REACH * best

    def table(self) -> str:
        """Milliseconds of prefill / of a decode step, then every other one over weaveinf at 2 ranks."""
        titles = [f"B={batch} L={length}" for batch, length in CELLS]
        lines = ["| prefill ms / decode ms a step | " + " | ".join(titles) + " |"]
        lines.append("| --- |" + " --- |" * len(CELLS))

        def row(title: str, figure: Callable[[Cell, str], float], unit: str) -> None:
            cells = [" / ".join(f"{figure(cell, key):.2f}{unit}" for key in KEYS) for cell in CELLS]
            lines.append("| " + " | ".join([title, *cells]) + " |")

        for one in self.about:
            row(one.name, partial(self.figure, one), "")
        ours = Contender("weaveinf", 2)
        for one in self.about:
            if ours in self.about and one != ours:
                row(f"ratio: {one.name}", partial(self.ratio, one, ours), "x")
        return "\n".join(lines)

    def verdicts(self) -> list[str]:
        """The required figures, each with what was measured."""
        ours = Contender("weaveinf", 2)
        peers = [contender for contender in self.about if contender.engine != "weaveinf"]
        vllm = [peer for peer in peers if (peer.engine, peer.tp) == ("vllm", 2)]
        if ours not in self.about or not peers:
            return []
        found = []

        def ratios(among: list[Contender], key: str) -> list[float]:
            return [min(self.ratio(peer, ours, cell, key) for peer in among) for cell in CELLS]

        def judge(what: str, measured: float, wanted: float) -> None:
            word = "met" if measured >= wanted else "MISSED"
            found.append(f"{word}: {what}: {measured:.2f}x (wanted {wanted:.1f}x)")

        if vllm:
            over_vllm = min(ratios(vllm, "decode_ms"))
            judge("decode over vLLM at 2 ranks, worst cell", over_vllm, DECODE_OVER_VLLM)
        judge("decode over the best peer, worst cell", min(ratios(peers, "decode_ms")), 1.0)
        alike = [peer for peer in peers if peer.dtype == ours.dtype]
        for among, who in ((alike, f"the best peer in {ours.dtype}"), (peers, "the best peer in any dtype")):
            over = ratios(among, "prefill_ms")
            judge(f"prefill over {who}, worst cell", min(over), PREFILL_OVER_BEST)
            judge(f"prefill over {who}, mean", mean(over), PREFILL_OVER_BEST_MEAN)
        return found

    def as_json(self) -> list[dict[str, object]]:
        return [
            {
                "engine": one.engine,
                "tp": one.tp,
                "dtype": one.dtype,
                "batch": cell[0],
                "prompt_tokens": cell[1],
                **{key: self.figure(one, cell, key) for key in KEYS},
                **{f"turns_{key}": [turn.get(one, {}).get(key) for turn in turns] for key in KEYS},
            }
            for one in self.about
            for cell, turns in self.turns.items()
        ]


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write_results(results: Results, machine: dict[str, object], command: str) -> None:
    """Prints the report and keeps it, with the figures as JSON beside it."""
    date, version = datetime.date.today().isoformat(), commit()
    lines = [f"# weaveinf beside its peers, {date}", "", results.table(), ""]
    lines += ["The ratios are over weaveinf at 2 ranks: above 1, weaveinf at 2 ranks is faster.", ""]
    lines += [f"- {verdict}" for verdict in results.verdicts()]
    lines += ["", "Machine: " + "; ".join(f"{key}: {value}" for key, value in machine.items()), ""]
    for one, about in results.about.items():
        turns = [sum(one in turn for turn in results.turns[cell]) for cell in CELLS]
        said = ", ".join(f"{key} {value}" for key, value in about.items())
        lines.append(f"- {one.name}: {' / '.join(map(str, turns))} turns, {said}")
    lines += ["", f"Command: `{command}`; weaveinf's commit: {version}", ""]
    text = "\n".join(lines)
    print("\n" + text)
    stem = BENCH / "results" / f"compare-{date}-{str(machine['instructions']).lower().replace(' ', '-')}"
    stem.parent.mkdir(exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    whole: dict[str, object] = {"date": date, "command": command, "commit": version, "machine": machine}
    whole |= {"cells": results.as_json(), "verdicts": results.verdicts()}
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    print(f"written to {stem.relative_to(ROOT)}.md and .json")


def take_turns(running: list[Running], turns: int) -> Results:
    """Every contender in every cell, in turns; the order is turned round each time."""
    results = Results({one.contender: one.about for one in running})
    for number in range(1, turns + 1):
        for cell in CELLS:
            taking_part = [one for one in running if results.in_reach(one.contender, cell)]
            figures = {one.contender: one.time(cell) for one in taking_part[:: 1 if number % 2 else -1]}
            results.turns[cell].append(figures)
        print(f"turn {number} of {turns}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare weaveinf with transformers and vLLM.")
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    parser.add_argument("--turns", type=int, default=15)
    engines = ["weaveinf", "transformers", "vllm"]
    parser.add_argument("--only", nargs="+", choices=engines, default=engines)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    order = contenders(args.only)
    if not (args.model / "config.json").exists():
        write(args.model)
    machine = describe()
    running: list[Running] = []
    try:
        for contender in order:
            running.append(Running(contender, args.model.resolve()))
            print(f"started {contender.name}", flush=True)
        results = take_turns(running, args.turns)
    finally:
        for one in running:
            one.close()
    command = f"python bench/compare.py {' '.join(sys.argv[1:])}".strip()
    write_results(results, machine, command)


if __name__ == "__main__":
    main()
