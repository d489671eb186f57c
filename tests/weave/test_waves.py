"""The wave model against what was published of 8 H100 (arXiv 2505.11329 and its artifact)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from tests.models.harness import FAMILIES, SMALL
from weaveinf.cli import main
from weaveinf.models.config import ModelConfig
from weaveinf.weave.plan import Half, Planner, cuts, predict
from weaveinf.weave.waves import FITTED, GPUS, GpuCosts, tiles

LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN_72B = LLAMA_70B | {
    "architectures": ["Qwen2ForCausalLM"],
    "intermediate_size": 29568,
    "vocab_size": 152064,
}
MIXTRAL_8X22B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 65536,
}
# Prompt tokens: ms with multimem all-reduces, without communication, woven.
PREFILL = {
    1024: (53.7, 41.9, 46.2),
    2048: (94.2, 74.9, 76.7),
    4096: (179.5, 144.9, 142.2),
    8192: (356.0, 289.5, 279.8),
    16384: (744.1, 610.2, 585.3),
    32768: (1639.9, 1371.4, 1326.0),
    65536: (3917.7, 3338.3, 3282.4),
}
# Of the 70B model on 8 GPUs, us by rows.
MLP_ROWS = (512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920)
MLP_US = (158.9, 227.7, 242.4, 286.3, 302, 347, 370, 410, 434, 475, 494, 496)
# Tokens: us of the MLP whole, and of the two halves of the published smart split.
SPLITS = {
    1024: (304.9, 317.8),
    1280: (371.2, 399.8),
    1536: (435.2, 461.2),
    1792: (494.1, 540.9),
    2048: (557.9, 603.7),
    2304: (620.5, 674.5),
    2560: (684.3, 737.5),
    2816: (749.0, 801.9),
    3072: (814.5, 863.9),
    3328: (876.2, 908.7),
    3584: (869.7, 971.2),
    3840: (959.1, 992.1),
}


def costs(raw: dict[str, Any], tp: int = 8, gpu: str = "h100") -> GpuCosts:
    return GpuCosts(ModelConfig.from_dict(raw), tp, GPUS[gpu])


def gain(of: GpuCosts, tokens: int) -> float:
    return of.plain(tokens)[0] / Planner(of).plan(tokens, tokens**2 / 2, tokens**2 / 8).woven_ms


def test_what_is_not_modelled_is_not_predicted() -> None:
    with pytest.raises(ValueError, match="latent attention of DeepseekV3ForCausalLM"):
        costs({"architectures": ["DeepseekV3ForCausalLM"], **SMALL, **FAMILIES["deepseek_v3"]})


def test_the_constants_are_these_twelve() -> None:
    assert set(FITTED) == {
        "gemm",
        "idle",
        "kernel",
        "memory",
        "gap_us",
        "link",
        "cta",
        "beside",
        "power",
        "issue_us",
        "outside_us",
        "outside_us_per_row",
    }


def test_the_published_prefill_table(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert weaveinf_plan(tmp_path, "--tp", "8", "--tokens", *map(str, PREFILL), "--json", str(file)) == 0
    found = json.loads(file.read_text())["plans"]
    woven = []
    for row, (plain, no_comm, tokenweave) in zip(found, PREFILL.values(), strict=True):
        assert row["plain_ms"] == pytest.approx(plain, rel=0.03)
        assert row["no_comm_ms"] == pytest.approx(no_comm, rel=0.03)
        woven.append(abs(row["woven_ms"] / tokenweave - 1))
        assert row["cut"] and row["seam_ctas_attention"] in (2, 4, 8) and row["seam_ctas_mlp"] in (2, 4, 8)
    assert mean(woven) <= 0.05 and max(woven) <= 0.08, woven


def weaveinf_plan(tmp_path: Path, *args: str) -> object:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    with pytest.raises(SystemExit) as end:
        main(["plan", str(tmp_path), *args])
    return end.value.code


def test_one_step_is_printed_with_a_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert weaveinf_plan(tmp_path, "--tokens", "16384", "--gpu", "h200", "--json", str(file)) == 0
    assert set(json.loads(file.read_text())) == {
        *("model", "gpu", "tp", "tokens", "plain_ms", "no_comm_ms", "fused_ms", "woven_ms", "cut"),
        *("seam_ctas_attention", "seam_ctas_mlp", "why"),
    }
    said = capsys.readouterr().out
    assert said.startswith("Predicted, not measured")
    blocks, seams = said.splitlines()[-2:]
    assert "A mlp" in blocks and "B mlp" in blocks and "A seam" in seams and "B seam" in seams
    # While one half computes, the seam of the other runs.
    assert blocks.index("A mlp") < blocks.index("B mlp") < len(seams)

    assert weaveinf_plan(tmp_path, "--tokens", "100") == 0
    assert "too small to cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        (["--gpu", "abacus"], "it may be h100, h200"),
        (["--tp", "3"], "num_attention_heads=64 is not divisible by 3 ranks"),
        (["--tp", "1"], "one rank has nothing to weave"),
        (["--tp", "0"], "--tp must be at least 1"),
        (["--tokens", "512", "0"], "--tokens must be at least 1"),
    ],
)
def test_wrong_input_is_named(
    args: list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weaveinf_plan(tmp_path, *args) == 2
    said = capsys.readouterr()
    assert remedy in said.err and len(said.err.splitlines()) == 1 and not said.out


def waves(rows: int, n: int, units: int) -> int:
    return math.ceil(tiles(rows, n) / units)


@pytest.mark.parametrize(
    ("rows", "qkv", "output", "gate_up"),
    [
        (512, 1, 1, 1),
        (640, 1, 2, 2),
        (768, 1, 2, 2),
        (1024, 1, 2, 2),
        (1280, 1, 3, 3),
        (1536, 1, 3, 3),
        (1792, 1, 4, 3),
        (2048, 1, 4, 4),
        (3584, 2, 7, 6),
    ],
)
def test_waves_of_the_70b_model_on_132_units(rows: int, qkv: int, output: int, gate_up: int) -> None:
    assert [waves(rows, n, 132) for n in (1280, 8192, 7168)] == [qkv, output, gate_up]


def test_eight_ctas_break_the_one_wave_of_512_rows_and_four_do_not() -> None:
    assert [waves(512, 8192, 132 - ctas) for ctas in (2, 4, 8)] == [1, 1, 2]
    llama = costs(LLAMA_70B)
    none, four, eight = (llama._mlp(512, 132 - ctas) for ctas in (0, 4, 8))
    assert four < 1.03 * none and eight > 1.05 * four
    assert Planner(llama).plan(1024, 1024**2 / 2, 1024**2 / 8).seam_ctas[1] <= 4


def test_the_split_tax_is_that_of_the_smart_split() -> None:
    llama = costs(LLAMA_70B)
    measured = dict(zip(MLP_ROWS, MLP_US, strict=True)) | {
        rows: whole for rows, (whole, _) in SPLITS.items() if rows > MLP_ROWS[-1]
    }
    own, smart = [], []
    for rows, (whole, halves) in SPLITS.items():

        def predicted(at: int, rows: int = rows) -> float:
            # As they were measured: one after the other, by themselves.
            return llama._mlp(at, 132) + llama._mlp(rows - at, 132)

        legal = [at for at in cuts(rows, llama.row_block) if min(at, rows - at) >= MLP_ROWS[0]]
        at = min(legal, key=predicted)
        took = np.interp([at, rows - at], [*measured], [*measured.values()])
        own.append(took.sum() / whole - 1)
        smart.append(halves / whole - 1)
    assert mean(own) <= mean(smart) + 0.01, (own, smart)


@pytest.mark.parametrize(
    ("ctas", "us"),
    [
        (2, (110.0, 207.8, 403.1, 792.8, 1571.1, 3125.4, 6240.8)),
        (4, (70.8, 128.0, 240.4, 465.9, 913.8, 1797.9, 3558.4)),
        (8, (51.3, 86.6, 155.4, 290.8, 561.7, 1103.0, 2184.0)),
        (0, (45.1, 75.4, 137.1, 258.2, 502.3, 987.3, 1965.6)),
    ],
)
def test_the_fused_kernel_by_rows_and_ctas(ctas: int, us: tuple[float, ...]) -> None:
    llama = costs(LLAMA_70B)
    for i, measured in enumerate(us):
        assert 1e3 * llama.seam(512 << i, ctas) == pytest.approx(measured, rel=0.05)


def test_small_steps_are_bound_by_weights_which_halves_read_twice() -> None:
    for raw, rows in ((LLAMA_70B, 64), (MIXTRAL_8X22B, 64), (MIXTRAL_8X22B, 256)):
        model = costs(raw)
        whole = model.block("mlp", rows, 0, 0)
        assert 2 * model.block("mlp", rows // 2, 0, 0) > 1.8 * whole
        halves = [Half(rows // 2, 100.0)] * 2
        assert predict(model, halves, (2, 2)) > predict(model, [Half(rows, 100.0)], (0, 0))
        assert Planner(model).plan(rows, rows * 100, rows * 50).cut == 0


def test_weight_bytes_are_those_of_the_experts_that_are_hit() -> None:
    mixtral = costs(MIXTRAL_8X22B)
    # Bytes of memory alone: an H200 differs in nothing else.
    fast = costs(MIXTRAL_8X22B, gpu="h200")
    one, many = (mixtral._mlp(rows, 132) - fast._mlp(rows, 132) for rows in (1, 64))
    assert 2.5 < many / one < 5  # two of eight experts, and all of them


def test_the_published_gains_of_other_models_and_of_4_gpus() -> None:
    for raw in (LLAMA_70B, QWEN_72B):
        for tokens in PREFILL:
            assert 1.13 <= gain(costs(raw), tokens) <= 1.30
            assert 1.05 <= gain(costs(raw, tp=4), tokens) <= 1.17
    mixtral = costs(MIXTRAL_8X22B)
    assert gain(mixtral, 1024) == pytest.approx(0.62, abs=0.03)
    assert gain(mixtral, 2048) < 1 < gain(mixtral, 4096)
    assert Planner(mixtral).plan(1024, 1024**2 / 2, 1024**2 / 8).cut == 0


def test_the_published_share_of_communication() -> None:
    for raw, published, within in (
        (QWEN_72B, (22.2, 21.9, 19.1, 17.1, 16.6, 13.4), 2.0),
        (MIXTRAL_8X22B, (15.9, 17.2, 17.6, 16.2, 13.0, 10.8), 5.0),
    ):
        model = costs(raw)
        for i, share in enumerate(published):
            plain, no_comm = model.plain(1024 << i)
            assert 100 * (1 - no_comm / plain) == pytest.approx(share, abs=within)


def test_windows_bound_what_attention_reads() -> None:
    mistral = LLAMA_70B | {"architectures": ["MistralForCausalLM"]}
    full, windowed = costs(mistral | {"sliding_window": None}), costs(mistral | {"sliding_window": 4096})
    assert windowed.block("attention", 8192, 16384, 0) < full.block("attention", 8192, 16384, 0)
    assert windowed.block("attention", 512, 1024, 0) == full.block("attention", 512, 1024, 0)
