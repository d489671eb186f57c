"""The demo's checkpoint: complete, small, splittable, and really trained."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import transformers

DEMO = Path(__file__).parents[1] / "weaveinf" / "assets" / "demo"
TEXT = "The with statement is used to wrap the execution of a block with methods"


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(DEMO)


def test_size() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 16e6


def test_splits_over_four_ranks() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert config[name] % 4 == 0, name


def test_tokenizer_round_trips(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    for text in (TEXT, "  def f(x):\n\treturn 1234  # ünïcode 漢字 \N{SNOWMAN}", " a", ""):
        ids = tokenizer(text).input_ids
        assert all(0 <= i < 4096 for i in ids)
        assert tokenizer.decode(ids) == text


def test_chat_template(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "What does math.sqrt do?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nWhat does math.sqrt do?<|end|>\n<|assistant|>\n"
    ends = json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"]) == ends


def test_is_trained(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Text of Python's documentation is far likelier to it than chance (log 4096 = 8.3 nats a token)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 4
    with (DEMO / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["held_out_loss"]) < float(rows[0]["held_out_loss"]) - 1
