"""What a user asks for, one running sequence of it, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from weaveinf.engine.structured import Constraint

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_IDS = 1024
MAX_LOGPROBS = 20
MAX_BIAS = 1024
_INT32_MAX = 2**31 - 1


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, bool) and isinstance(value, Integral) and low <= int(value) <= high:
        return int(value)
    raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r:.80}")


def _number(name: str, value: Any, low: float, high: float, open_low: bool = False) -> float:
    real = isinstance(value, Real) and not isinstance(value, bool)
    # NaN compares false with everything, infinities lie outside of all bounds
    if not real or not low <= value <= high or (open_low and value == low):
        above = "above" if open_low else "from"
        raise ValueError(f"{name} must be a number {above} {low:g} to {high:g}, got {value!r:.80}")
    return float(value)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop must be a string or at most {MAX_STOP_STRINGS} strings")
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise ValueError(
                f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, got {string!r:.80}"
            )
    return tuple(strings)


def _stop_ids(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"stop_token_ids must be a list of token ids, got {ids!r:.80}")
    out = tuple(_integer("a stop token id", i, 0, _INT32_MAX) for i in ids)
    if len(out) > MAX_STOP_IDS:
        raise ValueError(f"stop_token_ids may hold {MAX_STOP_IDS} ids at most, got {len(out)}")
    return out


def _logit_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIAS:
        raise ValueError(f"logit_bias must map at most {MAX_BIAS} token ids to numbers")
    return {
        _integer("a logit_bias token id", token, 0, _INT32_MAX): _number(
            f"logit_bias[{token}]", value, -100, 100
        )
        for token, value in bias.items()
    }


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request; every bound is checked, `ValueError` names the field.

    temperature 0 is greedy (so is anything below 1e-5; the sampler divides by 0.01 at least).
    top_k 0 or -1 is off. max_tokens None: until the model stops or the context is full.
    logprobs: for each sampled token its own and that many best alternatives' log-probabilities,
    of the model's raw logits. selector_budget: how many cached tokens the engine's selector may choose for
    this request (of LazyLLM: how many percent of a prompt go on), 0 for all, None for as many as its settings
    say. json_schema: the text of a JSON schema that the answer satisfies, unless another limit cuts it off;
    it ends where nothing can follow, whatever min_tokens. stop strings are cut from the text, stop token ids
    and the end-of-sequence token stay in `token_ids`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    selector_budget: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("temperature", _number("temperature", self.temperature, 0, 100))
        put("top_p", _number("top_p", self.top_p, 0, 1, open_low=True))
        put("top_k", max(0, _integer("top_k", self.top_k, -1, _INT32_MAX)))
        put("min_p", _number("min_p", self.min_p, 0, 1))
        put(
            "repetition_penalty",
            _number("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True),
        )
        for name in ("frequency_penalty", "presence_penalty"):
            put(name, _number(name, getattr(self, name), -2, 2))
        put("stop", _stop_strings(self.stop))
        put("stop_token_ids", _stop_ids(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")
        if not isinstance(self.json_schema, str | None):
            raise ValueError(f"json_schema must be the text of a JSON schema, got {self.json_schema!r:.80}")
        put("n", _integer("n", self.n, 1, MAX_N))
        put("min_tokens", _integer("min_tokens", self.min_tokens, 0, _INT32_MAX))
        optional = {
            "seed": (-(2**63), 2**64 - 1),
            "max_tokens": (1, _INT32_MAX),
            "logprobs": (0, MAX_LOGPROBS),
            "prompt_logprobs": (0, MAX_LOGPROBS),
            "selector_budget": (0, _INT32_MAX),
        }
        for name, (low, high) in optional.items():
            if getattr(self, name) is not None:
                put(name, _integer(name, getattr(self, name), low, high))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if self.logit_bias is not None:
            put("logit_bias", _logit_bias(self.logit_bias))

    @property
    def needs_token_counts(self) -> bool:
        """Whether a penalty looks at the tokens seen so far."""
        frequency, presence = self.frequency_penalty, self.presence_penalty
        return self.repetition_penalty != 1 or frequency != 0 or presence != 0


class TokenLogprob(NamedTuple):
    """One token's log-probability (natural logarithm) and the best alternatives', best first."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the engine; the scheduler alone changes it.

    `num_computed` counts the positions whose keys and values are in the cache once every step
    scheduled so far has run. `in_flight` counts the tokens that such steps sample and whose values
    have not come back yet; they follow `output_token_ids`.
    """

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    """Resolved, 0 <= seed < 2**63; a function of the user's seed and `index` alone."""
    index: int = 0
    """Which of the user's n samples this is."""
    salt: bytes = b""
    """Requests share prefix pages only with those of the same salt."""
    priority: int = 0
    """Lower comes first."""
    constraint: Constraint | None = None

    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    status: str = "new"
    """"new" | "waiting" | "running" | "finished"."""
    finish_reason: str | None = None
    """"stop" | "length" | "abort" once finished."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it."""
    pruned: bool | None = None
    """See `CompletionOutput`."""

    limit: int = 0
    """Prompt and output tokens together never exceed this; set by `Scheduler.add`."""
    stop_ids: frozenset[int] = frozenset()
    slot: int = -1
    num_computed: int = 0
    in_flight: int = 0
    blocks: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached: int = 0
    """Prompt tokens that the first admission took from the prefix cache."""
    num_preemptions: int = 0
    started: float = 0.0
    """When it was first admitted, by the monotonic clock."""

    def __post_init__(self) -> None:
        if self.params.logprobs is not None:
            self.logprobs = []
        if self.params.prompt_logprobs is not None and self.index == 0:
            self.prompt_logprobs = [None] * len(self.prompt_token_ids)

    @property
    def unmasked(self) -> bool:
        """Whether its grammar must say first what may come next."""
        return self.constraint is not None and self.constraint.mask is None

    @property
    def num_known(self) -> int:
        """Tokens whose values the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens at positions start to stop (exclusive) of prompt and output together."""
        prompt = len(self.prompt_token_ids)
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - prompt]


@dataclass
class CompletionOutput:
    """One of the n samples of a prompt.

    pruned: whether the engine's selector, one that leaves rows of prompts behind (LazyLLM), served the whole
    answer. It does not where the prompt is longer than a step, its log-probabilities or a budget of 0 are
    asked for, or it was computed again after a preemption. None: the engine has no such selector.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    pruned: bool | None = None


@dataclass
class RequestOutput:
    """All that came of one prompt; the first sample's fields are also its own."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One entry per prompt token; None for the first, which nothing predicts."""

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.outputs[0].logprobs

    @property
    def pruned(self) -> bool | None:
        return self.outputs[0].pruned


def mix_seed(seed: int, index: int) -> int:
    """A seed for sample `index`: splitmix64 of the two, 0 <= result < 2**63."""
    mask = 2**64 - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def make_requests(
    first_id: int,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    vocab_size: int,
    fallback_seed: int,
    salt: bytes = b"",
    priority: int = 0,
) -> list[Request]:
    """The n sequences of one prompt, ids first_id, first_id + 1, ...

    `fallback_seed` serves a request that names none. `ValueError` for an empty prompt or any token
    id (prompt, stop ids, bias) outside the vocabulary.
    """
    prompt = _prompt(prompt_token_ids, vocab_size)
    named = {"stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias or ()}
    for name, ids in named.items():
        for token in ids:
            if token >= vocab_size:
                raise ValueError(f"{name} holds {token}, the vocabulary ends at {vocab_size - 1}")
    seed = fallback_seed if params.seed is None else params.seed
    seeds = [mix_seed(seed, i) for i in range(params.n)]
    return [Request(first_id + i, prompt, params, own, i, salt, priority) for i, own in enumerate(seeds)]


def _prompt(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    if isinstance(token_ids, str | bytes) or len(token_ids) == 0:
        raise ValueError("the prompt is empty: give at least one token")
    try:
        ids = np.asarray(token_ids)
    except ValueError:
        ids = np.empty(0)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise ValueError("the prompt must be a flat list of whole token ids")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"the prompt holds token id {bad}, outside 0 to {vocab_size - 1}")
    out: list[int] = ids.tolist()
    return out
