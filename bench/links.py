"""Hosts on one machine: network namespaces joined by links of a given rate.

    sudo .venv/bin/python bench/links.py [--rate 1gbit] [--hosts 2]     what a TCP stream reaches

Two hosts are joined by one veth pair, more by a bridge in a namespace of its own; `tc tbf` limits every
direction of every link. Each host gets its own share of this process's cores. Needs Linux, root, iproute2
(ip, tc) and util-linux (taskset); `why_not` says what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

INTERFACE = "link0"
BURST, LATENCY = "128kb", "50ms"
"""Of the token bucket: what may leave at once after a pause (1 ms of 1 Gbit/s), and the queue's length."""


def why_not() -> str:
    """What this machine or user lacks for `Hosts`; "" when nothing."""
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    try:
        with Hosts(2):
            return ""
    except OSError as error:
        return f"no network namespaces here: {error}"


def _sh(*argv: str) -> str:
    """Runs a command; OSError with what it said when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


class Hosts:
    """A context: `count` network namespaces whose links carry `rate` (as `tc` writes it) in each direction.

    All is removed at the end, also after an error or SIGTERM, and what still runs in the namespaces is
    killed. OSError when it cannot be set up.
    """

    def __init__(self, count: int = 2, rate: str = "1gbit") -> None:
        self.count = count
        self.rate = rate
        tag = f"weaveinf-{os.getpid()}-{os.urandom(2).hex()}"
        self._names = [f"{tag}-{host}" for host in range(count)]
        self._hub = f"{tag}-hub"
        self._before: Any = None
        cores = sorted(os.sched_getaffinity(0))
        each = max(1, len(cores) // count)
        self._cores = [[cores[(h * each + i) % len(cores)] for i in range(each)] for h in range(count)]

    def __enter__(self) -> Hosts:
        with suppress(ValueError):  # not in the main thread: no signals come here
            self._before = signal.signal(signal.SIGTERM, _terminated)
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self._names, self._hub):
            self._kill(name)
            with suppress(OSError):
                _sh("ip", "netns", "del", name)
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _set_up(self) -> None:
        for name in self._names if self.count == 2 else (*self._names, self._hub):
            _sh("ip", "netns", "add", name)
            _sh("ip", "-n", name, "link", "set", "lo", "up")
        if self.count == 2:
            one, two = self._names
            _sh(*f"ip link add {INTERFACE} netns {one} type veth peer name {INTERFACE} netns {two}".split())
        else:
            _sh(*f"ip -n {self._hub} link add bridge0 type bridge".split())
            _sh(*f"ip -n {self._hub} link set bridge0 up".split())
        for host, name in enumerate(self._names):
            if self.count != 2:
                port = f"port{host}"
                _sh(*f"ip link add {INTERFACE} netns {name} type veth peer {port} netns {self._hub}".split())
                _sh(*f"ip -n {self._hub} link set {port} master bridge0 up".split())
                self._limit(self._hub, port)
            _sh(*f"ip -n {name} address add {self.address(host)}/24 dev {INTERFACE}".split())
            _sh(*f"ip -n {name} link set {INTERFACE} up".split())
            self._limit(name, INTERFACE)

    def _limit(self, name: str, interface: str) -> None:
        limit = f"tbf rate {self.rate} burst {BURST} latency {LATENCY}"
        _sh(*f"tc -n {name} qdisc add dev {interface} root {limit}".split())

    def _kill(self, name: str) -> None:
        with suppress(OSError):
            for pid in _sh("ip", "netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def kill(self) -> None:
        """Kills whatever runs in the namespaces."""
        for name in self._names:
            self._kill(name)

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """What to run instead of `argv` to run it on a host, with the host's cores."""
        cores = ",".join(map(str, self._cores[host]))
        return ["ip", "netns", "exec", self._names[host], "taskset", "-c", cores, *argv]

    def address(self, host: int) -> str:
        """The host's IPv4 address on the link."""
        return f"10.77.0.{host + 1}"

    def interface(self, host: int) -> str:
        """The name of the host's end of the link."""
        return INTERFACE

    def bytes_out(self, host: int) -> int:
        """What has left the host by its link since it was made, in bytes, with headers."""
        shown = json.loads(_sh("ip", "-n", self._names[host], "-s", "-j", "link", "show", INTERFACE))
        return int(shown[0]["stats64"]["tx"]["bytes"])


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def torchrun(
    hosts: Hosts,
    ranks_per_host: int,
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    seconds: float = 300.0,
) -> str:
    """Runs `torchrun ... argv` with ranks on every host, and returns what the first host's printed.

    RuntimeError with what was written when a host's ranks fail, TimeoutError after `seconds`; either way
    nothing is left running on the hosts.
    """
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{kind}{h}") for h in range(hosts.count) for kind in ("out", "err")]
        try:
            for host in range(hosts.count):
                whole = [sys.executable, "-m", "torch.distributed.run"]
                whole += ["--nnodes", str(hosts.count), "--node-rank", str(host)]
                whole += ["--nproc-per-node", str(ranks_per_host)]
                whole += ["--master-addr", hosts.address(0), "--master-port", "29400", *argv]
                with open(paths[2 * host], "wb") as out, open(paths[2 * host + 1], "wb") as err:
                    started.append(
                        subprocess.Popen(
                            hosts.command(host, whole),
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=err,
                            env={"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})},
                        )
                    )
            late = _wait(started, seconds)
        finally:
            hosts.kill()
            for process in started:
                process.wait()
        said = [Path(path).read_text(errors="replace") for path in paths]
    if late or any(process.returncode for process in started):
        words = "\n".join(said[1::2])[-4000:]
        if late:
            raise TimeoutError(f"not over within {seconds:.0f} s:\n{words}")
        raise RuntimeError(f"exit status {[p.returncode for p in started]}:\n{words}")
    return said[0]


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Until all have ended or one has failed; True when `seconds` went by before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(codes):
            return False
        time.sleep(0.05)
    return True


_STREAM_S = 2.0


def _stream(peer: str, mine: str) -> None:
    """Sends to the peer and receives from it for a while; prints the Mbit/s received."""
    import threading

    server = socket.create_server((mine, 9400))
    out = socket.socket()
    while out.connect_ex((peer, 9400)) != 0:
        out.close()
        time.sleep(0.05)
        out = socket.socket()
    into, _ = server.accept()
    end = time.monotonic() + _STREAM_S

    def send() -> None:
        while time.monotonic() < end + 0.2:
            out.sendall(bytes(1 << 18))

    threading.Thread(target=send, daemon=True).start()
    got, began = 0, time.monotonic()
    while time.monotonic() < end:
        got += len(into.recv(1 << 20))
    print(got * 8e-6 / (time.monotonic() - began), flush=True)
    time.sleep(0.5)
    os._exit(0)


def stream_rates(hosts: Hosts) -> list[float]:
    """Mbit/s of payload that two hosts get from each other, both directions at once."""
    running = [
        subprocess.Popen(
            hosts.command(h, [sys.executable, __file__, "--stream", hosts.address(1 - h), hosts.address(h)]),
            stdout=subprocess.PIPE,
            text=True,
        )
        for h in (0, 1)
    ]
    return [float(process.communicate(timeout=30)[0]) for process in running]


def main() -> None:
    parser = argparse.ArgumentParser(description="Hosts on one machine, and what their link carries.")
    parser.add_argument("--rate", default="1gbit", help="of a link, as tc writes it")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--stream", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stream:
        _stream(*args.stream)
    if reason := why_not():
        sys.exit(reason)
    with Hosts(args.hosts, args.rate) as hosts:
        before = hosts.bytes_out(0)
        rates = stream_rates(hosts)
        counted = (hosts.bytes_out(0) - before) / 1e6
    print(f"{args.rate}: {rates[0]:.0f} and {rates[1]:.0f} Mbit/s of payload, both directions at once")
    print(f"host 0's counter moved by {counted:.1f} MB")


if __name__ == "__main__":
    main()
