"""The `weaveinf` command: its surface, and how errors end it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from weaveinf import __version__

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The whole surface of the command line (a test freezes it)."""
    top = _Parser(prog="weaveinf", description="Tensor-parallel LLM inference.")
    top.add_argument("--version", action="version", version=f"weaveinf {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "the whole thing on this machine: two ranks on a small model")
    demo.add_argument("-p", "--prompt", help="text to continue instead of the demo's own")
    demo.add_argument("--tp", type=int, help="number of ranks (2)")

    generate = _command(commands, "generate", "complete prompts")
    _engine(generate)
    generate.add_argument("-p", "--prompt", action="append", default=[], help="may be repeated")
    generate.add_argument("-f", "--file", help="one prompt a line; - reads standard input")
    _sampling(generate)
    generate.add_argument("--n", type=int, default=1, help="samples of each prompt")
    _results(generate)

    chat = _command(commands, "chat", "talk to a model, in its own chat template")
    _engine(chat)
    chat.add_argument("--system", help="system message")
    _sampling(chat, max_tokens=512)

    serve = _command(commands, "serve", "an OpenAI-compatible HTTP server")
    _engine(serve, load_format=True)
    _server(serve)

    bench = _command(commands, "bench", "measure")
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="KIND")
    latency = _command(kinds, "latency", "one batch of random prompts, again and again")
    _engine(latency, load_format=True)
    latency.add_argument("--batch", type=int, default=1, help="prompts at a time (1)")
    latency.add_argument("--prompt-tokens", type=int, default=128, help="tokens of each (128)")
    latency.add_argument("--decode-tokens", type=int, default=32, help="steps after the first (32)")
    latency.add_argument("--repeats", type=int, default=5, help="of which the median counts (5)")
    _results(latency)
    throughput = _command(kinds, "throughput", "many requests, all there from the beginning")
    _engine(throughput, load_format=True)
    throughput.add_argument("--requests", type=int, default=64, help="number of requests (64)")
    throughput.add_argument("--prompt-tokens", type=int, default=128, help="tokens of each (128)")
    throughput.add_argument("--output-tokens", type=int, default=128, help="tokens of each (128)")
    _results(throughput)

    load = _command(kinds, "serve", "clients of a running OpenAI-compatible server, ours or another")
    add = load.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server (http://127.0.0.1:8000)")
    add("--model", help="what the server calls it (the first it names)")
    add("--clients", type=int, nargs="+", default=[1, 8, 32, 128], help="at a time (1 8 32 128)")
    add("--requests", type=int, help="of all clients together (twice the clients, at least 16)")
    add("--prompt-tokens", type=int, default=128, help="random ones of each request (128)")
    add("--output-tokens", type=int, default=64, help="of each answer (64)")
    add("--vocab-size", type=int, default=32000, help="prompts hold ids below it (32000)")
    add("--api-key-file", metavar="FILE", help="its first word is the key (none)")
    _json(load)

    overlap = _command(kinds, "overlap", "what weaving hides, beside the same steps whole")
    _engine(overlap, load_format=True)
    add = overlap.add_argument
    add("--tokens", type=int, nargs="+", default=[512], help="of the prompts (512)")
    add("--decode", type=int, nargs="+", default=[], help="also steps of so many decode rows")
    add("--pairs", type=int, default=15, help="rounds, of which medians count (15)")
    _results(overlap)

    chosen = _command(
        kinds, "selectors", "a layer's decode attention over long contexts, chosen beside dense"
    )
    add = chosen.add_argument
    methods = ["tokenselect", "fasa", "quest", "hisa"]
    add("--methods", nargs="+", choices=methods, default=methods, help="(all)")
    add("--tokens", type=int, nargs="+", default=[32768, 131072], help="cached (32768 131072)")
    add("--batch", type=int, default=1, help="sequences (1)")
    add("--heads", type=int, default=16, help="query heads (16)")
    add("--kv-heads", type=int, default=8, help="KV heads (8)")
    add("--head-dim", type=int, default=128, help="of each (128)")
    add("--turns", type=int, default=15, help="of which the median counts (15)")
    _json(chosen)

    plan = _command(commands, "plan", "predict what weaving gains on GPUs that need not be here")
    plan.add_argument("model", metavar="MODEL", help="a directory with a config.json")
    plan.add_argument("--tp", type=int, default=8, help="number of ranks (8)")
    plan.add_argument("--gpu", default="h100", help="h100, h200, ... (h100)")
    plan.add_argument("--tokens", type=int, nargs="+", default=[4096], help="of a prompt (4096)")
    _json(plan)

    calibrate = _command(commands, "calibrate", "rank a model's rotary planes for --selector fasa")
    _model(calibrate)
    add = calibrate.add_argument
    add("--text", required=True, metavar="FILE", help="that the model reads for it")
    add("--out", required=True, metavar="FILE", help="the table, for --selector fasa:table=FILE")
    add("--tokens", type=int, default=4096, help="of the text, at most (4096)")

    doctor = _command(commands, "doctor", "what this machine has, what will be used, and why")
    doctor.add_argument("--tp", type=int, default=2, help="for that many ranks (2)")
    _json(doctor)
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; never returns. Exit code 2: wrong input, 1: it failed, 130: interrupted."""
    args = parser().parse_args(argv)
    try:
        for file in (getattr(args, name, None) for name in ("json", "trace")):
            if file not in (None, "-"):
                Path(file).touch()  # better to hear now that it cannot be written than after the work
        import_module(f"weaveinf.commands.{args.command}").run(args)
    except BrokenPipeError:
        # Whoever read our output has had enough; what is still buffered must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILURE)
    except (RuntimeError, TimeoutError) as error:
        _end(error, FAILURE)
    except (ValueError, OSError) as error:
        _end(error, USAGE_ERROR)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings among the arguments."""
    from weaveinf.config import EngineConfig  # not for --help, which shall be instant

    names = {"tp": "tensor_parallel_size"}
    chosen = {names.get(name, name): value for name, value in vars(args).items()}
    # Under torchrun the ranks are there already.
    if chosen["tensor_parallel_size"] is None:
        chosen["tensor_parallel_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    return {one.name: chosen[one.name] for one in fields(EngineConfig) if chosen.get(one.name) is not None}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> Any:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a directory in the Hugging Face layout, or a hub id")


def _engine(command: argparse.ArgumentParser, load_format: bool = False) -> None:
    _model(command)
    add = command.add_argument
    add("--tp", type=int, help="number of ranks (1; under torchrun all of its)")
    add("--executor", help="what starts the ranks: local, or ray for actors in its cluster (local)")
    add("--placement", help="of Ray's actors: pack on few nodes, or spread over many (pack)")
    add("--device", help="auto, cpu or cuda (auto)")
    add("--dtype", help="auto, float32, bfloat16 or float16 (auto: the checkpoint's)")
    add("--weave", help="auto, off or on (auto)")
    add("--selector", help="which tokens long contexts read: NAME, or NAME:setting=value,... (none: all)")
    add("--index-keys", help="of a model's own indexer: exact or fp8 (exact)")
    add("--max-model-len", type=int, help="tokens of prompt and output together (the model's)")
    add("--seed", type=int, help="of requests without one (0)")
    add("--revision", help="of a hub repository")
    add("--kv-cache-gib", type=float, help="GiB of KV cache on each rank, taken at once (by free memory)")
    add("--max-num-seqs", type=int, help="requests running at a time (128)")
    add("--max-num-batched-tokens", type=int, help="tokens of a step (2048)")
    if load_format:
        add("--load-format", help="auto, or dummy for random weights (auto)")


def _sampling(command: argparse.ArgumentParser, max_tokens: int = 128) -> None:
    add = command.add_argument
    add("--max-tokens", type=int, default=max_tokens, help=f"of an answer ({max_tokens})")
    add("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (1: off)")
    add("--top-k", type=int, default=0, help="best tokens only (0: off)")
    add("--min-p", type=float, default=0.0, help="floor relative to the best token (0: off)")
    add("--stop", action="append", help="string that ends an answer; may be repeated")


def _server(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--host", help="address to listen on (127.0.0.1)")
    add("--port", type=int, help="0 takes a free one (8000)")
    add("--served-model-name", metavar="NAME", help="what clients call the model (MODEL)")
    add("--api-key-file", metavar="FILE", help="one key a line; without it no key is asked for")
    add("--max-waiting", type=int, help="requests that may wait; one more gets a 429 (1024)")
    add("--max-output-tokens", type=int, help="of one answer (the context's rest)")
    add("--max-body-bytes", type=int, help="of a request (4 MiB)")
    add("--timeout-s", type=float, help="a request that takes longer is ended (600)")
    add("--drain-s", type=float, help="after SIGTERM, what runs may take so long to end (60)")
    add("--max-restarts", type=int, help="of ranks that died, before the server gives up (5)")
    add("--log-prompts", action="store_true", help="let the log show prompts' token ids")
    add("--otlp-endpoint", metavar="URL", help="send a span of each request there (no tracing)")


def _results(command: argparse.ArgumentParser) -> None:
    command.add_argument("--trace", metavar="FILE", help="write what ran there, as a Chrome trace and a PNG")
    _json(command)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", metavar="FILE", help="write the result there as JSON")


def _end(error: Exception, code: int) -> None:
    print(f"weaveinf: error: {error}", file=sys.stderr)
    sys.exit(code)
