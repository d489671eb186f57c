"""One rank: its shard of the model, its caches, and the loop that every launcher runs."""

import gc
import logging
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from weaveinf.cache.batch import Batch
from weaveinf.cache.pools import Pools, PoolSpec, bytes_per_page
from weaveinf.comm.ranks import Ranks
from weaveinf.config import PAGE_SIZE, EngineConfig
from weaveinf.engine.sampler import Sampler
from weaveinf.engine.step import Step, StepOutput
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import fingerprint, load_model, resolve
from weaveinf.models.weights import Progress
from weaveinf.ops import native
from weaveinf.selectors.registry import at_once, settings
from weaveinf.selectors.selector import Selector
from weaveinf.trace import Trace
from weaveinf.weave import timeline
from weaveinf.weave.timeline import Recorder
from weaveinf.weave.weaver import Weaver

log = logging.getLogger("weaveinf")

_CGROUP = Path("/sys/fs/cgroup")

FREE_SHARE = 0.4
"""Share of a host's free memory that the caches of all its ranks take, unless told otherwise."""


class Worker:
    """One rank of an engine.

    Args:
        progress: called with (bytes loaded, bytes in all) as the shard is read.

    Raises:
        ValueError: for a checkpoint or settings that cannot work here.
    """

    def __init__(self, config: EngineConfig, ranks: Ranks, progress: Progress | None = None) -> None:
        if config.weave == "on" and ranks.size == 1:
            raise ValueError("weave='on' is not possible with one rank, which sends nothing; use more")
        self.config = config
        self.ranks = ranks
        self.path = resolve(config.model, config.revision)
        model_config = ModelConfig.from_path(self.path, config.max_model_len, at_once(config.selector))
        self.model_config = model_config.with_index_keys(config.index_keys)
        self.dtype = getattr(torch, config.dtype) if config.dtype != "auto" else self.model_config.dtype
        self._on_gpu = ranks.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.set_device(ranks.device)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        native.agree([words.split() for words in ranks.agree(" ".join(native.abilities()))])
        self.steps_done = 0
        self.trace = Trace()
        with torch.inference_mode():
            here = ranks.rank, ranks.size, ranks.device, self.dtype
            self.model = load_model(self.path, self.model_config, *here, config.load_format, progress)
            self.max_blocks = -(-self.model_config.max_model_len // PAGE_SIZE)
            self.selector = self._selector(config)
            specs = [*self.model.pool_specs]
            if self.selector is not None:
                specs = [replace(spec, host=self.selector.host_layers) for spec in specs]
                specs += self.selector.pools
            self.num_pages = self._agree_on_pages(specs)
            scattered = self.selector is not None or self.model_config.indexing is not None
            self.pools = Pools(specs, self.num_pages, PAGE_SIZE, ranks.device, scattered)
            if config.kv_cache_gib is not None:
                self.pools.occupy()
            if self.selector is not None:
                self.selector.bind(self.pools)
            self.model.bind(self.pools, self.selector)
            self.weaver = Weaver(config, self.model_config, self.model, ranks, self.num_pages, self.selector)
            self.seam = self.weaver.seam
            if self.seam.name == "collective" and ranks.device.type == "cpu" and ranks.rank == 0:
                log.warning("the ranks sum over TCP, which is slower than shared memory: %s", self.seam.why)
            self.sampler = Sampler(
                vocab_size=self.model_config.vocab_size,
                vocab_start=self.model.vocab_start,
                vocab_shard=self.model.vocab_shard,
                max_num_seqs=config.max_num_seqs,
                device=ranks.device,
                votes=ranks.votes,
            )
        if config.trace is not None:
            self.weaver.recorder = Recorder(ranks.device)
        self._table = np.zeros((config.max_num_seqs, self.max_blocks), np.int32)
        self._num_blocks = np.zeros(config.max_num_seqs, np.int64)
        self._iota = np.arange(config.max_num_seqs + 1, dtype=np.int32)

    def _selector(self, config: EngineConfig) -> Selector | None:
        if config.selector is None:
            return None
        chosen, model = settings(config.selector), self.model_config
        if any(window is not None for window in model.windows):
            raise ValueError(f"{chosen.name} cannot choose in a sliding window; use selector=None")
        if model.latents is not None and chosen.serves == "heads":
            raise ValueError(
                f"{chosen.name} chooses by keys of heads, and this model caches latents; use None"
            )
        known = "" if model.latents else fingerprint(self.path, model, config.load_format)
        selector = chosen.make(self.model.heads(config.max_num_seqs, known), PAGE_SIZE)
        trace = self.trace
        trace.selector, trace.budget, trace.choices = chosen.name, chosen.budget, selector.counts
        return selector

    def _agree_on_pages(self, specs: list[PoolSpec]) -> int:
        """Pages of the cache: what the rank with the least room can hold, at most what can be used."""
        device, host = bytes_per_page(specs, PAGE_SIZE)
        here = next(len(ranks) for ranks in self.ranks.hosts if self.ranks.rank in ranks)
        room = on_host = int(_free_memory() * FREE_SHARE / here)
        if self._on_gpu:
            room = int(torch.cuda.mem_get_info(self.ranks.device)[0] * 2 * FREE_SHARE)
        else:
            device, host = device + host, 0
        if self.config.kv_cache_gib is not None:
            room = int(self.config.kv_cache_gib * 2**30)
        useful = self.config.max_num_seqs * self.max_blocks
        mine = torch.zeros(self.ranks.size)
        # Exact in float32, as sums of votes are: a page count is rounded down to 24 bits.
        mine[self.ranks.rank] = min(room // device, on_host // host if host else useful, useful, 1 << 24)
        pages = int(self.ranks.votes.sum(mine).min())
        if pages < 1:
            raise ValueError(
                f"no room for the KV cache: a page of {PAGE_SIZE} tokens takes {device / 2**20:.1f} MiB of a "
                f"rank's device and {host / 2**20:.1f} MiB of its host besides; free memory, raise "
                "kv_cache_gib or use more ranks"
            )
        return pages

    def close(self) -> None:
        """Takes part in no more steps; waits for nobody."""
        self.weaver.close()

    def follow(self) -> None:
        """Runs the steps that rank 0 sends until it sends an empty message."""
        gc.freeze()  # what is there stays: to look through it all takes a tenth of a second, in some step
        while len(message := self.ranks.control.receive()):
            self.execute(Step.unpack(message))
        self.tell()

    def tell(self) -> None:
        """After the last step: the ranks bring together what was recorded, and rank 0 writes it."""
        recorder = self.weaver.recorder
        if recorder is None or self.config.trace is None:
            return
        spans = timeline.collect(recorder, self.ranks)
        if self.ranks.rank == 0:
            try:
                self.trace.told = timeline.write(Path(self.config.trace), spans)
            except OSError as error:
                log.error("the trace is lost: %s", error)

    @torch.inference_mode()
    def execute(self, step: Step) -> StepOutput:
        """Runs one step; every rank of the engine runs the same steps in the same order."""
        began = time.perf_counter()
        if self.selector is not None:
            for slot in step.released.tolist():
                self.selector.release(slot)
        for admission in step.admissions:
            self.sampler.admit(admission)
            self._num_blocks[admission.slot] = 0
            if self.selector is not None:
                self.selector.admit(admission.slot, admission.selector_budget)
        if self.weaver.recorder is not None:
            self.weaver.recorder.begin(step.number)
        with torch.cuda.device(self.ranks.device) if self._on_gpu else nullcontext():
            batch = self._batch(step)
            if self.selector is not None:
                self.selector.begin(batch, self.config.max_num_batched_tokens)
            x = self.weaver.run(batch, step.cut, step.seam_ctas)
            output = self.sampler.run(self.model.head, x, step)
            if self.selector is not None:
                output.pruned = self.selector.pruned(step.state_slot[step.output_position >= 0].tolist())
        if self._on_gpu:
            self.ranks.check()  # now all kernels of the step are over
        self.steps_done += 1
        phase = "decode" if step.decodes else "prefill"
        how = "woven" if step.cut else "fused" if self.seam.fused else "plain"
        self.trace.step(how, step.why, phase, time.perf_counter() - began, step.num_tokens)
        return output

    def _batch(self, step: Step) -> Batch:
        """The step's rows; all but the tokens still on the host, where it may be cut."""
        if len(step.new_pages):
            self._append_pages(step)
        lengths, positions = step.num_query, step.num_computed
        total = step.num_tokens
        seq_lens = positions + lengths
        used = -(-int(seq_lens.max()) // PAGE_SIZE)
        seq_of_row = self._iota[: len(lengths)]
        if total == len(lengths):  # one row each: nothing to spread
            cu_seqlens = self._iota[: total + 1]
            logit_rows = step.num_logits.nonzero()[0]
        else:
            cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
            np.cumsum(lengths, out=cu_seqlens[1:])
            seq_of_row, rows = np.repeat(seq_of_row, lengths), np.arange(total)
            positions = (rows + (positions - cu_seqlens[:-1])[seq_of_row]).astype(np.int32)
            logit_rows = np.flatnonzero(rows >= (cu_seqlens[1:] - step.num_logits)[seq_of_row])
        table = self._table[:, :used][step.state_slot]
        slots = table[seq_of_row, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        return Batch(
            input_ids=self._input_ids(step, total, seq_of_row),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots),
            cu_seqlens_q=torch.from_numpy(cu_seqlens),
            seq_lens=torch.from_numpy(seq_lens),
            num_prompt_tokens=torch.from_numpy(step.num_prompt_tokens),
            block_table=torch.from_numpy(table),
            state_slot=torch.from_numpy(step.state_slot),
            logit_rows=torch.from_numpy(logit_rows),
        )

    def _append_pages(self, step: Step) -> None:
        for i in np.flatnonzero(step.num_new_pages):
            slot, count = step.state_slot[i], step.num_new_pages[i]
            first = int(step.num_new_pages[:i].sum())
            at = self._num_blocks[slot]
            self._table[slot, at : at + count] = step.new_pages[first : first + count]
            self._num_blocks[slot] = at + count

    def _input_ids(self, step: Step, total: int, seq_of_row: NDArray[np.integer[Any]]) -> Tensor:
        """Tokens that rank 0 did not know when it described the step are the slots' last ones."""
        if len(step.token_ids) == total:
            return self.sampler.put(step.token_ids)
        referred = step.by_reference[seq_of_row]
        ids = np.empty(total, np.int64)
        ids[~referred] = step.token_ids
        out = self.sampler.put(ids)
        if referred.any():
            slots = step.state_slot[step.by_reference].astype(np.int64)
            last = self.sampler.last_token[self.sampler.put(slots)].clamp_(min=0)  # whatever runs, it is lost
            out[self.sampler.put(np.flatnonzero(referred))] = last
        return out


def _free_memory() -> int:
    """Bytes that may still be taken: of the machine, and of the container (cgroup v2) if this is one."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):
        limit, used, stat = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = dict(line.split() for line in stat.splitlines())["inactive_file"]
        free = min(free, max(0, int(limit) - int(used) + int(cached)))
    return free
