"""Text to tokens: the checkpoint's own tokenizer and chat template, never its code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class TextTokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: when it cannot be loaded, as when it needs code of its own.
    """

    def __init__(self, path: Path) -> None:
        try:
            # A path as such, or a directory "org/name" beside us would be looked up on the hub.
            loaded = AutoTokenizer.from_pretrained(
                path.resolve(), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the tokenizer in {path} cannot be loaded: {reason[0]}") from error
        if not isinstance(loaded, PreTrainedTokenizerFast):
            raise ValueError(f"the tokenizer in {path} has no tokenizer.json; convert it first")
        self._tokenizer = loaded
        self.backend: Tokenizer = loaded.backend_tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer puts before a text (such as a BOS token)."""
        return list(self._tokenizer.encode(text))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins to answer.

        Raises:
            ValueError: when there is no chat template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template: use generate with a plain prompt")
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        # The template writes the special tokens itself.
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def load_tokenizer(path: Path) -> TextTokenizer | None:
    """The tokenizer in a checkpoint's directory; None when there is none."""
    return TextTokenizer(path) if any((path / name).is_file() for name in FILES) else None
