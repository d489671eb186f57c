"""Tokens to text as they come: whole characters only, and stop strings found across tokens."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT = 8
"""Prompt tokens that the decoder sees first, so that a leading space is kept or dropped rightly."""


class TextStream:
    """The text of one running sequence.

    `text` is what may be shown: it ends before a character whose bytes are not all there, and before
    anything that may yet turn out to be the beginning of a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(_whole(tokenizer, prompt_token_ids[-CONTEXT:]), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._undecoded: list[int] = []
        self._held = ""
        self.text = ""

    def add(self, token_id: int, may_stop: bool = True) -> str | None:
        """Takes the next token; returns the stop string that it completes (`text` ends before it). With
        `may_stop` False it completes none."""
        self._undecoded.append(token_id)
        try:
            chunk = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # It loses its place where a token changes how those before it read: begin behind them.
            self._stream = DecodeStream(skip_special_tokens=True)
            chunk = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        if chunk is None:
            return None
        self._undecoded.clear()
        return self._show(chunk, may_stop)

    def end(self) -> None:
        """No token follows: shows what was held back, broken characters as U+FFFD."""
        if self._undecoded:
            self._held += self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        self.text += self._held
        self._held = ""

    def _show(self, chunk: str, may_stop: bool) -> str | None:
        self._held += chunk
        found = [(at, stop) for stop in self._stop if may_stop and (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self.text += self._held[:at]
            self._held = ""
            self._undecoded.clear()
            return stop
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown = len(self._held) - keep
        self.text += self._held[:shown]
        self._held = self._held[shown:]
        return None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def _whole(tokenizer: Tokenizer, context: Sequence[int]) -> list[int]:
    """The context without a last character whose bytes are not all there: it would come out again,
    with all before it, as part of the answer. The answer's share of such a character is U+FFFD."""
    kept = list(context)
    while kept and tokenizer.decode(kept, skip_special_tokens=True).endswith("\N{REPLACEMENT CHARACTER}"):
        kept.pop()
    return kept
