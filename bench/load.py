"""Servers under load: weaveinf's and vLLM's at 2 ranks, and weaveinf's engine without HTTP, in turns.

    bench/peers/setup_vllm.sh      (once)
    .venv/bin/python bench/load.py [--turns 3] [--clients 1 8 32 128]

Both servers are started once and kept, stopped (SIGSTOP) while another is measured. In a turn all three run
with the same number of clients, one straight after the other, weaveinf's server between the two that it is
held against: `weaveinf bench serve` for both servers, 128 random prompt tokens and 64 of an answer, streamed;
`weaveinf bench throughput` with as many sequences running at a time as the servers have clients. A ratio is
the median over the turns of the ratios within a turn. Writes bench/results/load-DATE.md, .json and .png.
Three turns take about 20 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import psutil
from compare import BENCH, LIMIT_S, ROOT, commit, each_process
from machine import describe
from make_model import DIRECTORY, write
from matplotlib.figure import Figure

WEAVEINF = [sys.executable, "-m", "weaveinf"]
VLLM = [str(BENCH / ".venvs" / "vllm" / "bin" / "python"), str(BENCH / "peers" / "serve_vllm.py")]
AS_PEER = ["--tp", "2", "--kv-cache-gib", "1"]  # what time_vllm.py gives vLLM
SIZES = ["--prompt-tokens", "128", "--output-tokens", "64", "--json", "-"]
OURS, PEER, OFFLINE = "weaveinf", "vLLM", "weaveinf, no HTTP"
WANTED = {1: 1.3, 8: 1.3, 32: 1.3, 128: 1.15}  # times vLLM's tokens a second
HTTP_COST = 0.05
LEAST_REQUESTS, MOST_REQUESTS = 24, 256  # of one run; eight of each client otherwise
ROUNDS = {8: 3}  # in a turn: short runs that memory binds, whose rate on a shared machine changes in seconds

Turn = dict[str, dict[str, Any]]


def run(command: list[str]) -> dict[str, Any]:
    """What a command of weaveinf's measured."""
    done = subprocess.run([*WEAVEINF, *command], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"weaveinf {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


class Server:
    """The processes of one server, all of them stopped but while it is measured."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._noise = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() ends it
        self._process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=self._noise, stderr=self._noise, cwd=ROOT
        )
        try:
            self._wait()
            with urlopen(f"{self._url}/version", timeout=LIMIT_S) as page:
                self.version = json.load(page)["version"]
            each_process(self._process.pid, psutil.Process.suspend)
        except BaseException:
            self.close()
            raise

    def measure(self, clients: int, requests: int) -> dict[str, Any]:
        """One run of `weaveinf bench serve`. RuntimeError where a request failed."""
        command = [
            "bench",
            "serve",
            "--url",
            self._url,
            "--clients",
            str(clients),
            "--requests",
            str(requests),
        ]
        each_process(self._process.pid, psutil.Process.resume)
        try:
            found = run([*command, *SIZES])["runs"][0]
        except RuntimeError as error:
            raise self._failure(str(error)) from None
        each_process(self._process.pid, psutil.Process.suspend)
        if found["errors"]:
            raise RuntimeError(f"{self.name}, {clients} clients: {found['first_errors']}")
        return found

    def close(self) -> None:
        """Leaves no process of it, whatever state they are in."""
        each_process(self._process.pid, psutil.Process.kill)
        self._process.wait()
        self._noise.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # nobody there yet, or not ready
                urlopen(f"{self._url}/v1/models", timeout=5).close()
                return
            time.sleep(0.5)
        raise self._failure(f"it ended, or was not ready within {LIMIT_S:.0f} s")

    def _failure(self, what: str) -> RuntimeError:
        self._noise.seek(0)
        tail = "".join(self._noise.readlines()[-15:])
        return RuntimeError(
            f"{self.name}: {what}\nIts exit status: {self._process.poll()}; its last words:\n{tail}"
        )


def offline(model: Path, clients: int, requests: int) -> dict[str, Any]:
    """One run of `weaveinf bench throughput`."""
    command = ["bench", "throughput", str(model), *AS_PEER, "--max-num-seqs", str(clients)]
    return run([*command, "--requests", str(requests), *SIZES]) | {"model": model.name}


def take_turns(model: Path, servers: list[Server], clients: list[int], turns: int) -> dict[int, list[Turn]]:
    """Every contender with every number of clients, in turns; the order is turned round each time."""
    ways: dict[str, Callable[[int, int], dict[str, Any]]] = {one.name: one.measure for one in servers}
    ways[OFFLINE] = partial(offline, model)
    found: dict[int, list[Turn]] = {number: [] for number in clients}
    for turn in range(turns):
        for number in clients:
            requests = max(LEAST_REQUESTS, min(8 * number, MOST_REQUESTS))
            for around in range(ROUNDS.get(number, 1)):
                order = (PEER, OURS, OFFLINE)[:: -1 if (turn + around) % 2 else 1]
                found[number].append({name: ways[name](number, requests) for name in order})
                rates = {name: round(one["total_tokens_per_s"]) for name, one in found[number][-1].items()}
                print(f"turn {turn + 1} of {turns}, {number} clients, tokens/s: {rates}", flush=True)
    return found


def over(turns: list[Turn], name: str, other: str) -> float:
    """Tokens a second of one over the other's, the median over the turns."""
    return median(turn[name]["total_tokens_per_s"] / turn[other]["total_tokens_per_s"] for turn in turns)


def middle(turns: list[Turn], name: str, figure: Callable[[dict[str, Any]], float]) -> float:
    return median(figure(turn[name]) for turn in turns)


def rate(result: dict[str, Any]) -> float:
    return result["total_tokens_per_s"]


def late(result: dict[str, Any]) -> float:
    """Seconds, of the slowest hundredth to get a first token."""
    return result["ttft_ms"]["p99"] / 1e3


def table(found: dict[int, list[Turn]]) -> str:
    titles = ["clients", "weaveinf, tokens/s", "vLLM", "ratio", "weaveinf, p99 TTFT in s", "vLLM"]
    titles += [
        "weaveinf, median TPOT in ms",
        "vLLM",
        "client's processor time with weaveinf, of a core",
        "vLLM",
    ]
    titles += ["weaveinf without HTTP, tokens/s", "HTTP costs"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for clients, turns in found.items():
        pairs = {
            "{:.3f}": late,
            "{:.1f}": lambda result: result["tpot_ms"]["p50"],
            "{:.1%}": lambda result: result["client_cpu_share"],
        }
        cells = [str(clients), *(f"{middle(turns, name, rate):.0f}" for name in (OURS, PEER))]
        cells += [f"{over(turns, OURS, PEER):.2f}x"]
        cells += [form.format(middle(turns, name, of)) for form, of in pairs.items() for name in (OURS, PEER)]
        cells += [f"{middle(turns, OFFLINE, rate):.0f}", f"{1 - over(turns, OURS, OFFLINE):.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(found: dict[int, list[Turn]]) -> list[str]:
    """The required figures, each with what was measured."""
    said = []
    for clients, turns in found.items():
        times, cost = over(turns, OURS, PEER), 1 - over(turns, OURS, OFFLINE)
        ours, peer = (middle(turns, name, late) for name in (OURS, PEER))
        wanted = WANTED.get(clients, 1.0)
        for met, what in (
            (times >= wanted, f"{times:.2f}x vLLM's tokens a second (wanted {wanted:.2f}x)"),
            (ours < peer, f"p99 time to first token {ours:.3f} s (wanted below vLLM's {peer:.3f} s)"),
            (cost <= HTTP_COST, f"HTTP costs {cost:.1%} of the throughput (wanted {HTTP_COST:.0%} at most)"),
        ):
            said.append(f"{'met' if met else 'MISSED'}: {clients} clients: {what}")
    return said


def plot(found: dict[int, list[Turn]], out: Path) -> None:
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, rate, "tokens a second, prompts and answers", (OURS, PEER, OFFLINE)),
        (right, late, "p99 time to first token, s", (OURS, PEER)),
    )
    for axes, of, title, names in panels:
        for name in names:
            style = "--" if name == OFFLINE else "-"
            heights = [middle(turns, name, of) for turns in found.values()]
            (line,) = axes.plot([*found], heights, style, label=name)
            for clients, turns in found.items():  # every turn, so that their spread is seen
                every = [of(turn[name]) for turn in turns]
                axes.plot([clients] * len(turns), every, "o", color=line.get_color(), markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*found], [str(clients) for clients in found])
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.supxlabel("clients, each with one request at a time")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare servers under load.")
    parser.add_argument("--model", type=Path, default=DIRECTORY, help="made when it is missing")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[*WANTED])
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    if not Path(VLLM[0]).exists():
        raise SystemExit("vllm is not set up: run bench/peers/setup_vllm.sh")
    if not (args.model / "config.json").exists():
        write(args.model)
    machine, model = describe(), str(args.model.resolve())
    with contextlib.ExitStack() as stack:
        servers = []
        for name, command in (
            (OURS, [*WEAVEINF, "serve", model, *AS_PEER]),
            (PEER, [*VLLM, model, "--tp", "2"]),
        ):
            servers.append(Server(name, command))
            stack.callback(servers[-1].close)
            print(f"started {name} {servers[-1].version}", flush=True)
        measured = commit()  # before the results make the tree another one
        found = take_turns(args.model.resolve(), servers, args.clients, args.turns)
    date, command = (
        datetime.date.today().isoformat(),
        f"python bench/load.py {' '.join(sys.argv[1:])}".strip(),
    )
    said, versions = verdicts(found), {one.name: one.version for one in servers}
    lines = [f"# Servers under load, {date}", "", table(found), "", *(f"- {verdict}" for verdict in said), ""]
    lines += ["Ratios and costs are medians over the turns of what was measured within a turn.", ""]
    lines += ["Machine: " + "; ".join(f"{key}: {value}" for key, value in machine.items()), ""]
    lines += [f"Versions: {versions}; {args.turns} turns; `{command}`; weaveinf's commit: {measured}", ""]
    print("\n" + "\n".join(lines))
    stem = BENCH / "results" / f"load-{date}"
    stem.with_suffix(".md").write_text("\n".join(lines))
    whole = {"date": date, "command": command, "commit": measured, "machine": machine, "versions": versions}
    stem.with_suffix(".json").write_text(
        json.dumps(whole | {"verdicts": said, "turns": found}, indent=1) + "\n"
    )
    plot(found, stem.with_suffix(".png"))
    print(f"written to {stem.relative_to(ROOT)}.md, .json and .png")


if __name__ == "__main__":
    main()
