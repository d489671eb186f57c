"""`weaveinf bench`: random prompts, a warm-up, medians; every line beside the machine's limits."""

import argparse
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from tqdm import trange

from weaveinf.cli import settings
from weaveinf.commands import overlap, selectors, serve_load
from weaveinf.commands.report import Machine, Work, steps, tell_trace, what_ran, write_json
from weaveinf.engine.request import SamplingParams
from weaveinf.llm import LLM


def run(args: argparse.Namespace) -> None:
    kinds = {"latency": latency, "throughput": throughput, "serve": serve_load.run}
    kinds |= {"overlap": overlap.run, "selectors": selectors.run}
    kinds[args.bench](args)


class _Bench:
    """An engine under measurement, for requests of so many tokens, and what its machine can do."""

    def __init__(self, llm: LLM, tokens: int) -> None:
        limit = llm.engine.model_config.max_model_len
        if tokens > limit:  # a request cut short would make its figures false
            raise ValueError(f"prompt and output take {tokens} tokens, the model {limit}: lower one of them")
        dtype = llm.engine.executor.worker.dtype
        self.llm, self.machine = llm, Machine.measure(dtype)
        self.work = Work.of(llm.engine.model_config, dtype)
        self._rng = np.random.default_rng(0)
        self._before: dict[str, int] = {}

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random ones, fresh each time, so that none finds its beginning in the cache."""
        return self._rng.integers(0, self.llm.engine.model_config.vocab_size, (count, length)).tolist()

    def begin(self) -> None:
        """What comes now is measured."""
        self._before = steps(self.llm)

    def ran(self) -> dict[str, int]:
        """How steps went since."""
        return {name: count - self._before[name] for name, count in steps(self.llm).items()}

    def about(self) -> dict[str, Any]:
        """What a result says besides what was measured."""
        limits = {f"machine_{name}": value for name, value in asdict(self.machine).items()}
        return what_ran(self.llm) | self.ran() | limits

    def one_batch(self, args: argparse.Namespace) -> tuple[float, float]:
        """Seconds to the last of the first tokens, and of each step after that."""
        engine = self.llm.engine
        params = SamplingParams(temperature=0, max_tokens=1 + args.decode_tokens, ignore_eos=True)
        prompts = self.prompts(args.batch, args.prompt_tokens)
        began = time.perf_counter()
        waiting = {id_ for prompt in prompts for id_ in engine.add(prompt, params)}
        unfinished = set(waiting)
        first = 0.0
        while unfinished:
            for update in engine.step():
                waiting.discard(update.request.id)
                if update.finished:
                    unfinished.discard(update.request.id)
                    engine.take(update.request.id)
            if not waiting and not first:
                first = time.perf_counter()
        ended = time.perf_counter()
        return first - began, (ended - first) / args.decode_tokens


def latency(args: argparse.Namespace) -> None:
    """The time to the first token of a batch, and of a step after it."""
    _positive(args, "batch", "prompt_tokens", "decode_tokens", "repeats")
    wanted = {"max_num_seqs": max(args.batch, 8)} if args.max_num_seqs is None else {}
    with LLM(**settings(args) | wanted) as llm:
        bench = _Bench(llm, args.prompt_tokens + args.decode_tokens + 1)
        bench.one_batch(args)
        bench.begin()
        timed = [bench.one_batch(args) for _ in trange(args.repeats, desc="measuring")]
        prefill, decode = (median(times) for times in zip(*timed, strict=True))
        tokens = args.batch * args.prompt_tokens
        result = {
            "batch": args.batch,
            "prompt_tokens": args.prompt_tokens,
            "decode_tokens": args.decode_tokens,
            "prefill_ms": prefill * 1e3,
            "decode_ms": decode * 1e3,
            "prefill_tokens_per_s": tokens / prefill,
            "decode_tokens_per_s": args.batch / decode,
            "prefill_gflops": bench.work.gflop(tokens, args.batch) / prefill,
            "decode_gb_per_s": bench.work.gigabytes() / decode,
        } | bench.about()
    _tell(llm, args, _LATENCY, result)


def throughput(args: argparse.Namespace) -> None:
    """Requests and tokens a second."""
    _positive(args, "requests", "prompt_tokens", "output_tokens")
    with LLM(**settings(args)) as llm:
        bench = _Bench(llm, args.prompt_tokens + args.output_tokens)
        params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
        warm = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate(bench.prompts(2, args.prompt_tokens), warm, show_progress=False)
        bench.begin()
        prompts = bench.prompts(args.requests, args.prompt_tokens)
        began = time.perf_counter()
        llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        work, tokens = bench.work, args.requests * args.prompt_tokens
        out = args.requests * args.output_tokens
        result = {
            "requests": args.requests,
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "seconds": seconds,
            "requests_per_s": args.requests / seconds,
            "output_tokens_per_s": out / seconds,
            "total_tokens_per_s": (out + tokens) / seconds,
            "gflops": (work.gflop(tokens, args.requests) + work.gflop(out, out)) / seconds,
            "gb_per_s": work.gigabytes() * sum(bench.ran().values()) / seconds,
        } | bench.about()
    _tell(llm, args, _THROUGHPUT, result)


def _positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


def _tell(llm: LLM, args: argparse.Namespace, text: str, result: dict[str, Any]) -> None:
    tell_trace(llm)
    if args.json != "-":
        print((_HEAD + text + _STEPS).format(**result))
    write_json(args.json, result)


_HEAD = "{model}, {dtype}, {tp} ranks, seam: {seam}, kernels: {kernels}\n"
_STEPS = "steps: {steps_woven} woven, {steps_fused} fused, {steps_plain} plain"
_LATENCY = (
    "batch {batch}, {prompt_tokens} prompt tokens\n"
    "prefill {prefill_ms:9.2f} ms {prefill_tokens_per_s:9.1f} tokens/s"
    "  {prefill_gflops:6.1f} of {machine_gflops:.1f} GFLOP/s\n"
    "decode  {decode_ms:9.2f} ms {decode_tokens_per_s:9.1f} tokens/s"
    "  {decode_gb_per_s:6.1f} of {machine_gb_per_s:.1f} GB/s\n"
)
_THROUGHPUT = (
    "{requests} requests of {prompt_tokens} + {output_tokens} tokens in {seconds:.2f} s\n"
    "{requests_per_s:.2f} requests/s, {output_tokens_per_s:.1f} output tokens/s, "
    "{total_tokens_per_s:.1f} tokens/s in all\n"
    "{gflops:.1f} of {machine_gflops:.1f} GFLOP/s, {gb_per_s:.1f} of {machine_gb_per_s:.1f} GB/s\n"
)
