"""Times weaveinf beside transformers and vLLM, in turns on the same machine, and prints the ratios.

    bench/peers/setup_transformers.sh && bench/peers/setup_vllm.sh      (once)
    .venv/bin/python bench/compare.py [--rounds 3] [--repeats 3] [--only weaveinf vllm]

Every round starts every contender once, one after the other, so that a slow minute of the machine
touches all alike; a cell's figure is the median over the rounds. A peer that the first round shows to be
more than OUT_OF_REACH times slower than the best peer in every figure sits out the others. The table goes
to standard output and, with every single figure, to bench/results/. Where the processor has no bfloat16
products of its own, the peers run in float32 too; in each cell the faster one counts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from machine import describe, has_fast_bfloat16
from make_model import DIRECTORY, write
from peers.cells import CELLS, DECODE_TOKENS

BENCH = Path(__file__).parent
ROOT = BENCH.parent
LIMIT_S = 1800.0  # for one contender in one round
OUT_OF_REACH = 1.5
DECODE_OVER_VLLM = 1.6
PREFILL_OVER_BEST = 1.1
PREFILL_OVER_BEST_MEAN = 1.2

Cell = tuple[int, int]
Figures = dict[str, float]  # prefill_ms, decode_ms


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

    def measure(self, model: Path, repeats: int) -> tuple[dict[Cell, Figures], dict[str, object]]:
        """Starts it once and times every cell; also what it says about itself."""
        if self.engine == "weaveinf":
            return self._measure_weaveinf(model, repeats)
        script = BENCH / "peers" / f"time_{self.engine}.py"
        options = ["--tp", self.tp, "--dtype", self.dtype, "--repeats", repeats]
        lines = run([self.python, script, model, *options]).splitlines()
        cells: dict[Cell, Figures] = {}
        about: dict[str, object] = {}
        for line in lines:
            if line.startswith('{"engine"'):
                found = json.loads(line)
                cells[found["batch"], found["prompt_tokens"]] = figures(found)
                about = {key: found[key] for key in ("version", "torch")}
        if set(cells) != set(CELLS):
            raise RuntimeError(f"{self.name} reported only {sorted(cells)}")
        return cells, about

    def _measure_weaveinf(self, model: Path, repeats: int) -> tuple[dict[Cell, Figures], dict[str, object]]:
        cells: dict[Cell, Figures] = {}
        about: dict[str, object] = {}
        command = [self.python, "-m", "weaveinf", "bench", "latency", model, "--tp", self.tp]
        command += ["--repeats", repeats, "--decode-tokens", DECODE_TOKENS]
        for batch, length in CELLS:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                shape = ["--batch", batch, "--prompt-tokens", length, "--json", file.name]
                run([*command, *shape])
                found = json.loads(Path(file.name).read_text())
            cells[batch, length] = figures(found)
            about = {"torch": torch.__version__, "commit": commit()}
            about |= {key: found[key] for key in ("seam", "kernels") if key in found}
        return cells, about


def figures(found: dict[str, float]) -> Figures:
    return {key: found[key] for key in ("prefill_ms", "decode_ms")}


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def run(command: list[object]) -> str:
    """Standard output of a program; its whole process group is gone afterwards, whatever happens."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as noise:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=noise, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of it had ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode != 0:
            noise.seek(0)
            tail = "".join(noise.readlines()[-15:])
            raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{tail}")
    return output


def contenders(only: list[str]) -> list[Contender]:
    """Everything that runs, in the order of a round."""
    dtypes = ["bfloat16"] if has_fast_bfloat16() else ["bfloat16", "float32"]
    found = [Contender("weaveinf", tp) for tp in (1, 2)]
    for engine in ("transformers", "vllm"):
        found += [Contender(engine, tp, dtype) for tp in (1, 2) for dtype in dtypes]
    found = [contender for contender in found if contender.engine in only]
    for contender in found:
        if not contender.python.exists():
            raise SystemExit(f"{contender.engine} is not set up: run bench/peers/setup_{contender.engine}.sh")
    return found


class Results:
    """All figures of all rounds, and what they say."""

    def __init__(self) -> None:
        self.rounds: dict[Contender, list[dict[Cell, Figures]]] = {}
        self.about: dict[str, dict[str, object]] = {}

    def add(self, contender: Contender, cells: dict[Cell, Figures], about: dict[str, object]) -> None:
        self.rounds.setdefault(contender, []).append(cells)
        self.about[contender.name] = about

    def figure(self, contender: Contender, cell: Cell, key: str) -> float:
        """Milliseconds, the median over the rounds."""
        return median(cells[cell][key] for cells in self.rounds[contender])

    def best(self, engine: str | None, tp: int | None, cell: Cell, key: str) -> float | None:
        """The fastest peer (None: any engine, any tp) in a cell; None where none ran."""
        peers = [
            self.figure(contender, cell, key)
            for contender in self.rounds
            if contender.engine != "weaveinf"
            and engine in (None, contender.engine)
            and tp in (None, contender.tp)
        ]
        return min(peers, default=None)

    def in_reach(self, contender: Contender) -> bool:
        """Whether a peer (or weaveinf) may still be the fastest peer in some figure."""
        if contender.engine == "weaveinf":
            return True
        for cell in CELLS:
            for key in ("prefill_ms", "decode_ms"):
                best = self.best(None, None, cell, key)
                if best is not None and self.figure(contender, cell, key) <= OUT_OF_REACH * best:
                    return True
        return False

    def table(self) -> str:
        """Milliseconds of prefill / of a decode step, then peer over weaveinf at 2 ranks."""
        titles = [f"B={batch} L={length}" for batch, length in CELLS]
        lines = ["| prefill ms / decode ms a step | " + " | ".join(titles) + " |"]
        lines.append("| --- |" + " --- |" * len(CELLS))
        for contender in self.rounds:
            row = [contender.name]
            for cell in CELLS:
                prefill = self.figure(contender, cell, "prefill_ms")
                row.append(f"{prefill:.1f} / {self.figure(contender, cell, 'decode_ms'):.2f}")
            lines.append("| " + " | ".join(row) + " |")
        ours = Contender("weaveinf", 2)
        for peer in self.rounds:
            if ours in self.rounds and peer.engine != "weaveinf":
                ratios = [
                    " / ".join(
                        f"{self.figure(peer, cell, key) / self.figure(ours, cell, key):.2f}x"
                        for key in ("prefill_ms", "decode_ms")
                    )
                    for cell in CELLS
                ]
                lines.append("| " + " | ".join([f"ratio: {peer.name}", *ratios]) + " |")
        return "\n".join(lines)

    def verdicts(self) -> list[str]:
        """The required figures, each with what was measured."""
        ours = Contender("weaveinf", 2)
        if ours not in self.rounds:
            return []
        found = []

        def ratios(engine: str | None, tp: int | None, key: str) -> list[float]:
            best = [self.best(engine, tp, cell, key) for cell in CELLS]
            return [
                peer / self.figure(ours, cell, key)
                for peer, cell in zip(best, CELLS, strict=True)
                if peer is not None
            ]

        def judge(what: str, measured: float, wanted: float) -> None:
            word = "met" if measured >= wanted else "MISSED"
            found.append(f"{word}: {what}: {measured:.2f}x (wanted {wanted:.1f}x)")

        if over_vllm := ratios("vllm", 2, "decode_ms"):
            judge("decode over vLLM at 2 ranks, worst cell", min(over_vllm), DECODE_OVER_VLLM)
        if over_best := ratios(None, None, "prefill_ms"):
            judge("decode over the best peer, worst cell", min(ratios(None, None, "decode_ms")), 1.0)
            judge("prefill over the best peer, worst cell", min(over_best), PREFILL_OVER_BEST)
            judge("prefill over the best peer, mean", mean(over_best), PREFILL_OVER_BEST_MEAN)
        return found

    def as_json(self) -> list[dict[str, object]]:
        return [
            {
                "engine": contender.engine,
                "tp": contender.tp,
                "dtype": contender.dtype,
                **self.about[contender.name],
                "batch": batch,
                "prompt_tokens": length,
                **{key: self.figure(contender, (batch, length), key) for key in keys},
                **{f"rounds_{key}": [cells[batch, length][key] for cells in rounds] for key in keys},
            }
            for contender, rounds in self.rounds.items()
            for batch, length in CELLS
            for keys in [("prefill_ms", "decode_ms")]
        ]


def write_results(results: Results, machine: dict[str, object], command: str) -> None:
    """Prints the report and keeps it, with the figures as JSON beside it."""
    date = datetime.date.today().isoformat()
    lines = [f"# weaveinf beside its peers, {date}", "", results.table(), ""]
    lines += ["The ratios are peer over weaveinf at 2 ranks: above 1, weaveinf is faster.", ""]
    lines += [f"- {verdict}" for verdict in results.verdicts()]
    lines += ["", "Machine: " + "; ".join(f"{key}: {value}" for key, value in machine.items()), ""]
    lines += [
        f"- {contender.name}: {len(rounds)} rounds, "
        + ", ".join(f"{key} {value}" for key, value in results.about[contender.name].items())
        for contender, rounds in results.rounds.items()
    ]
    lines += ["", f"Command: `{command}`", ""]
    text = "\n".join(lines)
    print("\n" + text)
    stem = BENCH / "results" / f"compare-{date}-{str(machine['instructions']).lower()}"
    stem.parent.mkdir(exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    whole = {"date": date, "command": command, "machine": machine, "cells": results.as_json()}
    whole["verdicts"] = results.verdicts()
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    print(f"written to {stem.relative_to(ROOT)}.md and .json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare weaveinf with transformers and vLLM.")
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a cell in a round")
    engines = ["weaveinf", "transformers", "vllm"]
    parser.add_argument("--only", nargs="+", choices=engines, default=engines)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that run() ends what it started
    order = contenders(args.only)
    if not (args.model / "config.json").exists():
        write(args.model)
    results = Results()
    machine = describe()
    for number in range(1, args.rounds + 1):
        for contender in order:
            began = time.perf_counter()
            results.add(contender, *contender.measure(args.model.resolve(), args.repeats))
            took = time.perf_counter() - began
            print(f"round {number}/{args.rounds}: {contender.name}: {took:.0f} s", flush=True)
        order = [contender for contender in order if results.in_reach(contender)]
    command = f"python bench/compare.py {' '.join(sys.argv[1:])}".strip()
    write_results(results, machine, command)


if __name__ == "__main__":
    main()
