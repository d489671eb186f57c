"""A rank that runs steps on simulated pages, and what it ought to say.

The model of it samples a token from a hash of the whole prefix, as read back from the pages, and of
the sampler's state in the slot. A wrong page, position, slot or stale state is a wrong token.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from weaveinf.engine.request import Request
from weaveinf.engine.step import Admission, SampledLogprobs, Step, StepOutput

VOCAB = 6
EOS = 0
POISON = -7


def score(prefix: list[int], *more: object) -> int:
    """A number that anything about the prefix changes."""
    return int.from_bytes(blake2b(repr((prefix, more)).encode(), digest_size=6).digest(), "big")


def sample(prefix: list[int], seed: int, seen: list[int] | None, banned: list[int]) -> int:
    token = score(prefix, seed, seen) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def logprob(prefix: list[int], token: int) -> SampledLogprobs:
    return SampledLogprobs(-float(score(prefix, token)), [token], [float(len(prefix))])


class SimulatedRank:
    """Executes packed steps as a worker does: all of a step's keys are written before any is read.

    It refuses to read what another sequence wrote in the same step, and to write one place twice.
    """

    def __init__(self, num_pages: int, size: int, max_num_seqs: int) -> None:
        self.size = size
        self.tokens = np.full(num_pages * size, POISON)
        self.positions = np.full(num_pages * size, POISON)
        self.writer = np.full((num_pages * size, 2), POISON)  # step number, slot
        self.table: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.admitted: list[Admission | None] = [None] * max_num_seqs
        self.last_token = [POISON] * max_num_seqs
        self.seen: list[list[int]] = [[] for _ in range(max_num_seqs)]

    def execute(self, packed: np.ndarray) -> StepOutput:
        step = Step.unpack(packed.copy())
        for slot in step.released.tolist():
            assert self.admitted[slot] is not None
            self.admitted[slot] = None
        for admission in step.admissions:
            slot = admission.slot
            assert self.admitted[slot] is None, "a slot is taken that nobody gave up"
            self.table[slot] = []
            self.admitted[slot] = admission
            self.last_token[slot] = POISON
            seen = (admission.prompt_token_ids, admission.output_token_ids)
            self.seen[slot] = [int(token) for ids in seen for token in ids]
        self._write(step)
        output = StepOutput(np.empty(0, np.int64), [], [])
        sampled = []
        targets = iter(step.targets.tolist())
        for i in range(step.num_seqs):
            last = int(step.num_computed[i] + step.num_query[i])
            prefix = self._read(step, int(step.state_slot[i]), last)
            if step.output_position[i] >= 0:
                sampled.append(self._sample(step, i, prefix, output))
            rows = None
            if step.num_targets[i]:
                start = int(step.num_computed[i]) + 1
                ends = [(at, next(targets)) for at in range(start, last + 1)]
                rows = [None if t < 0 else logprob(prefix[:at], t) for at, t in ends]
            output.prompt_logprobs.append(rows)  # type: ignore[union-attr]
        output.tokens = np.array(sampled, np.int64)
        return output

    def _write(self, step: Step) -> None:
        tokens, pages = iter(step.token_ids.tolist()), iter(step.new_pages.tolist())
        for i, slot in enumerate(step.state_slot.tolist()):
            self.table[slot] += [next(pages) for _ in range(step.num_new_pages[i])]
            for position in range(step.num_computed[i], step.num_computed[i] + step.num_query[i]):
                token = self.last_token[slot] if step.by_reference[i] else next(tokens)
                at = self._place(slot, position)
                assert self.writer[at, 0] != step.number, "two sequences write one place"
                self.tokens[at], self.positions[at] = token, position
                self.writer[at] = step.number, slot
        assert next(tokens, None) is None
        assert next(pages, None) is None

    def _place(self, slot: int, position: int) -> int:
        return self.table[slot][position // self.size] * self.size + position % self.size

    def _read(self, step: Step, slot: int, length: int) -> list[int]:
        at = [self._place(slot, position) for position in range(length)]
        assert self.positions[at].tolist() == list(range(length))
        number, writer = self.writer[at].T
        assert (writer[number == step.number] == slot).all(), "read what this very step computes"
        return self.tokens[at].tolist()  # type: ignore[no-any-return]

    def _sample(self, step: Step, i: int, prefix: list[int], output: StepOutput) -> int:
        slot, position = int(step.state_slot[i]), int(step.output_position[i])
        admission = self.admitted[slot]
        assert admission is not None
        assert position == len(prefix) - step.num_prompt_tokens[i]
        penalised = admission.repetition_penalty != 1
        banned = admission.banned_ids.tolist() if position < admission.min_tokens else []
        token = sample(prefix, admission.seed, self.seen[slot] if penalised else None, banned)
        self.last_token[slot] = token
        self.seen[slot].append(token)
        wanted = admission.logprobs >= 0
        output.logprobs.append(logprob(prefix, token) if wanted else None)  # type: ignore
        return token


def expected(request: Request, eos: set[int], limit: int) -> tuple[list[int], str]:
    """The tokens and the finish reason of a request that runs alone."""
    params, prompt = request.params, request.prompt_token_ids
    stops = {*params.stop_token_ids} | (set() if params.ignore_eos else eos)
    out: list[int] = []
    while len(prompt) + len(out) < limit:
        seen = prompt + out if params.repetition_penalty != 1 else None
        banned = sorted(stops) if len(out) < params.min_tokens else []
        out.append(sample(prompt + out, request.seed, seen, banned))
        if out[-1] in stops and len(out) > params.min_tokens:
            return out, "stop"
    return out, "length"
