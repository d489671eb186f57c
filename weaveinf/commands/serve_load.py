"""`weaveinf bench serve`: clients of any OpenAI-compatible server, each with one stream at a time."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit
from urllib.request import Request, urlopen

import numpy as np

from weaveinf.commands.report import write_json

LIMIT_S = 600.0
"""For one answer."""
FIRST_ORDINARY_ID = 3
"""Below: unknown, begin and end of text, in most vocabularies."""


class Answer(NamedTuple):
    """Tokens as the server counts them, and seconds."""

    prompt_tokens: int
    output_tokens: int
    ttft: float
    e2e: float
    itl: list[float]
    """Between two arrivals: a server may send several tokens at once."""
    tpot: list[float]
    """The mean of a token, but the first; nothing where there is no other."""


def run(args: argparse.Namespace) -> None:
    """ValueError where the server cannot be asked at all; RuntimeError where it answers nothing."""
    if min(*args.clients, args.requests or 1, args.prompt_tokens, args.output_tokens) < 1:
        raise ValueError("--clients, --requests, --prompt-tokens and --output-tokens must be at least 1")
    key = Path(args.api_key_file).read_text().split()[0] if args.api_key_file else "none"
    url = urlsplit(args.url.rstrip("/"))
    if url.scheme not in ("http", "https") or url.hostname is None:
        raise ValueError(f"--url {args.url} is not like http://127.0.0.1:8000")
    models = Request(f"{url.geturl()}/v1/models", headers={"Authorization": f"Bearer {key}"})
    model = args.model or json.load(urlopen(models, timeout=30))["data"][0]["id"]
    results = []
    for clients in args.clients:
        posts = _posts(args, url, key, model, args.requests or max(16, 2 * clients))
        results.append(asyncio.run(_measure(url, clients, posts)))
        if args.json != "-":
            print(_text(results[-1]), flush=True)
    lengths = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
    write_json(args.json, {"url": args.url, "model": model, **lengths, "runs": results})


def _posts(args: argparse.Namespace, url: SplitResult, key: str, model: str, count: int) -> list[bytes]:
    """HTTP requests whose prompts are fresh, so that none finds its beginning in a cache; the first is not
    timed."""
    posts = []
    size = (count + 1, args.prompt_tokens)
    for prompt in np.random.default_rng().integers(FIRST_ORDINARY_ID, args.vocab_size, size).tolist():
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": args.output_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True}
        said = json.dumps(body | {"stream_options": {"include_usage": True}}, separators=(",", ":"))
        posts.append(
            f"POST {url.path}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(said)}\r\n\r\n{said}".encode()
        )
    return posts


async def _measure(url: SplitResult, clients: int, posts: list[bytes]) -> dict[str, Any]:
    answers: list[Answer] = []
    errors: list[str] = []
    await _client(url, iter(posts[:1]), answers, errors)
    answers.clear()
    began, used = time.perf_counter(), time.process_time()
    left = iter(posts[1:])
    await asyncio.gather(*(_client(url, left, answers, errors) for _ in range(clients)))
    seconds, used = time.perf_counter() - began, time.process_time() - used
    if not answers:
        raise RuntimeError(f"{url.geturl()} answered nothing: {errors[0]}")
    output = sum(answer.output_tokens for answer in answers)
    total = output + sum(answer.prompt_tokens for answer in answers)
    result: dict[str, Any] = {"clients": clients, "requests": len(answers), "seconds": seconds}
    result |= {"requests_per_s": len(answers) / seconds, "output_tokens_per_s": output / seconds}
    result |= {"total_tokens_per_s": total / seconds, "errors": len(errors), "first_errors": errors[:3]}
    for name in ("ttft", "itl", "tpot", "e2e"):
        if (values := 1e3 * np.hstack([getattr(answer, name) for answer in answers])).size:
            figures = [values.mean(), *np.percentile(values, (50, 90, 99))]
            result[f"{name}_ms"] = dict(zip(("mean", "p50", "p90", "p99"), map(float, figures), strict=True))
    return result | {"client_cpu_s": used, "client_cpu_share": used / seconds}


class _Link(asyncio.Protocol):
    """A connection that notes when events come, and no more: what the client computes meanwhile, the server
    lacks where they share cores."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._body = bytearray()
        self._times: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._over.set()

    def data_received(self, data: bytes) -> None:
        if b'"text":' in data:
            self._times.append(time.perf_counter())
        self._body += data
        if self._body.endswith(b"\r\n0\r\n\r\n") or (not self._times and self._refused()):
            self._over.set()

    def _refused(self) -> bool:
        """Whether another answer than a stream is here, whole."""
        head, end, body = self._body.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head.lower())
        return bool(end) and not _streams(head) and (length is None or len(body) >= int(length[1]))

    async def ask(self, post: bytes) -> Answer:
        """ValueError for any other answer than a stream with its usage, EOFError for one that is cut off."""
        self._over.clear()
        self._body.clear()
        self._times = []
        began = time.perf_counter()
        self.transport.write(post)
        await self._over.wait()
        ended, times = time.perf_counter(), self._times
        head, end, body = bytes(self._body).partition(b"\r\n\r\n")
        if end and not _streams(head):
            raise ValueError((head.partition(b"\r\n")[0] + b": " + body[:300]).decode(errors="replace"))
        if not body.endswith(b"\r\n0\r\n\r\n"):
            raise EOFError("the connection ended before the stream did")
        whole = _whole(body)
        last = json.loads(whole[whole.rindex(b"data: {") + 6 :].split(b"\n")[0])
        if not (usage := last.get("usage")) or not times:
            raise ValueError(f"the stream ended with {last!s:.300}")
        tokens = usage["completion_tokens"]
        itl = [after - before for before, after in pairwise(times)]
        tpot = [(times[-1] - times[0]) / (tokens - 1)] if tokens > 1 else []
        return Answer(usage["prompt_tokens"], tokens, times[0] - began, ended - began, itl, tpot)


def _streams(head: bytes | bytearray) -> bool:
    return b" 200 " in head[:16] and b"chunked" in head.lower()


def _whole(chunks: bytes) -> bytes:
    """A body without the sizes of its chunks."""
    parts, at = [], 0
    while size := int(chunks[at : (end := chunks.index(b"\r\n", at))], 16):
        parts.append(chunks[end + 2 : end + 2 + size])
        at = end + size + 4
    return b"".join(parts)


async def _client(url: SplitResult, posts: Iterator[bytes], answers: list[Answer], errors: list[str]) -> None:
    """Sends what is left to send, one after the other, over one connection while it lasts."""
    secure = url.scheme == "https"
    host, port = str(url.hostname), url.port or (443 if secure else 80)
    loop, link = asyncio.get_running_loop(), None
    for post in posts:
        try:
            async with asyncio.timeout(LIMIT_S):
                if link is None or link.transport.is_closing():
                    _, link = await loop.create_connection(_Link, host, port, ssl=secure or None)
                answers.append(await link.ask(post))
        except (OSError, EOFError, ValueError, KeyError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            if link is not None:
                link.transport.close()
    if link is not None:
        link.transport.close()


def _text(result: dict[str, Any]) -> str:
    head = (
        "{clients} clients, {requests} answers in {seconds:.2f} s: {total_tokens_per_s:.1f} tokens/s in all, "
        "{output_tokens_per_s:.1f} output tokens/s, {requests_per_s:.2f} requests/s, {errors} errors; "
        "client's processor time {client_cpu_s:.2f} s ({client_cpu_share:.1%} of a core)"
    ).format(**result)
    lines = [
        f"  {name:4} ms: mean {{mean:9.2f}}  p50 {{p50:9.2f}}  p90 {{p90:9.2f}}  p99 {{p99:9.2f}}".format(
            **result[f"{name}_ms"]
        )
        for name in ("ttft", "itl", "tpot", "e2e")
        if f"{name}_ms" in result
    ]
    return "\n".join([head, *lines, *(f"  error: {error:.200}" for error in result["first_errors"])])
