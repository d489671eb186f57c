"""`weaveinf bench`: random prompts, a warm-up, medians; every line beside the machine's limits."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
from tqdm import trange

from weaveinf.cli import settings
from weaveinf.commands import overlap, selectors
from weaveinf.commands.report import Machine, Work, steps, tell_trace, what_ran, write_json
from weaveinf.engine.request import SamplingParams
from weaveinf.llm import LLM


def run(args: argparse.Namespace) -> None:
    kinds = {"latency": latency, "throughput": throughput, "overlap": overlap.run, "selectors": selectors.run}
    kinds[args.bench](args)


def latency(args: argparse.Namespace) -> None:
    """The time to the first token of a batch, and of a step after it."""
    _positive(args, "batch", "prompt_tokens", "decode_tokens", "repeats")
    wanted = {"max_num_seqs": max(args.batch, 8)} if args.max_num_seqs is None else {}
    with LLM(**settings(args) | wanted) as llm:
        _check_length(llm, args.prompt_tokens + args.decode_tokens + 1)
        machine = Machine.measure(llm.engine.executor.worker.dtype)
        rng = np.random.default_rng(0)
        _one_batch(llm, args, rng)
        before = steps(llm)
        timed = [_one_batch(llm, args, rng) for _ in trange(args.repeats, desc="measuring")]
        prefill, decode = (median(times) for times in zip(*timed, strict=True))
        ran = {name: count - before[name] for name, count in steps(llm).items()}
        work = Work.of(llm.engine.model_config, llm.engine.executor.worker.dtype)
        result = {
            **what_ran(llm),
            "batch": args.batch,
            "prompt_tokens": args.prompt_tokens,
            "decode_tokens": args.decode_tokens,
            "prefill_ms": prefill * 1e3,
            "decode_ms": decode * 1e3,
            **ran,
            "prefill_tokens_per_s": args.batch * args.prompt_tokens / prefill,
            "decode_tokens_per_s": args.batch / decode,
            "prefill_gflops": work.gflop(args.batch * args.prompt_tokens, args.batch) / prefill,
            "decode_gb_per_s": work.gigabytes() / decode,
            "machine_gflops": machine.gflops,
            "machine_gb_per_s": machine.gb_per_s,
        }
    tell_trace(llm)
    if args.json != "-":
        print(_latency_text(result))
    write_json(args.json, result)


def _one_batch(llm: LLM, args: argparse.Namespace, rng: np.random.Generator) -> tuple[float, float]:
    """Seconds to the last of the first tokens, and of each step after that."""
    params = SamplingParams(temperature=0, max_tokens=1 + args.decode_tokens, ignore_eos=True)
    prompts = _random_prompts(llm, args.batch, args.prompt_tokens, rng)
    began = time.perf_counter()
    waiting = {id_ for prompt in prompts for id_ in llm.engine.add(prompt, params)}
    unfinished = set(waiting)
    first = 0.0
    while unfinished:
        for update in llm.engine.step():
            waiting.discard(update.request.id)
            if update.finished:
                unfinished.discard(update.request.id)
                llm.engine.take(update.request.id)
        if not waiting and not first:
            first = time.perf_counter()
    ended = time.perf_counter()
    return first - began, (ended - first) / args.decode_tokens


def throughput(args: argparse.Namespace) -> None:
    """Requests and tokens a second."""
    _positive(args, "requests", "prompt_tokens", "output_tokens")
    with LLM(**settings(args)) as llm:
        _check_length(llm, args.prompt_tokens + args.output_tokens)
        machine = Machine.measure(llm.engine.executor.worker.dtype)
        rng = np.random.default_rng(0)
        params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
        warm = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.generate(_random_prompts(llm, 2, args.prompt_tokens, rng), warm, show_progress=False)
        before = steps(llm)
        prompts = _random_prompts(llm, args.requests, args.prompt_tokens, rng)
        began = time.perf_counter()
        llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        ran = {name: count - before[name] for name, count in steps(llm).items()}
        work = Work.of(llm.engine.model_config, llm.engine.executor.worker.dtype)
        out = args.requests * args.output_tokens
        gflop = work.gflop(args.requests * args.prompt_tokens, args.requests) + work.gflop(out, out)
        result = {
            **what_ran(llm),
            "requests": args.requests,
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "seconds": seconds,
            "requests_per_s": args.requests / seconds,
            "output_tokens_per_s": out / seconds,
            "total_tokens_per_s": (out + args.requests * args.prompt_tokens) / seconds,
            **ran,
            "gflops": gflop / seconds,
            "gb_per_s": work.gigabytes() * sum(ran.values()) / seconds,
            "machine_gflops": machine.gflops,
            "machine_gb_per_s": machine.gb_per_s,
        }
    tell_trace(llm)
    if args.json != "-":
        print(_throughput_text(result))
    write_json(args.json, result)


def _random_prompts(llm: LLM, count: int, length: int, rng: np.random.Generator) -> list[list[int]]:
    """Fresh ones each time, so that none finds its beginning in the cache."""
    vocab_size = llm.engine.model_config.vocab_size
    return rng.integers(0, vocab_size, (count, length)).tolist()


def _check_length(llm: LLM, tokens: int) -> None:
    """A request cut short would make its figures false."""
    limit = llm.engine.model_config.max_model_len
    if tokens > limit:
        raise ValueError(f"prompt and output take {tokens} tokens, the model {limit}: lower one of them")


def _positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


def _latency_text(result: dict[str, Any]) -> str:
    return (
        "{model}, {dtype}, {tp} ranks, seam: {seam}, kernels: {kernels}\n"
        "batch {batch}, {prompt_tokens} prompt tokens\n"
        "prefill {prefill_ms:9.2f} ms {prefill_tokens_per_s:9.1f} tokens/s"
        "  {prefill_gflops:6.1f} of {machine_gflops:.1f} GFLOP/s\n"
        "decode  {decode_ms:9.2f} ms {decode_tokens_per_s:9.1f} tokens/s"
        "  {decode_gb_per_s:6.1f} of {machine_gb_per_s:.1f} GB/s\n"
        "steps: {steps_woven} woven, {steps_fused} fused, {steps_plain} plain"
    ).format(**result)


def _throughput_text(result: dict[str, Any]) -> str:
    return (
        "{model}, {dtype}, {tp} ranks, seam: {seam}, kernels: {kernels}\n"
        "{requests} requests of {prompt_tokens} + {output_tokens} tokens in {seconds:.2f} s\n"
        "{requests_per_s:.2f} requests/s, {output_tokens_per_s:.1f} output tokens/s, "
        "{total_tokens_per_s:.1f} tokens/s in all\n"
        "{gflops:.1f} of {machine_gflops:.1f} GFLOP/s, {gb_per_s:.1f} of {machine_gb_per_s:.1f} GB/s\n"
        "steps: {steps_woven} woven, {steps_fused} fused, {steps_plain} plain"
    ).format(**result)
