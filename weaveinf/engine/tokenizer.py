"""Text to tokens: the checkpoint's own tokenizer and chat template, never its code."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))
}
"""How byte-level vocabularies write bytes: those that print as themselves, the others from 256 on."""


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
        added = self.backend.get_added_tokens_decoder()
        self._added = {id_: token.content.encode() for id_, token in added.items()}
        self._byte_level = "ByteLevel" in repr(self.backend.decoder)
        self.special_ids = {id_ for id_, token in added.items() if token.special}
        """Of tokens that are not shown."""
        self._longest = max(map(len, self.backend.get_vocab()))

    def encode(self, text: str, max_tokens: int, special: bool = True) -> list[int]:
        """Token ids, with what the tokenizer puts before a text (such as a BOS token) unless `special` is
        False. ValueError for a text that cannot fit, however well it is cut; it is not cut at all then.
        """
        if len(text) > max_tokens * self._longest:
            raise ValueError(f"prompt has {len(text)} characters, too many for this model's context")
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, also where it is not a whole character."""
        if (added := self._added.get(token_id)) is not None:
            return added
        piece = self.backend.id_to_token(token_id) or ""
        if self._byte_level:
            return bytes(_BYTES[char] for char in piece if char in _BYTES)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    @property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model of tools."""
        return bool(self._tokenizer.chat_template) and "tools" in self._tokenizer.get_chat_template(
            tools=[{}]
        )

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """A conversation up to where the assistant begins to answer; tools: JSON schemas of the
        functions that it may call, as the template takes them.

        Raises:
            ValueError: when there is no chat template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise ValueError("this model has no chat template: use generate with a plain prompt")
        try:
            found = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                tokenize=False,
                add_generation_prompt=True,
            )
            return str(found)
        except Exception as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def load_tokenizer(path: Path) -> TextTokenizer | None:
    """The tokenizer in a checkpoint's directory; None when there is none."""
    return TextTokenizer(path) if any((path / name).is_file() for name in FILES) else None
