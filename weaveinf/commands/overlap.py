"""`weaveinf bench overlap`: what weaving hides, beside the same step whole and without its parts.

Every rank runs this itself (under torchrun, which it starts when it was not): all take the same steps, in
turns, so that a slow minute of the machine touches all variants alike.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cli import settings
from weaveinf.cluster.launch import torchrun_s_store
from weaveinf.cluster.rank import LOADING_S
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam
from weaveinf.comm.waits import wait_for
from weaveinf.commands.report import in_turns, write_json
from weaveinf.config import EngineConfig
from weaveinf.engine.worker import Worker
from weaveinf.models.layers import Block
from weaveinf.weave import timeline
from weaveinf.weave.plan import Plan, unplanned
from weaveinf.weave.run import run as run_chain
from weaveinf.weave.timeline import Recorder
from weaveinf.weave.weaver import nothing

Links = list[tuple[Block, Joint]]


def run(args: argparse.Namespace) -> None:
    if "RANK" not in os.environ:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        os.execv(sys.executable, [*start, str(args.tp or 2), "-m", "weaveinf", *sys.argv[1:]])
    if min(*args.tokens, *args.decode, 2) < 2 or args.pairs < 1:
        raise ValueError("--tokens and --decode must be at least 2, --pairs at least 1")
    store, rank, size = torchrun_s_store()
    chosen = settings(args) | {"tensor_parallel_size": size}
    trace = chosen.pop("trace", None)  # of one step at the end, not of all that are timed
    chosen.setdefault("max_num_batched_tokens", max(2048, *args.tokens, *args.decode))
    config = EngineConfig(**chosen)
    ranks = Ranks.join(rank, size, store, config.torch_device, LOADING_S)
    try:
        bench = Overlap(Worker(config, ranks))
        gc.freeze()  # as ranks do that follow
        cells = [bench.cell(tokens, args.pairs) for tokens in args.tokens]
        decode = [bench.decode(rows, args.tokens[0], args.pairs) for rows in args.decode]
        spans = timeline.collect(bench.recorded(args.tokens[-1]), ranks) if trace else {}
        if rank == 0:
            if trace:
                print(timeline.write(Path(trace), spans))
            for text, some in ((_TEXT, cells), (_DECODE_TEXT, decode)):
                for cell in some:
                    print(text.format(**cell))
            about = {"model": config.model, "tp": size, "seam": bench.weaver.seam.name, "pairs": args.pairs}
            about |= {"decode": decode} if decode else {}
            write_json(args.json, about | (cells[0] if len(cells) == 1 else {"cells": cells}))
        bench.meet()  # nobody leaves while others need the store
    finally:
        ranks.close()


_TEXT = (
    "{tokens} tokens: plain {plain_ms:.1f} ms (whole {whole_ms:.1f}, by all-reduces {all_reduce_ms:.1f}), "
    "woven {woven_ms:.1f}: {gain:.2f}x (cut at {cut}: {why}; predicted {predicted_ms:.1f}); "
    "no communication {no_comm_ms:.1f}, only communication {comm_only_ms:.1f} "
    "(all-reduces {all_reduce_only_ms:.1f}); {hidden_share:.0%} of what can be is hidden"
)

_DECODE_TEXT = (
    "{rows} decode rows: whole {plain_ms:.1f} ms, woven {woven_ms:.1f}: {gain:.2f}x; "
    "the planner says {predicted_gain:.2f}x: {why}"
)


class Overlap:
    """The variants of a step, on one rank."""

    def __init__(self, worker: Worker) -> None:
        self.weaver = worker.weaver
        self.weaver.repeated = None  # or what is replayed would stand beside what is not
        self._ranks = worker.ranks
        self._chain = worker.model.chain
        hidden, most = worker.model_config.hidden_size, worker.config.max_num_batched_tokens
        self._alone = LocalSeam(most, hidden, worker.dtype, worker.ranks.device)
        self._reduced = AllReduceSeam(worker.ranks, most, hidden, worker.dtype)
        self._links: Links = [(nothing, joint) for _, joint in self._chain]

    @torch.inference_mode()
    def cell(self, tokens: int, pairs: int) -> dict[str, Any]:
        """Medians over `pairs` rounds of all variants of a prompt of `tokens` tokens."""
        weaver, batch = self.weaver, self.weaver.rehearsal(tokens, 0)
        plan = self._plan(tokens, *_work(tokens))
        variants: dict[str, Callable[[], Tensor]] = {
            "whole": lambda: weaver.run(batch, 0),
            "woven": lambda: weaver.run(batch, plan.cut, plan.seam_ctas),
            "reduced": lambda: self._run(self._chain, batch, self._reduced),
            "no_comm": lambda: self._run(self._chain, batch, self._alone),
            "comm_only": lambda: self._run(self._links, batch, weaver.seam),
            "reduce_only": lambda: self._run(self._links, batch, self._reduced),
        }
        before = _sent()
        ms = self._times(variants, pairs)
        sent = (_sent() - before) / ((pairs + 1) * self._bytes(tokens))
        plain = min(ms["whole"], ms["reduced"])
        hideable = min(plain - ms["no_comm"], plain - max(ms["no_comm"], ms["comm_only"]))
        return {
            "tokens": tokens,
            "plain_ms": plain,
            "woven_ms": ms["woven"],
            "no_comm_ms": ms["no_comm"],
            "comm_only_ms": ms["comm_only"],
            "hidden_share": (plain - ms["woven"]) / hideable if hideable > 0 else 0.0,
            "gain": plain / ms["woven"],
            "cut": plan.cut,
            "why": plan.why,
            "predicted_ms": plan.woven_ms if plan.cut else plan.whole_ms,
            "predicted_plain_ms": plan.whole_ms,
            "whole_ms": ms["whole"],
            "all_reduce_ms": ms["reduced"],
            "all_reduce_only_ms": ms["reduce_only"],
            "sent_share": sent,
        }

    @torch.inference_mode()
    def decode(self, rows: int, context: int, pairs: int) -> dict[str, Any]:
        """A step of one token of each of `rows` sequences, whole and cut in the middle, beside what the
        planner says of its best cut."""
        batch, work = self.weaver.rehearsal(rows, context, decode=True), float(rows * (context + 1))
        plan = self._plan(rows, work, work / 2)
        middle = rows // 2 if len(self.weaver.seams) > 1 else 0  # where nothing is ever woven, nothing is cut
        variants = {str(cut): partial(self.weaver.run, batch, cut) for cut in (0, middle)}
        ms = list(self._times(variants, pairs).values())
        found = {"rows": rows, "context": context, "plain_ms": ms[0], "woven_ms": ms[-1], "why": plan.why}
        predicted = plan.whole_ms / plan.woven_ms if plan.woven_ms else 1.0
        return found | {"gain": ms[0] / ms[-1], "predicted_gain": predicted}

    def _times(self, variants: Mapping[str, Callable[[], Tensor]], pairs: int) -> dict[str, float]:
        """Medians of ms, in turns; the first turn does not count."""

        def timed(variant: Callable[[], Tensor]) -> float:
            self.meet()
            began = time.perf_counter()
            variant()
            self.meet()
            return (time.perf_counter() - began) * 1e3

        return in_turns({name: partial(timed, variant) for name, variant in variants.items()}, pairs)

    @torch.inference_mode()
    def recorded(self, tokens: int) -> Recorder:
        """A step of `tokens` tokens as it is planned, recorded."""
        plan = self._plan(tokens, *_work(tokens))
        self.meet()
        return self.weaver.rehearse(tokens, 0, plan.cut, plan.seam_ctas)

    def _plan(self, rows: int, work: float, first_work: float) -> Plan:
        """Rank 0's plan, on all ranks; its predictions on rank 0 only."""
        plan = unplanned(0, self.weaver.why)
        if self._ranks.rank == 0 and self.weaver.planner is not None:
            plan = self.weaver.planner.plan(rows, work, first_work)
        told = self._ranks.votes.sum(torch.tensor([plan.cut, *plan.seam_ctas], dtype=torch.float32))
        cut, attention, mlp = map(int, told.tolist())
        return replace(plan, cut=cut, seam_ctas=(attention, mlp))

    def _bytes(self, tokens: int) -> float:
        """What a rank on a host of its own sends in a round: each joint's rows once there and once back, but
        for its own share; the last layer's joints have one row."""
        size, joints = self._ranks.size, len(self._chain)
        row_bytes = self._alone.partial().shape[1] * self._alone.partial().element_size()
        return 2 * (size - 1) / size * tokens * row_bytes * (3 * (joints - 2) + 2 * joints)

    def _run(self, chain: Links, batch: Batch, seam: Seam) -> Tensor:
        return run_chain(chain, (batch,), [seam], self._ranks.votes)

    def meet(self) -> None:
        """Waits for all ranks."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self._ranks.votes.sum(torch.zeros(1))


def _work(tokens: int) -> tuple[float, float]:
    """Cached tokens that a prompt's rows read together, and that its first half does."""
    work = tokens * (tokens + 1) / 2
    return work, work / 4


def _sent() -> int:
    """Bytes that have left this host (or network namespace) so far."""
    counters = psutil.net_io_counters(pernic=True)
    return sum(counter.bytes_sent for name, counter in counters.items() if name != "lo")


class AllReduceSeam(LocalSeam):
    """What an engine without a seam of its own does: a library's all-reduce, then a local add and norm."""

    name = "all-reduce"

    def __init__(self, ranks: Ranks, max_rows: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__(max_rows, hidden, dtype, ranks.device)
        silence = timedelta(seconds=ranks.silence_s)
        self._group = ranks.seams or ranks.group("all-reduces", ranks.device.type, silence)

    def start(self, joint: Joint, kept: Tensor | None = None, ctas: int = 0) -> None:
        """See `Seam.start`."""
        rows = self.partial() if kept is None else self.partial()[: len(kept)]
        if rows.numel():
            wait_for(self._group.allreduce([rows]), None, "an all-reduce")
        super().start(joint, kept, ctas)
