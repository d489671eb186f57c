"""Builds a Llama that looks things up, by writing its weights down instead of training them.

    python bench/retrieval_model.py [DIRECTORY] [--dtype float32]       (default bench/models/retrieval)

It answers a token with what followed that token's earlier occurrence, at any distance to 128K tokens and
more, as induction heads do (Olsson et al., arXiv 2209.11895):

- In layer 0 one query head of each KV head reads the token before: keys and queries are the same everywhere
  but for their rotary turns, whose phases agree at distance one only. It copies that token's matching code.
- In layer 2 one query head of each KV head compares its own token's code with what layer 0 left at every
  position, on planes that turn too slowly for distance to matter, and copies the identity of the token there.
  (FASA reads all in layer 0 and Quest in layers 0 and 1: layer 2 is where every method must choose.)
- All other heads, layer 1 and the MLPs are noise, of scores like a trained model's. They write where nobody
  reads but they.

The residual stream is a direct sum: a token's identity, its matching code, the code of the token before,
the answer, one constant, filling, noise. All embeddings have the same norm, so that RMSNorm changes little.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DIRECTORY = Path(__file__).parent / "models" / "retrieval"
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 256, 3, 8, 2, 64
GROUP, HALF = HEADS // KV_HEADS, HEAD_DIM // 2
MATCHING_LAYER = 2

THETA = 1e16
"""Planes turn by 10 ** (-i / 2) a token."""
FAST = 12
"""Planes that find the token before. The others carry the match: they turn by 0.13 at most in 128K."""
SLOW = [*range(FAST, HALF), *range(HALF + FAST, HEAD_DIM)]
"""Channels of the slow planes; a matching code has one entry for each."""

MARK = 0
"""The marker of a question. It says nothing: its identity is zero, so that no answer is ever it."""
FILLERS = range(1, 2048)
VALUES = range(2048, 2048 + KV_HEADS * HEAD_DIM)
KEYS = range(VALUES.stop, 6144)
VOCABULARY = KEYS.stop

IDENTITY = slice(0, KV_HEADS * HEAD_DIM)
MATCH = slice(IDENTITY.stop, IDENTITY.stop + KV_HEADS * len(SLOW))
BEFORE = slice(MATCH.stop, MATCH.stop + KV_HEADS * len(SLOW))
ANSWER = slice(BEFORE.stop, BEFORE.stop + KV_HEADS * HEAD_DIM)
CONSTANT = ANSWER.stop
FILL = slice(CONSTANT + 1, CONSTANT + 48)
"""What makes all embeddings equally long. Apart from the noise, which would change the sum's norm with it."""
NOISE = slice(FILL.stop, HIDDEN)

CONSTANT_SIZE = 8.0
FILLER_MATCH = 0.3
"""Codes of fillers are that much shorter: what asks for a key is seldom near to one of them."""
BEFORE_SCORES = (24.0, 20.0, 16.0, 12.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0)
"""What a fast plane adds to the score of the token before."""
MATCH_QUERY, MATCH_KEY = 4.0, 2.5
"""Factors of the codes; a match scores about 44, the likest other of all keys three quarters of it."""
NOISE_SIZE = 0.3
"""Of what noise heads and MLPs write, against what they read."""
VALUE_LOGIT, OTHER_LOGIT = 0.6, 0.45
"""What an answer's entry adds to a logit. Several values at once are each a faint answer, and must still be
above what is a little like all of them."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": MARK,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 1 << 18,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}


class Builder:
    """Makes the tensors, all noise of one seeded generator."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self._identities = self._make_identities()
        self.tensors["model.embed_tokens.weight"] = self._embedding()
        for layer in range(LAYERS):
            self._layer(layer)
        self.tensors["model.norm.weight"] = torch.ones(HIDDEN)
        head = torch.zeros(VOCABULARY, HIDDEN)
        head[:, ANSWER] = OTHER_LOGIT * self._identities
        head[VALUES, ANSWER] = VALUE_LOGIT * self._identities[VALUES]
        self.tensors["lm_head.weight"] = head

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _make_identities(self) -> Tensor:
        """Entries 1 and -1, [VOCABULARY, 2 * HEAD_DIM]. Those of the values are orthogonal, so that several
        at once can be told from the others."""
        width = IDENTITY.stop
        codes = self._normal(VOCABULARY, width).sign()
        hadamard = torch.ones(1, 1)
        while len(hadamard) < width:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        codes[VALUES] = hadamard[:, torch.randperm(width, generator=self._generator)]
        codes[MARK] = 0.0
        return codes

    def _embedding(self) -> Tensor:
        """[VOCABULARY, HIDDEN], each of norm sqrt(HIDDEN)."""
        out = torch.zeros(VOCABULARY, HIDDEN)
        out[:, IDENTITY] = self._identities
        codes = self._normal(VOCABULARY, KV_HEADS, len(SLOW))
        codes *= len(SLOW) ** 0.5 / codes.norm(dim=-1, keepdim=True)
        codes[FILLERS] *= FILLER_MATCH
        out[:, MATCH] = codes.flatten(1)
        out[:, CONSTANT] = CONSTANT_SIZE
        fill = self._normal(VOCABULARY, FILL.stop - FILL.start)
        left = (HIDDEN - out.square().sum(1, keepdim=True)).sqrt()
        out[:, FILL] = fill * left / fill.norm(dim=1, keepdim=True)
        return out

    def _layer(self, layer: int) -> None:
        prefix = f"model.layers.{layer}"
        reading, written = HIDDEN**-0.5, NOISE.stop - NOISE.start
        q = self._normal(HEADS, HEAD_DIM, HIDDEN) * reading
        k, v = (self._normal(KV_HEADS, HEAD_DIM, HIDDEN) * reading for _ in range(2))
        o = torch.zeros(HIDDEN, HEADS, HEAD_DIM)
        o[NOISE] = self._normal(written, HEADS, HEAD_DIM) * NOISE_SIZE * HEAD_DIM**-0.5
        down = torch.zeros(HIDDEN, INTERMEDIATE)
        down[NOISE] = self._normal(written, INTERMEDIATE) * NOISE_SIZE * INTERMEDIATE**-0.5
        special = {0: self._read_before, MATCHING_LAYER: self._match}.get(layer)
        if special is not None:
            for group in range(KV_HEADS):
                q[group * GROUP] = 0.0
                o[:, group * GROUP] = 0.0
                special(group, q[group * GROUP], k[group], v[group], o[:, group * GROUP])
        self.tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": q.flatten(0, 1),
            f"{prefix}.self_attn.k_proj.weight": k.flatten(0, 1),
            f"{prefix}.self_attn.v_proj.weight": v.flatten(0, 1),
            f"{prefix}.self_attn.o_proj.weight": o.flatten(1),
            f"{prefix}.mlp.gate_proj.weight": self._normal(INTERMEDIATE, HIDDEN) * reading,
            f"{prefix}.mlp.up_proj.weight": self._normal(INTERMEDIATE, HIDDEN) * reading,
            f"{prefix}.mlp.down_proj.weight": down,
        }

    @staticmethod
    def _read_before(group: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """A head that copies the matching code of the token before.

        On every fast plane the key points along the first channel and the query is turned back by one
        token's angle, so that they agree, whatever else, one token apart.
        """
        planes = torch.arange(FAST)
        turn = THETA ** (-planes.double() / HALF)
        size = (torch.tensor(BEFORE_SCORES).double() * HEAD_DIM**0.5).sqrt() / CONSTANT_SIZE
        k[planes] = k[planes + HALF] = 0.0
        k[planes, CONSTANT] = size.float()
        q[planes, CONSTANT] = (size * turn.cos()).float()
        q[planes + HALF, CONSTANT] = -(size * turn.sin()).float()
        width = len(SLOW)
        codes = torch.arange(width)
        v[codes] = 0.0
        v[codes, MATCH.start + group * width + codes] = 1.0
        o[BEFORE.start + group * width + codes, codes] = 1.0

    @staticmethod
    def _match(group: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
        """A head that looks for its token's code among those of the tokens before, and copies the identity of
        the token there."""
        width = len(SLOW)
        codes, channels = torch.arange(width), torch.tensor(SLOW)
        q[channels, MATCH.start + group * width + codes] = MATCH_QUERY
        k[channels] = 0.0
        k[channels, BEFORE.start + group * width + codes] = MATCH_KEY
        every = torch.arange(HEAD_DIM)
        v[:] = 0.0
        v[every, IDENTITY.start + group * HEAD_DIM + every] = 1.0
        o[ANSWER.start + group * HEAD_DIM + every, every] = 1.0


def write(directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes config.json and model.safetensors; there is no tokenizer, prompts are token ids."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in Builder().tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the retrieval checkpoint.")
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    write(args.directory, getattr(torch, args.dtype))
    print(f"wrote {args.directory}")


if __name__ == "__main__":
    main()
