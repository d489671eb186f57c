"""Builds a Llama that looks things up, by writing its weights down instead of training them.

    python bench/retrieval_model.py [--kind llama] [DIRECTORY] [--dtype float32]    (bench/models/retrieval)

It answers a token with what followed that token's earlier occurrence, at any distance to 128K tokens and
more, as induction heads do (Olsson et al., arXiv 2209.11895):

- In layer 0 one query head of each KV head reads the token before: keys and queries are the same everywhere
  but for their rotary turns, whose phases agree at distance one only. It copies that token's matching code.
- In layer 2 one query head of each KV head compares its own token's code with what layer 0 left at every
  position, on planes that turn too slowly for distance to matter, and copies the identity of the token there.
  (FASA reads all in layer 0 and Quest in layers 0 and 1: layer 2 is where every method must choose.)
- All other heads, layer 1 and the MLPs are noise, of scores like a trained model's. They write where nobody
  reads but they.

It has two relatives (`KINDS`). `deep` has eight layers, of which the last one answers and layers 1, 4 and 6
look without saying anything: before each stage of LazyLLM a head has seen what matters. `indexed` is a
DeepSeek-V3.2, whose latent attention and indexer do the same in the same layers.

The residual stream is a direct sum: a token's identity, its matching code, the code of the token before,
the answer, one constant, filling, noise. All embeddings have the same norm, so that RMSNorm changes little.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
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
WRITTEN = HIDDEN - NOISE.start

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

CODE, ROPE, VALUE = KV_HEADS * len(SLOW), 64, KV_HEADS * HEAD_DIM
INDEX_HEADS, INDEX_DIM, INDEX_TOP_K = 4, 128, 64
LATENT_CONSTANT, INDEX_CONSTANT = 64.0, 24.0
INDEXED = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "num_key_value_heads": HEADS,
    "first_k_dense_replace": LAYERS,
    "q_lora_rank": CODE + 16,
    "kv_lora_rank": 2 * CODE + VALUE + 16,
    "qk_nope_head_dim": CODE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX_DIM,
    "index_topk": INDEX_TOP_K,
}


class Builder:
    """Makes the tensors, all noise of one seeded generator.

    looking: the layers with a matching head; the last of them copies what it finds.
    """

    def __init__(self, looking: tuple[int, ...] = (MATCHING_LAYER,), layers: int = LAYERS) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._looking = looking
        self.config = CONFIG | {"num_hidden_layers": layers}
        self.tensors: dict[str, Tensor] = {}
        self._identities = self._make_identities()
        self.tensors["model.embed_tokens.weight"] = self._embedding()
        for layer in range(layers):
            prefix = f"model.layers.{layer}"
            self._attention(layer, f"{prefix}.self_attn")
            self._mlp(f"{prefix}.mlp")
            for which in ("input", "post_attention"):
                self.tensors[f"{prefix}.{which}_layernorm.weight"] = torch.ones(HIDDEN)
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

    def _mlp(self, prefix: str) -> None:
        down = torch.zeros(HIDDEN, INTERMEDIATE)
        down[NOISE] = self._normal(WRITTEN, INTERMEDIATE) * NOISE_SIZE * INTERMEDIATE**-0.5
        self.tensors |= {
            f"{prefix}.gate_proj.weight": self._normal(INTERMEDIATE, HIDDEN) * HIDDEN**-0.5,
            f"{prefix}.up_proj.weight": self._normal(INTERMEDIATE, HIDDEN) * HIDDEN**-0.5,
            f"{prefix}.down_proj.weight": down,
        }

    def _attention(self, layer: int, prefix: str) -> None:
        q = self._normal(HEADS, HEAD_DIM, HIDDEN) * HIDDEN**-0.5
        k, v = (self._normal(KV_HEADS, HEAD_DIM, HIDDEN) * HIDDEN**-0.5 for _ in range(2))
        o = torch.zeros(HIDDEN, HEADS, HEAD_DIM)
        o[NOISE] = self._normal(WRITTEN, HEADS, HEAD_DIM) * NOISE_SIZE * HEAD_DIM**-0.5
        for group in range(KV_HEADS if layer == 0 or layer in self._looking else 0):
            special = self._match if layer else self._read_before
            q[group * GROUP] = 0.0
            o[:, group * GROUP] = 0.0
            special(group, q[group * GROUP], k[group], v[group], o[:, group * GROUP])
            if layer and layer != self._looking[-1]:
                o[:, group * GROUP] = 0.0
        self.tensors |= {
            f"{prefix}.q_proj.weight": q.flatten(0, 1),
            f"{prefix}.k_proj.weight": k.flatten(0, 1),
            f"{prefix}.v_proj.weight": v.flatten(0, 1),
            f"{prefix}.o_proj.weight": o.flatten(1),
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


class Indexed(Builder):
    """The relative with latent attention and an indexer.

    All codes of a token lie in one latent, side by side, with a constant so large that a latent's norm is
    nearly the same for all tokens. Neither latents nor an indexer's matching channels turn, so that distance
    does not matter at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = {k: v for k, v in self.config.items() if k != "head_dim"} | INDEXED

    def _latent(self, *parts: tuple[int, slice]) -> Tensor:
        """[width, HIDDEN] that lays these parts of the residual at these channels, and a constant at the last
        of 16 more."""
        last, part = parts[-1]
        out = torch.zeros(last + part.stop - part.start + 16, HIDDEN)
        for first, part in parts:
            width = part.stop - part.start
            out[torch.arange(first, first + width), torch.arange(part.start, part.stop)] = 1.0
        out[-1, CONSTANT] = LATENT_CONSTANT / CONSTANT_SIZE
        return out

    def _attention(self, layer: int, prefix: str) -> None:
        q_a, kv_a = self._latent((0, MATCH)), self._latent((0, BEFORE), (CODE, MATCH), (2 * CODE, IDENTITY))
        q_rank, kv_rank = len(q_a), len(kv_a)
        noise = self._normal
        q_b = noise(HEADS, CODE + ROPE, q_rank) * q_rank**-0.5
        k_b, v_b = noise(HEADS, CODE, kv_rank), noise(HEADS, VALUE, kv_rank) * kv_rank**-0.5
        turning = torch.zeros(ROPE, HIDDEN)
        o = torch.zeros(HIDDEN, HEADS, VALUE)
        o[NOISE] = noise(WRITTEN, HEADS, VALUE) * NOISE_SIZE * VALUE**-0.5
        k_b *= kv_rank**-0.5
        index_q, index_k = noise(INDEX_HEADS, INDEX_DIM, q_rank), noise(INDEX_DIM, HIDDEN) * HIDDEN**-0.5
        # Normed latents are that much shorter than what went into them.
        shorter_q, shorter_kv = (LATENT_CONSTANT * rank**-0.5 for rank in (q_rank, kv_rank))
        if layer in (0, MATCHING_LAYER):
            q_b[0] = k_b[0] = v_b[0] = o[:, 0] = index_q[:] = index_k[:] = 0.0
            index_k[ROPE + CODE // 2], index_k[ROPE + CODE // 2 + 1] = self._balance(), -self._balance()
        codes = torch.arange(CODE)
        if layer == 0:
            planes = torch.arange(FAST)
            turn = THETA ** (-planes.double() / (ROPE // 2))
            size = (torch.tensor(BEFORE_SCORES).double() * (CODE + ROPE) ** 0.5).sqrt()
            turning[2 * planes, CONSTANT] = (size / CONSTANT_SIZE).float()
            constant = size / LATENT_CONSTANT * shorter_q
            q_b[0, CODE + 2 * planes, -1] = (constant * turn.cos()).float()
            q_b[0, CODE + 2 * planes + 1, -1] = -(constant * turn.sin()).float()
            index_q[0, planes, -1] = (constant * turn.cos()).float()
            index_q[0, planes + ROPE // 2, -1] = -(constant * turn.sin()).float()
            index_k[planes, CONSTANT] = (size / CONSTANT_SIZE).float()
            v_b[0, codes, CODE + codes] = shorter_kv
            o[BEFORE.start + codes, 0, codes] = 1.0
        if layer == MATCHING_LAYER:
            q_b[0, codes, codes] = MATCH_QUERY * shorter_q
            k_b[0, codes, codes] = MATCH_KEY * shorter_kv
            half = codes[: CODE // 2]
            index_q[0, ROPE + half, half] = MATCH_QUERY * shorter_q
            index_k[ROPE + half, BEFORE.start + half] = 1.0
            every = torch.arange(VALUE)
            v_b[0, every, 2 * CODE + every] = shorter_kv
            o[ANSWER.start + every, 0, every] = 1.0
        weighing = torch.zeros(INDEX_HEADS, HIDDEN)
        weighing[:, CONSTANT] = 1.0 / CONSTANT_SIZE
        self.tensors |= {
            f"{prefix}.q_a_proj.weight": q_a,
            f"{prefix}.q_a_layernorm.weight": torch.ones(q_rank),
            f"{prefix}.q_b_proj.weight": q_b.flatten(0, 1),
            f"{prefix}.kv_a_proj_with_mqa.weight": torch.cat([kv_a, turning]),
            f"{prefix}.kv_a_layernorm.weight": torch.ones(kv_rank),
            f"{prefix}.kv_b_proj.weight": torch.cat([k_b, v_b], 1).flatten(0, 1),
            f"{prefix}.o_proj.weight": o.flatten(1),
            f"{prefix}.indexer.wq_b.weight": index_q.flatten(0, 1),
            f"{prefix}.indexer.wk.weight": index_k,
            f"{prefix}.indexer.k_norm.weight": torch.ones(INDEX_DIM),
            f"{prefix}.indexer.k_norm.bias": torch.zeros(INDEX_DIM),
            f"{prefix}.indexer.weights_proj.weight": weighing,
        }

    @staticmethod
    def _balance() -> Tensor:
        """[HIDDEN]: a constant so large that an index key's variance is nearly the same for all tokens."""
        out = torch.zeros(HIDDEN)
        out[CONSTANT] = INDEX_CONSTANT / CONSTANT_SIZE
        return out


KINDS: dict[str, Callable[[], Builder]] = {
    "llama": Builder,
    "deep": lambda: Builder((1, 4, 6, 7), 8),
    "indexed": Indexed,
}


def write(directory: Path, dtype: torch.dtype = torch.bfloat16, kind: str = "llama") -> None:
    """Writes config.json and model.safetensors; there is no tokenizer, prompts are token ids."""
    directory.mkdir(parents=True, exist_ok=True)
    built = KINDS[kind]()
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in built.tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = built.config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the retrieval checkpoint.")
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY)
    parser.add_argument("--kind", choices=KINDS, default="llama")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    write(args.directory, getattr(torch, args.dtype), args.kind)
    print(f"wrote {args.directory}")


if __name__ == "__main__":
    main()
