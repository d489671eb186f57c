"""A rank's seams and plans: where steps are cut, why others are not, and what is recorded of them."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf import __version__
from weaveinf.cache.batch import Batch
from weaveinf.cache.blocks import legal_cut
from weaveinf.comm.aid import aid
from weaveinf.comm.choose import make_seam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Seam
from weaveinf.config import PAGE_SIZE, EngineConfig
from weaveinf.models.config import ModelConfig
from weaveinf.models.layers import Model
from weaveinf.ops import native
from weaveinf.selectors.selector import RowPruner, Selector
from weaveinf.weave import profile
from weaveinf.weave.graphs import Graphs
from weaveinf.weave.plan import Plan, Planner, cuts, unplanned
from weaveinf.weave.rehearsal import rehearsal
from weaveinf.weave.run import run
from weaveinf.weave.tapes import Tapes
from weaveinf.weave.timeline import Recorder, Span

_PROBE_ROWS = 1024
Int32s = NDArray[np.int32]


def nothing(x: Tensor, batch: Batch, out: Tensor) -> None:
    """A block that leaves the seam whatever its buffer holds."""


class Weaver:
    """Runs batches, whole or woven, on one rank; every rank makes one and makes the same calls.

    Attributes:
        seam: that of the first half, and of steps that run whole.
        repeated: runs steps that it takes, all but a kind's first from what was kept; None: nothing is kept.
        why: why no step is ever woven; "" where steps may be.
        planner: rank 0's, which alone is asked, with weave="auto".
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        model: Model,
        ranks: Ranks,
        num_pages: int,
        selector: Selector | None,
    ) -> None:
        self._ranks, self._model, self._config = ranks, model, model_config
        self._on_cpu = ranks.device.type == "cpu"
        self._most = config.max_num_batched_tokens
        self._tokens = min(model_config.max_model_len, num_pages * PAGE_SIZE)
        self._dtype = model.pool_specs[0].dtype
        self._slots = config.max_num_seqs
        self._pruner = selector if isinstance(selector, RowPruner) else None
        self._row_align = selector.row_align if selector is not None else 1
        self.seams = [self._seam()]
        self.seam = self.seams[0]
        self.recorder: Recorder | None = None
        self.planner: Planner | None = None
        self.repeated: Graphs | Tapes | None = None
        # What a selector or indexer does depends on more than a step's shape: nothing is kept of its steps.
        if self._on_cpu:
            if selector is None and (ranks.size == 1 or self.seam.fused):
                self.repeated = Tapes(self._run, model.scratch.memory)
        elif selector is None and model_config.indexing is None:
            only_decode = self.seam.name == "collective"
            self.repeated = Graphs(self._run, model.scratch.memory, self._most, only_decode, ranks.device)
        self.why = self._objection(config)
        if not self.why:
            self.seams.append(self._seam())
        self.aid = aid(ranks, self._most, model.closing, self.seams)
        if not self.why:
            costs = self._profile() if config.weave == "auto" else None
            self.planner = Planner(costs) if costs is not None else None

    def _seam(self) -> Seam:
        return make_seam(self._ranks, self._most, self._config.hidden_size, self._dtype)

    def _objection(self, config: EngineConfig) -> str:
        if self._ranks.size == 1:
            return "one rank"
        if config.weave == "off":
            return "weave is off"
        if config.weave == "auto" and self.seam.fused and self._on_cpu:
            return "nothing to hide: the ranks share memory"
        if config.selector is not None and not self._on_cpu:
            return "a selector's votes and seams would be under way at once"
        return ""

    def run(self, batch: Batch, cut: int, ctas: tuple[int, int] = (0, 0)) -> Tensor:
        """The batch's wanted rows, normalised: [logit rows, hidden]. cut: rows of the first half, or 0; ctas:
        what its seams are given (`Plan`)."""
        halves: Sequence[Batch] = batch.split(cut) if cut else (batch,)
        if self.repeated is not None and self.recorder is None and self.repeated.takes(halves):
            return self.repeated.run(halves, ctas)
        if not self._on_cpu:
            halves = [half.to(self._ranks.device) for half in halves]
        return self._run(halves, ctas)

    def _run(self, halves: Sequence[Batch], ctas: tuple[int, int]) -> Tensor:
        chain, seams, recorder = self._model.chain, self.seams, self.recorder
        if recorder is not None:
            chain, seams = recorder.chain(chain), recorder.seams(seams)
        return run(chain, halves, seams, self._ranks.votes, ctas, self._pruner)

    def plan(self, num_computed: Int32s, num_query: Int32s, num_prompt_tokens: Int32s) -> Plan:
        """How a step of these sequences is to run; without a planner it predicts nothing."""
        if self.why:
            return unplanned(0, self.why)
        plan = self._plan(num_computed, num_query)
        if self._row_align > 1 and plan.cut:
            cut = self._legal(plan.cut, num_computed, num_query, num_prompt_tokens)
            plan = replace(plan, cut=cut) if cut else unplanned(0, "the selector allows no cut")
        return plan

    def _legal(self, cut: int, num_computed: Int32s, num_query: Int32s, num_prompt_tokens: Int32s) -> int:
        """The last cut up to `cut` that the selector allows, or the end of the sequence that it falls into; 0
        where that is the step's."""
        ends = np.cumsum(num_query)
        s = int(np.searchsorted(ends, cut, "left"))
        start = int(ends[s] - num_query[s])
        position = int(num_computed[s]) + cut - start
        legal = legal_cut(position, int(num_prompt_tokens[s]), self._row_align) - int(num_computed[s])
        found = start + max(legal, 0) or int(ends[s])
        return found if found < ends[-1] else 0

    def _plan(self, num_computed: Int32s, num_query: Int32s) -> Plan:
        rows = int(num_query.sum())
        if isinstance(self.repeated, Graphs):
            rows = self.repeated.planned(rows)
        if self.planner is None:  # weave="on"
            if legal := cuts(rows, 1):
                return unplanned(legal[len(legal) // 2], "weave is on")
            return unplanned(0, "too small to cut")
        before = np.cumsum(num_query) - num_query
        in_first = np.clip(rows // 2 - before, 0, num_query).astype(np.float64)

        def work(count: NDArray[Any]) -> float:
            return float((count * (num_computed + (count + 1) / 2)).sum())

        return self.planner.plan(rows, work(num_query.astype(np.float64)), work(in_first))

    def close(self) -> None:
        """Closes the seams; waits for nobody."""
        for seam in self.seams:
            seam.close()
        if self.aid is not None:
            self.aid.close()

    # What steps cost here

    def _profile(self) -> profile.Profile | None:
        """Rank 0 decides whether its kept profile holds; where it does not, all measure together. The
        others need none: plans travel with the steps."""
        ranks, now = self._ranks, self._seam_ms()
        kept = profile.load(self._key(), now) if ranks.rank == 0 else None
        if ranks.agree("kept" if kept is not None else "")[0]:
            return kept
        layers, ctas = self._config.num_layers, self.seam.ctas
        for _ in range(1 if self._on_cpu else 2):  # on a GPU the first time compiles kernels
            found = profile.measure(self._spans, layers, self._most, self._tokens, ctas)
        if ranks.rank == 0:
            profile.save(self._key(), found, now)
        return found

    def _seam_ms(self) -> float:
        """What a seam takes now, with nothing beside it; every rank calls it."""
        recorder = Recorder(self._ranks.device)
        recorder.begin(0)
        links = recorder.chain([(nothing, joint) for _, joint in self._model.chain[:5]])
        batch = self.rehearsal(min(_PROBE_ROWS, self._most), 0)
        run(links, [batch], recorder.seams([self.seam]), self._ranks.votes)
        return median((span.end - span.start) * 1e3 for span in recorder.read()[0] if span.kind == "seam")

    def _key(self) -> dict[str, Any]:
        """All that a profile depends on, but for the speed of the network."""
        ranks = self._ranks
        return {
            "weaveinf": __version__,
            "torch": torch.__version__,
            "model": repr(self._config),
            "dtype": str(self._dtype),
            "hosts": [len(host) for host in ranks.hosts],
            "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else native.isa,
            "threads": torch.get_num_threads(),
            "seam": [self.seam.name, *self.seam.ctas],
            "most_rows": self._most,
        }

    def rehearsal(self, rows: int, context: int, decode: bool = False) -> Batch:
        """Made-up rows for this cache."""
        made = rehearsal(rows, context, self._tokens, self._config.vocab_size, decode)
        return replace(made, state_slot=made.state_slot % self._slots)  # there may be more than ever run

    def rehearse(self, rows: int, context: int, cut: int, ctas: tuple[int, int] = (0, 0)) -> Recorder:
        """Runs and records a step of such tokens."""
        self.recorder = recorder = Recorder(self._ranks.device)
        recorder.begin(0)
        self.run(self.rehearsal(rows, context), cut, ctas)
        self.recorder = None
        return recorder

    def _spans(self, rows: int, context: int, cut: int, seam_ctas: int) -> list[Span]:
        return self.rehearse(rows, context, cut, (seam_ctas, seam_ctas)).read()[0]
