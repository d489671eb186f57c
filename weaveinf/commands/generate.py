"""`weaveinf generate`: complete prompts, streaming a single one."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from weaveinf.cli import settings
from weaveinf.commands.report import steps, tell_trace, what_ran, write_json
from weaveinf.engine.request import RequestOutput, SamplingParams
from weaveinf.llm import LLM


def run(args: argparse.Namespace) -> None:
    # Of torchrun's ranks only the first has the standard input, and only it returns from LLM().
    prompts = _prompts(args) if os.environ.get("RANK", "0") == "0" else []
    params = sampling(args, n=args.n)
    with LLM(**settings(args)) as llm:
        if len(prompts) == 1 and args.n == 1 and args.json is None:
            shown = prompts[0]
            for _, text in llm.stream(prompts, params):
                print(shown + text, end="", flush=True)
                shown = ""
            print(shown)
        else:
            outputs = llm.generate(prompts, params)
            for prompt, output in zip(prompts, outputs, strict=True):
                if args.json != "-":
                    _show(prompt, output)
            trace = llm.engine.trace
            counts = {what: int(count) for what, count in trace.choices.items()}
            chose = {"selector": {"name": trace.selector, "budget": trace.budget} | counts}
            result = what_ran(llm) | steps(llm) | (chose if trace.selector else {})
            write_json(args.json, result | {"outputs": [_plain(output) for output in outputs]})
            for sample in (sample for output in outputs for sample in output.outputs):
                if sample.finish_reason == "abort":
                    raise RuntimeError(f"an answer was aborted: {sample.stop_reason}")
        print(llm.engine.trace.summary(), file=sys.stderr)
    tell_trace(llm)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.file is not None:
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("no prompt: give -p TEXT or -f FILE with one prompt a line")
    return prompts


def sampling(args: argparse.Namespace, n: int = 1) -> SamplingParams:
    """The sampling parameters among the arguments."""
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop")
    return SamplingParams(**{name: getattr(args, name) for name in names}, n=n)


def _show(prompt: str, output: RequestOutput) -> None:
    for sample in output.outputs:
        print(f"{prompt}{sample.text}\n[{sample.finish_reason}, {len(sample.token_ids)} tokens]\n")


def _plain(output: RequestOutput) -> dict[str, Any]:
    names = ("text", "token_ids", "finish_reason", "stop_reason", "pruned")
    samples = [{name: getattr(sample, name) for name in names} for sample in output.outputs]
    return {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids, "samples": samples}
