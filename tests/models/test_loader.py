"""Checkpoints that are whole, and all the ways in which they are not; dummies; memory while loading."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.harness import CPU, Lockstep, make_checkpoint
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import fingerprint, load_model, resolve
from weaveinf.models.weights import Dummy, Piece, columns, rows

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
SHARDED = {"max_shard_size": "20KB"}


def load(path: Path, size: int = 2, rank: int = 0, **options: Any) -> Any:
    config = ModelConfig.from_path(path)
    return load_model(path, config, rank, size, CPU, torch.float32, **options)


def refused(path: Path, words: str) -> str:
    """The one-line message with which every rank refuses the checkpoint."""
    messages = set()
    for rank in range(2):
        with pytest.raises(ValueError, match=words) as error:
            load(path, rank=rank)
        messages.add(str(error.value))
    (message,) = messages
    assert "\n" not in message
    return message


def test_an_index_and_its_shards(tmp_path: Path) -> None:
    theirs = make_checkpoint(tmp_path, "llama", save=SHARDED)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with torch.no_grad():
        want = theirs(torch.tensor([TOKENS])).logits[0]
    got = Lockstep(tmp_path, 2).step((0, TOKENS, 8))[:, : want.shape[1]]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def edited(change: Callable[[dict[str, Tensor]], None], path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # harmless

    edited(change, tmp_path)
    message = refused(tmp_path, "lacks tensor model.layers.1.mlp.up_proj.weight")
    assert "unexpected tensor model.layers.0.self_attn.q_proj.bias:" in message
    assert "inv_freq" not in message


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    edited(lambda tensors: [tensors.pop(n) for n in [*tensors] if "layers.1" in n] and None, tmp_path)
    refused(tmp_path, "lacks tensors .* and 1 more")


def test_layers_that_the_config_denies_are_unexpected(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    lie(tmp_path, num_hidden_layers=2)
    refused(tmp_path, r"unexpected tensors model\.layers\.2\.")


def lie(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "tensor", "shapes"),
    [
        ({"num_attention_heads": 8}, "self_attn.q_proj", r"\[64, 48\].*\[128, 48\]"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj", r"\[32, 48\].*\[64, 48\]"),
        ({"intermediate_size": 32}, "mlp.gate_proj", r"\[40, 48\].*\[32, 48\]"),
        ({"hidden_size": 64}, "embed_tokens", r"\[61, 48\].*\[61, 64\]"),
        ({"vocab_size": 62}, "embed_tokens", r"\[61, 48\].*\[62, 48\]"),
    ],
)
def test_a_config_that_lies_about_sizes(
    tmp_path: Path, changes: dict[str, Any], tensor: str, shapes: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    lie(tmp_path, **changes)
    message = refused(tmp_path, f"{tensor}.*{shapes}")
    assert str(tmp_path / "model.safetensors") in message


def test_missing_truncated_and_corrupt_shards_are_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", save=SHARDED)
    victim = sorted(tmp_path.glob("*.safetensors"))[2]
    whole = victim.read_bytes()
    for wrong in (whole[:-100], whole[:5], b"", b"\xff" * 64 + whole[64:]):
        victim.write_bytes(wrong)
        refused(tmp_path, f"{victim.name} is missing, truncated or corrupt")
    victim.unlink()
    refused(tmp_path, f"{victim.name} is missing though")


def test_an_index_that_is_no_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    index = tmp_path / "model.safetensors.index.json"
    for words, content in (
        ("not readable JSON", "{"),
        ("has no weight_map", "{}"),
        ("not a file beside it", '{"weight_map": {"a": "../model.safetensors"}}'),
    ):
        index.write_text(content)
        refused(tmp_path, words)


def test_pickled_quantized_and_absent_weights(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    edited(lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}), tmp_path)
    refused(tmp_path, f"{name}.*dtype I8: its weights are quantized")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, r"holds no model\.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"pytorch_model\.bin.*convert to safetensors")


def test_what_cannot_be_shared_or_is_unknown(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    with pytest.raises(ValueError, match="num_attention_heads=4 is not divisible by 3 ranks"):
        load(tmp_path, size=3)
    with pytest.raises(ValueError, match="load_format='pt'"):
        load(tmp_path, load_format="pt")


def test_dtypes_are_converted_while_reading(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama").bfloat16().save_pretrained(tmp_path)
    read = load(tmp_path, size=1).chain[0][0].table
    saved = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert (read.dtype, saved.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(read, saved.float())


def test_a_fingerprint_is_of_a_model_and_not_of_its_files(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "llama")
    config = ModelConfig.from_path(tmp_path)
    one = fingerprint(tmp_path, config)
    model.save_pretrained(tmp_path / "shards", **SHARDED)
    assert fingerprint(tmp_path / "shards", config.limited_to(64)) == one
    assert fingerprint(tmp_path, replace(config, rope=replace(config.rope, theta=5e5))) != one
    assert fingerprint(tmp_path, config, "dummy") != one
    edited(lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.01), tmp_path)
    assert fingerprint(tmp_path, config) != one


def test_progress_counts_the_bytes_of_this_rank(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe")
    seen: list[tuple[int, int]] = []
    load(tmp_path, progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}


def test_dummy_weights_are_one_model_at_any_number_of_ranks(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe")
    (tmp_path / "model.safetensors").unlink()
    one, four = (Lockstep(tmp_path, n, load_format="dummy").step((0, TOKENS, 8)) for n in (1, 4))
    assert one.std() > 0
    torch.testing.assert_close(four[:, : one.shape[1]], one, rtol=1e-4, atol=1e-5)


def test_dummy_elements_depend_on_name_and_place() -> None:
    source = Dummy()

    def read(piece: Piece) -> Tensor:
        out = torch.full(piece.extent, torch.nan)
        source.read(piece, out)
        return out

    whole = read(rows("a", 40, 300, range(40)))
    assert torch.equal(read(rows("a", 40, 300, range(7, 21))), whole[7:21])
    assert torch.equal(read(columns("a", 40, 300, range(100, 177))), whole[:, 100:177])
    assert 0.015 < whole.std() < 0.025
    assert whole.unique(dim=0).shape[0] == 40
    assert not torch.equal(read(rows("b", 40, 300, range(40))), whole)
    assert torch.equal(read(Piece("x.norm.weight", (5,))), torch.ones(5))
    stack = read(Piece("e", (3, 4, 5)))
    assert torch.equal(read(Piece("e", (3, 4, 5), (slice(1, 2), slice(0, 2)))), stack[1:2, :2])


def test_resolve_takes_directories_and_refuses_what_is_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for wrong in ("no/such/place", "nobody/nothing-of-this-name"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no directory here, and not had") as error:
            resolve(wrong)
        assert "\n" not in str(error.value)


def test_resolve_finds_the_fetched_snapshot_of_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    assert resolve("some/model").name == "a" * 40
    assert resolve("some/model", "v1").name == "b" * 40


PEAK = """
import sys, threading, time, torch
from pathlib import Path
from weaveinf.models.config import ModelConfig
from weaveinf.models.loader import load_model

torch.set_num_threads(1)
torch.ones(8, 8) @ torch.ones(8, 8)

def private() -> int:  # memory of our own: pages of the mapped file are the system's to drop
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0

path = Path(sys.argv[1])
config = ModelConfig.from_path(path)
start = peak = private()
loading = True

def watch() -> None:
    global peak
    while loading:
        peak = max(peak, private())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
total = [0]
model = load_model(path, config, 1, 2, torch.device("cpu"), torch.float32,
                   progress=lambda done, of: total.append(of))
loading = False
thread.join()
print(total[-1], peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_holds_no_more_than_the_share_and_one_tensor(tmp_path: Path) -> None:
    """Rank 1 of 2 of a 150 MB model, whose largest packed weight is 6 MB of a share of 75 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 7}
    make_checkpoint(tmp_path, "llama", num_attention_heads=8, head_dim=64, **sizes)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    share, peak = map(int, done.stdout.split())
    largest = 3072 * 512 * 4
    assert 70e6 < share < 80e6
    # The raw tensor and its packed copy; 4 MB for everything that is not a weight.
    assert peak < share + 2 * largest + 4e6
