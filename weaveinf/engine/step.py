"""One step as rank 0 describes it to every rank: packed into int64, no pickle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]
Float64s = NDArray[np.float64]

MAGIC = 0x77656176_00000005
"""First word of a packed step; its low half is the layout's version."""

PER_SEQUENCE = (
    "state_slot",
    "num_computed",
    "num_query",
    "num_prompt_tokens",
    "num_logits",
    "num_targets",
    "num_new_pages",
    "output_position",
    "by_reference",
)
_LOWEST = np.array([[0], [0], [1], [0], [0], [0], [0], [-1], [0]], np.int32)
_INTEGERS = ("slot", "seed", "top_k", "min_tokens", "logprobs", "prompt_logprobs", "selector_budget")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_ARRAYS = ("banned_ids", "bias_ids", "bias_values", "prompt_token_ids", "output_token_ids")
_HEADER = 13
_FIXED = len(_INTEGERS) + len(_FLOATS) + len(_ARRAYS)


def _none() -> Int64s:
    return np.empty(0, np.int64)


def _no_masks() -> Int64s:
    return np.empty((0, 0), np.int64)


def _no_values() -> Float64s:
    return np.empty(0, np.float64)


@dataclass(eq=False)
class Admission:
    """A request takes a state slot: the slot's row of the block table and its sampler state start
    anew. `bias_values` is float64, the other arrays int64.

    temperature below 1e-5 is greedy. `logprobs` and `prompt_logprobs` are numbers of alternatives, -1 for
    none at all; `selector_budget` -1 is the engine's. `banned_ids` must not be sampled while `output_position
    < min_tokens`. The token ids seen so far are given only when a penalty counts them.
    """

    slot: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens: int = 0
    logprobs: int = -1
    prompt_logprobs: int = -1
    selector_budget: int = -1
    banned_ids: Int64s = field(default_factory=_none)
    bias_ids: Int64s = field(default_factory=_none)
    bias_values: Float64s = field(default_factory=_no_values)
    prompt_token_ids: Int64s = field(default_factory=_none)
    output_token_ids: Int64s = field(default_factory=_none)


@dataclass(eq=False)
class Step:
    """What every rank runs next. Sequences are the rows of the int32 arrays `[S]`:

    state_slot         the request's stable row
    num_computed       tokens already in the cache; the first query's position
    num_query          tokens to compute now, at least 1
    num_prompt_tokens  the request's prompt length
    num_logits         0, 1 or num_query: how many of its last rows need logits
    num_targets        0, or num_query: `targets` holds the token that follows each row (-1: none),
                       whose prompt log-probability is wanted
    num_new_pages      page ids that `new_pages` appends to the slot's row of the block table
    output_position    index of the output token that the last row samples, -1: samples none
    by_reference       bool: its one token is the last one sampled in its slot, and not in
                       `token_ids`

    `cut`: rows of the first half, 0 where the step runs whole; `why` so, for rank 0's counters alone.
    `seam_ctas`: of seams under attention and under other blocks (`Plan`).

    Flat int64 arrays, in sequence order: token_ids, new_pages, targets; and released: the slots of requests
    that ended or were preempted since the step before, which come first. Then come admissions: they empty a
    slot's row before this step's pages are appended.

    masked: which of the samples may be certain tokens only, ascending; masks int64 [masked, words]: which,
    a bit for each token id.
    """

    number: int
    admissions: list[Admission]
    state_slot: Int32s
    num_computed: Int32s
    num_query: Int32s
    num_prompt_tokens: Int32s
    num_logits: Int32s
    num_targets: Int32s
    num_new_pages: Int32s
    output_position: Int32s
    by_reference: NDArray[np.bool_]
    token_ids: Int64s
    new_pages: Int64s
    targets: Int64s
    released: Int64s = field(default_factory=_none)
    masked: Int64s = field(default_factory=_none)
    masks: Int64s = field(default_factory=_no_masks)
    cut: int = 0
    seam_ctas: tuple[int, int] = (0, 0)
    why: str = ""

    @property
    def num_seqs(self) -> int:
        return len(self.state_slot)

    @property
    def num_tokens(self) -> int:
        """Rows of this step's batch."""
        return len(self.token_ids) + int(np.count_nonzero(self.by_reference))

    @cached_property
    def decodes(self) -> bool:
        """Whether every sequence is past its prompt."""
        return not np.count_nonzero(self.num_computed < self.num_prompt_tokens)

    @property
    def num_samples(self) -> int:
        return int((self.output_position >= 0).sum())

    def pack(self) -> Int64s:
        """This step as one int64 array `[words]`; floats travel as the bits of a float64."""
        header = np.array(
            [
                MAGIC,
                0,
                self.number,
                self.cut,
                *self.seam_ctas,
                len(self.state_slot),
                len(self.admissions),
                len(self.token_ids),
                len(self.targets),
                len(self.released),
                *self.masks.shape,
            ],
            np.int64,
        )
        parts: list[Any] = [header, *[getattr(self, name) for name in PER_SEQUENCE]]
        parts += [self.token_ids, self.new_pages, self.targets, self.released]
        parts += [self.masked, self.masks.ravel()]
        for admission in self.admissions:
            parts += _pack_admission(admission)
        words: Int64s = np.concatenate(parts, dtype=np.int64, casting="safe")
        words[1] = len(words)
        return words

    @classmethod
    def unpack(cls, words: Int64s) -> Step:
        """The inverse of `pack`; the flat arrays are views of `words`.

        `ValueError` if `words` is not a packed step, whole and free of contradictions.
        """
        if words.dtype != np.int64 or words.ndim != 1 or len(words) < _HEADER or words[0] != MAGIC:
            raise ValueError("not a packed step")
        total, number, cut, *ctas = words[1:6].tolist()
        counts = words[6:_HEADER].tolist()
        sequences, admissions, tokens, targets, released, masked, each = counts
        if total != len(words) or min(counts) < 0:
            raise ValueError(f"a packed step of {total} words came as {len(words)}")
        reader = _Reader(words, _HEADER)
        wide = reader.take(len(PER_SEQUENCE) * sequences).reshape(len(PER_SEQUENCE), sequences)
        table = wide.astype(np.int32)
        if not np.array_equal(table, wide):
            raise ValueError("a packed step holds a number beyond 32 bits")
        rows: dict[str, Any] = dict(zip(PER_SEQUENCE, table, strict=True))
        _check(table, tokens, targets)
        rows["by_reference"] = rows["by_reference"].astype(np.bool_)
        step = cls(
            number=number,
            admissions=[],
            **rows,
            token_ids=reader.take(tokens),
            new_pages=reader.take(int(rows["num_new_pages"].sum(dtype=np.int64))),
            targets=reader.take(targets),
            released=reader.take(released),
            masked=reader.take(masked),
            masks=reader.take(masked * each).reshape(masked, each if masked else 0),
            cut=cut,
            seam_ctas=(ctas[0], ctas[1]),
        )
        if not 0 <= cut < max(step.num_tokens, 1):
            raise ValueError("a packed step is cut where it has no rows")
        ascend = not masked or (np.diff(step.masked, prepend=-1, append=step.num_samples) > 0).all()
        if not ascend or bool(masked) != bool(each):
            raise ValueError("a packed step masks what it does not sample")
        step.admissions = [_unpack_admission(reader) for _ in range(admissions)]
        if reader.at != len(words):
            raise ValueError("a packed step is longer than its parts")
        return step


class SampledLogprobs(NamedTuple):
    """Of one row: the wanted token's log-probability and the best alternatives, best first."""

    logprob: float
    ids: list[int]
    values: list[float]


@dataclass
class StepOutput:
    """What a step sampled: `tokens` int64 `[samples]` in sequence order.

    `logprobs`: one entry per sample, None where not asked for (or None for all).
    `prompt_logprobs`: one entry per sequence (or None for all): None where not asked for, else
    num_query entries, None where the target is -1. `pruned`: see `Selector.pruned`; one entry per sample.
    """

    tokens: Int64s
    logprobs: Sequence[SampledLogprobs | None] | None = None
    prompt_logprobs: Sequence[Sequence[SampledLogprobs | None] | None] | None = None
    pruned: Sequence[bool] | None = None


class _Reader:
    """Takes runs of words off a packed step and never reads past its end."""

    def __init__(self, words: Int64s, at: int) -> None:
        self.words = words
        self.at = at

    def take(self, count: int) -> Int64s:
        if not 0 <= count <= len(self.words) - self.at:
            raise ValueError("a packed step is shorter than its parts")
        self.at += count
        return self.words[self.at - count : self.at]


def _check(table: Int32s, tokens: int, targets: int) -> None:
    rows = dict(zip(PER_SEQUENCE, table, strict=True))
    query, logits, wanted = rows["num_query"], rows["num_logits"], rows["num_targets"]
    by_reference = rows["by_reference"].astype(np.bool_)
    sound = (
        (table >= _LOWEST)
        & ((logits == 0) | (logits == 1) | (logits == query))
        & (logits >= (rows["output_position"] >= 0))
        & ((wanted == 0) | ((wanted == query) & (logits == query)))
        & (~by_reference | (query == 1) & (rows["by_reference"] == 1))
    )
    by_value = int(query[~by_reference].sum(dtype=np.int64))
    if not sound.all() or by_value != tokens or int(wanted.sum(dtype=np.int64)) != targets:
        raise ValueError("a packed step contradicts itself")


def _pack_admission(admission: Admission) -> Iterator[Int64s]:
    arrays = [getattr(admission, name) for name in _ARRAYS]
    integers = [getattr(admission, name) for name in _INTEGERS]
    floats = [getattr(admission, name) for name in _FLOATS]
    yield np.array(integers + [len(array) for array in arrays], np.int64)
    yield np.array(floats, np.float64).view(np.int64)
    for array in arrays:
        yield array.view(np.int64)


def _unpack_admission(reader: _Reader) -> Admission:
    words = reader.take(_FIXED)
    integers = words[: -len(_FLOATS)].tolist()
    fixed: dict[str, Any] = dict(zip(_INTEGERS, integers, strict=False))
    fixed |= zip(_FLOATS, words[-len(_FLOATS) :].view(np.float64).tolist(), strict=True)
    lengths = integers[len(_INTEGERS) :]
    arrays: dict[str, Any] = {name: reader.take(n) for name, n in zip(_ARRAYS, lengths, strict=True)}
    if len(arrays["bias_ids"]) != len(arrays["bias_values"]) or fixed["slot"] < 0:
        raise ValueError("a packed step contradicts itself")
    arrays["bias_values"] = arrays["bias_values"].view(np.float64)
    return Admission(**fixed, **arrays)
