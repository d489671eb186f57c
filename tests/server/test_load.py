"""`weaveinf bench serve` counts what servers say they did, and says what failed."""

from __future__ import annotations

import json
import socketserver
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import Server
from weaveinf.cli import parser
from weaveinf.commands import bench

VOCABULARY = "500"  # the demo's has more


def load(file: Path, url: str, *options: str) -> dict[str, Any]:
    """What it writes."""
    given = ["bench", "serve", "--url", url, "--vocab-size", VOCABULARY, "--prompt-tokens", "9"]
    bench.run(parser().parse_args([*given, "--output-tokens", "5", *options, "--json", str(file)]))
    return json.loads(file.read_text())


def test_counts_what_the_server_counts(server: Server, tmp_path: Path) -> None:
    names = ("weaveinf_prompt_tokens_total", "weaveinf_generation_tokens_total")
    before = [server.metric(name) for name in names]
    found = load(tmp_path / "out", server.url, "--clients", "1", "4", "--requests", "10")
    assert found["model"] == "demo"
    # Of each number of clients, one request goes first, untimed.
    assert [server.metric(name) - old for name, old in zip(names, before, strict=True)] == [
        2 * 11 * 9,
        2 * 11 * 5,
    ]
    for run, clients in zip(found["runs"], (1, 4), strict=True):
        assert (run["clients"], run["requests"], run["errors"]) == (clients, 10, 0)
        assert run["output_tokens_per_s"] * run["seconds"] == pytest.approx(10 * 5)
        assert run["total_tokens_per_s"] * run["seconds"] == pytest.approx(10 * 14)
        assert run["ttft_ms"]["p50"] + 4 * run["tpot_ms"]["p50"] == pytest.approx(
            run["e2e_ms"]["p50"], rel=0.5
        )
        assert 0 < run["itl_ms"]["p50"] <= run["itl_ms"]["p99"] <= run["e2e_ms"]["p99"]
        assert 0 < run["client_cpu_s"] < run["seconds"]


def test_a_server_that_refuses_all_ends_it(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"answered nothing: .* 400 Bad Request.*token id \d+"):
        load(tmp_path / "out", server.url, "--vocab-size", "9999999", "--clients", "2", "--requests", "3")
    with pytest.raises(ValueError, match="must be at least 1"):
        load(tmp_path / "out", server.url, "--clients", "0")


class _Merging(socketserver.StreamRequestHandler):
    """Sends all five tokens in two events; cuts every third stream off."""

    served = 0

    def handle(self) -> None:
        while (head := self._head()) is not None:
            self.rfile.read(int(head.lower().split(b"content-length: ")[1].split()[0]))
            type(self).served += 1
            cut = type(self).served % 3 == 0
            events = [{"choices": [{"text": text}]} for text in ("a b", "c d e")]
            usage = {"prompt_tokens": 9, "completion_tokens": 5}
            events += [{"choices": [], "usage": usage}]
            said = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [
                b"data: [DONE]\n\n"
            ]
            chunks = [b"%x\r\n%b\r\n" % (len(one), one) for one in said]
            start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.wfile.write(start + b"".join(chunks[:1] if cut else [*chunks, b"0\r\n\r\n"]))
            if cut:
                return

    def _head(self) -> bytes | None:
        lines = b""
        while line := self.rfile.readline():
            lines += line
            if line == b"\r\n":
                return lines
        return None


def test_tokens_are_the_servers_and_a_cut_stream_is_an_error(tmp_path: Path) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Merging) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_address[1]}"
        run = load(tmp_path / "out", url, "--model", "any", "--clients", "1", "--requests", "8")["runs"][0]
        other.shutdown()
    # The first of nine is not timed; the third, sixth and ninth are cut off.
    assert (run["requests"], run["errors"]) == (5, 3)
    assert run["output_tokens_per_s"] * run["seconds"] == pytest.approx(5 * 5)
    assert run["first_errors"][0].startswith("EOFError: the connection ended")
