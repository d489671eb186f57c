"""Trains the demo model, from nothing to a checkpoint in the Hugging Face layout.

    python bench/demo_model/train.py --export weaveinf/assets/demo

reads the text (corpus.py), trains the tokenizer, trains the model on two threads in float32 and
exports it in bfloat16, with the loss curve beside it. Interrupted, the same command goes on from the
last checkpoint in `run/`: batches are a function of the seed and the step alone. The learning rate
stays flat until the last part of `--steps`, so a run may also be shortened or lengthened on resuming
before its decay began and still be the run that the new number alone would have given.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import corpus
import torch
import torch.nn.functional as F
from curve import draw
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 4096
STEP_TOKENS, SHORT, LONG = 2048, 256, 512  # a step's tokens; its context before and in the decay
WARMUP, DECAY_SHARE = 40, 0.35
MUON_RATE, ADAM_RATE = 0.02, 3e-3
MIXTURE = {"topic": 0.2, "docstring": 0.45, "source": 0.35}
COLUMNS = ["step", "tokens", "wall_seconds", "cpu_seconds", "train_loss", "held_out_loss", "rate"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% else %}{{ '<|user|>\n' }}"
    "{% endif %}{{ message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train_tokenizer(documents: list[corpus.Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; every string round-trips, nothing is added to a prompt."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(corpus.SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((d.text for d in documents if not d.held_out), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=corpus.END,
        pad_token=corpus.END,
        additional_special_tokens=[corpus.USER, corpus.ASSISTANT, corpus.TURN_END],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def encode(
    documents: list[corpus.Document], tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Token streams to learn, one a kind, in shuffled order, and the held-out stream."""
    shuffled = sorted(documents, key=lambda d: hashlib.sha256(d.key.encode()).digest())
    streams: dict[str, list[int]] = {kind: [] for kind in MIXTURE}
    held_out: list[int] = []
    end = tokenizer.convert_tokens_to_ids(corpus.END)
    for document, ids in zip(
        shuffled, tokenizer([d.text for d in shuffled], verbose=False)["input_ids"], strict=True
    ):
        (held_out if document.held_out else streams[document.kind]).extend([*ids, end])
    return {kind: torch.tensor(ids) for kind, ids in streams.items()}, torch.tensor(held_out)


def batch(streams: dict[str, torch.Tensor], seed: int, step: int, context: int) -> torch.Tensor:
    """[rows, context + 1] token ids: windows at random places of streams drawn by MIXTURE."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    kinds = torch.multinomial(
        torch.tensor(list(MIXTURE.values())), STEP_TOKENS // context, replacement=True, generator=generator
    )
    rows = []
    for kind in kinds.tolist():
        stream = streams[list(MIXTURE)[kind]]
        at = int(torch.randint(len(stream) - context, (1,), generator=generator))
        rows.append(stream[at : at + context + 1])
    return torch.stack(rows)


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of predicting each token of [rows, n + 1] from the last."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """The loss on 64 windows of SHORT tokens, spread over the text that was never learnt."""
    windows = stream.unfold(0, SHORT + 1, len(stream) // 66)[:64]
    return sum(float(loss_of(model, part)) for part in windows.split(8)) / 8


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix of each [..., m, n], in float32.

    The quintic of Muon (K. Jordan et al., 2024); torch.optim.Muon iterates in bfloat16, which is
    eight times slower on a processor without bfloat16 instructions.
    """
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the weight matrices of the layers."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        rate = self.param_groups[0]["lr"]
        shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for parameter in self.param_groups[0]["params"]:
            shapes.setdefault(tuple(parameter.shape), []).append(parameter)
        for (rows, columns), same in shapes.items():
            updates = []
            for parameter in same:
                assert parameter.grad is not None
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                updates.append(parameter.grad.lerp(momentum, 0.95))
            scale = max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(same, orthogonal(torch.stack(updates)), strict=True):
                parameter.mul_(1 - 0.01 * rate).add_(update, alpha=-rate * scale)


def rate_at(step: int, steps: int) -> float:
    """The share of the full learning rate: linear warm-up, flat, a cosine down to 0.02."""
    decay = int(steps * DECAY_SHARE)
    if step < WARMUP:
        return (step + 1) / WARMUP
    if step < steps - decay:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - steps + decay) / decay))


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, to: Path, log: Sequence[Any]) -> None:
    """Writes the checkpoint in bfloat16, the tokenizer, the licence note and the loss curve.

    Each file is written beside its place and moved there, so a reader never sees half of one.
    """
    part = to.parent / (to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tokenizer.save_pretrained(part, save_jinja_files=False)
    settings = json.loads((part / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every release knows
    (part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_diff_dict(), "torch_dtype": "bfloat16"}
    config.pop("dtype", None)
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = [tokenizer.convert_tokens_to_ids(t) for t in (corpus.END, corpus.TURN_END)]
    generation = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": ends}
    (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    shutil.copy(HERE / "LICENSE-demo-model.txt", part / "LICENSE.txt")
    with (part / "loss.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(log)
    (part / "loss.svg").write_text(draw(log))
    to.mkdir(parents=True, exist_ok=True)
    for file_path in sorted(part.iterdir()):
        os.replace(file_path, to / file_path.name)
    part.rmdir()


def optimizers(model: LlamaForCausalLM) -> Iterator[torch.optim.Optimizer]:
    """Muon for the layers' matrices, Adam for the (tied) embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim == 1 or "embed" in name]
    yield Muon(matrices, MUON_RATE)
    yield torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.01)


def new_model(seed: int) -> LlamaForCausalLM:
    """4.0 million random parameters; heads and sizes divide by 1, 2 and 4 ranks."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            architectures=["LlamaForCausalLM"],
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--export", type=Path, default=HERE / "run" / "model")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    options = parser.parse_args()
    torch.set_num_threads(2)

    documents = corpus.documents()
    print(f"Python {platform.python_version()}, corpus {corpus.digest(documents)}", flush=True)
    tokenizer = train_tokenizer(documents)
    streams, held_out = encode(documents, tokenizer)
    print({kind: len(stream) for kind, stream in streams.items()}, "tokens", flush=True)

    model = new_model(options.seed)
    layers_first, others = optimizers(model)
    state_path = HERE / "run" / f"state-{options.seed}.pt"
    state_path.parent.mkdir(exist_ok=True)
    step, wall, cpu, log = 0, 0.0, 0.0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        step, wall, cpu, log = state["step"], state["wall"], state["cpu"], state["log"]
        model.load_state_dict(state["model"])
        layers_first.load_state_dict(state["muon"])
        others.load_state_dict(state["adam"])
        print(f"going on at step {step}", flush=True)

    wall_start, cpu_start = time.monotonic() - wall, time.process_time() - cpu
    saved_at, running = time.monotonic(), []
    while step < options.steps:
        rate = rate_at(step, options.steps)
        layers_first.param_groups[0]["lr"] = MUON_RATE * rate
        others.param_groups[0]["lr"] = ADAM_RATE * rate
        context = SHORT if rate == 1.0 or step < WARMUP else LONG
        loss = loss_of(model, batch(streams, options.seed, step, context))
        loss.backward()
        layers_first.step()
        others.step()
        model.zero_grad()
        running.append(float(loss.detach()))
        step += 1
        if step % 50 == 0 or step == options.steps:
            wall, cpu = time.monotonic() - wall_start, time.process_time() - cpu_start
            train_loss = sum(running) / len(running)
            running.clear()
            row = [step, step * STEP_TOKENS, round(wall, 1), round(cpu, 1)]
            row += [round(train_loss, 4), round(held_out_loss(model, held_out), 4), round(rate, 4)]
            log.append(row)
            print(dict(zip(COLUMNS, row, strict=True)), flush=True)
            if time.monotonic() - saved_at > options.save_every or step == options.steps:
                state = {"step": step, "wall": wall, "cpu": cpu, "log": log}
                state |= {"model": model.state_dict(), "muon": layers_first.state_dict()}
                torch.save({**state, "adam": others.state_dict()}, state_path.with_suffix(".part"))
                os.replace(state_path.with_suffix(".part"), state_path)
                export(model, tokenizer, options.export, log)
                saved_at = time.monotonic()


if __name__ == "__main__":
    main()
