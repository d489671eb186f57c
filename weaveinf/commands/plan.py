"""`weaveinf plan`: what weaving would gain for a model on GPUs that are not here."""

import argparse
from typing import Any

from weaveinf.commands.report import write_json
from weaveinf.models.config import ModelConfig
from weaveinf.weave.plan import Half, Plan, Planner, Span, play, split
from weaveinf.weave.waves import GPUS, GpuCosts

WIDTH = 96
"""Of the timeline, in characters."""


def run(args: argparse.Namespace) -> None:
    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu} is not known: it may be {', '.join(GPUS)}")
    if args.tp < 1 or min(args.tokens) < 1:
        raise ValueError(f"{'--tp' if args.tp < 1 else '--tokens'} must be at least 1")
    if args.tp == 1:
        raise ValueError("--tp 1: one rank has nothing to weave; use more")
    config = ModelConfig.from_path(args.model)
    config.check_ranks(args.tp)
    costs = GpuCosts(config, args.tp, GPUS[args.gpu])
    planner = Planner(costs)
    # Prompts from their first token on: row i reads i tokens.
    plans = {tokens: planner.plan(tokens, tokens**2 / 2, tokens**2 / 8) for tokens in args.tokens}
    rows = [_row(args, costs, tokens, plan) for tokens, plan in plans.items()]
    if args.json != "-":
        print(f"Predicted, not measured: {args.model} on {args.tp} x {args.gpu}, one prompt in one step\n")
        print(_table(rows))
        if len(plans) == 1:
            print(_timeline(costs, args.tokens[0], plans[args.tokens[0]]))
    write_json(args.json, rows[0] if len(rows) == 1 else {"plans": rows})


def _row(args: argparse.Namespace, costs: GpuCosts, tokens: int, plan: Plan) -> dict[str, Any]:
    plain, no_comm = costs.plain(tokens)
    return {
        "model": args.model,
        "gpu": args.gpu,
        "tp": args.tp,
        "tokens": tokens,
        "plain_ms": round(plain, 3),
        "no_comm_ms": round(no_comm, 3),
        "fused_ms": round(plan.whole_ms, 3),
        "woven_ms": round(plan.woven_ms, 3),
        "cut": plan.cut,
        "seam_ctas_attention": plan.seam_ctas[0],
        "seam_ctas_mlp": plan.seam_ctas[1],
        "why": plan.why,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "plain: all-reduce, then norm; no comm: the norm alone; fused: both in one seam, nothing beside it;",
        "gain: plain / woven; CTAs: of the seams under attention and under the MLP.\n",
        "  tokens   plain ms  no comm ms   fused ms   woven ms   gain      cut   CTAs",
    ]
    for r in rows:
        how = f"{r['cut']:8} {r['seam_ctas_attention']:4}/{r['seam_ctas_mlp']}"
        lines.append(
            f"{r['tokens']:8} {r['plain_ms']:10.1f} {r['no_comm_ms']:11.1f} {r['fused_ms']:10.1f} "
            f"{r['woven_ms']:10.1f} {r['plain_ms'] / r['woven_ms']:6.2f} "
            + (how if r["cut"] else f"  runs whole: {r['why']}")
        )
    return "\n".join(lines)


def _timeline(costs: GpuCosts, tokens: int, plan: Plan) -> str:
    """A layer from the middle of the step: blocks above, the seams that run meanwhile below."""
    context = tokens / 2
    halves = split(tokens, context, 0.25, plan.cut) if plan.cut else [Half(tokens, context)]
    spans = play(costs, halves, plan.seam_ctas, 3)
    first, last = [span.start for span in spans if span.what == "attention" and span.half == 0][1:]
    rows = {"blocks": [" "] * WIDTH, "seams": [" "] * WIDTH}
    for span in spans:
        if span.start < last and span.end > first:
            name = f"{'AB'[span.half]} {span.what}" if plan.cut else span.what
            _draw(rows["seams" if span.what == "seam" else "blocks"], span, name, first, last)
    names = [f"\nOne layer, {last - first:.2f} ms" + ("; A and B are the halves" if plan.cut else "")]
    return "\n".join(names + [f"{name:7}{''.join(cells).rstrip()}" for name, cells in rows.items()])


def _draw(cells: list[str], span: Span, name: str, first: float, last: float) -> None:
    start, end = (round((time - first) / (last - first) * WIDTH) for time in (span.start, span.end))
    inside = max(end - start - 2, 0)
    box = f"[{f' {name} '.center(inside, '-')[:inside]}]"
    for i in range(max(start, 0), min(start + len(box), WIDTH)):
        cells[i] = box[i - start]
