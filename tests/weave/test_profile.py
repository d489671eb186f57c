"""A profile finds what steps cost, is kept on disk, and is dropped when it does not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from weaveinf.weave import plan, profile
from weaveinf.weave.plan import Half, Planner, play
from weaveinf.weave.profile import Profile
from weaveinf.weave.timeline import Span

TRUE = Profile(
    num_layers=4,
    rows=(8, 32, 128, 256, 512),
    embedding=(0.1, 0.1, 0.2, 0.4, 0.8),
    attention=(1.0, 2.0, 6.0, 12.0, 24.0),
    mlp=(2.0, 4.0, 14.0, 28.0, 56.0),
    seams=((0.5, 1.0, 4.0, 8.0, 16.0), (0.6, 1.4, 5.0, 10.0, 20.0)),
    per_work=2e-5,
    block_beside=((1.8, 1.6, 1.4, 1.2, 1.2), (1.4, 1.3, 1.2, 1.1, 1.05)),
    seam_beside=((2.0, 1.9, 1.8, 1.6, 1.5), (2.0, 1.9, 1.8, 1.5, 1.4)),
    outside_whole=(0.0,) * 5,
    outside_woven=(0.0,) * 5,
    seam_ctas=(0, 4),
)


def played(halves: list[Half], seam_ctas: int) -> list[plan.Span]:
    """As weave.plan.play, where seams of whole steps may be given CTAs too."""
    if len(halves) == 2:
        return play(TRUE, halves, (seam_ctas, seam_ctas), TRUE.num_layers)
    return play(replace(TRUE, seams=[TRUE.seams[TRUE.seam_ctas.index(seam_ctas)]] * 2), halves, (0, 0), 4)


def as_played(rows: int, context: int, cut: int, seam_ctas: int) -> list[Span]:
    """A step that takes exactly what TRUE says."""
    halves = [Half(rows, context + rows / 2)]
    if cut:
        halves = [Half(cut, cut / 2), Half(rows - cut, (cut + rows) / 2)]
    spans = []
    counts = {h: {"block": -1, "seam": -1} for h in range(2)}
    for span in played(halves, seam_ctas):
        kind = "seam" if span.what == "seam" else "block"
        counts[span.half][kind] += 1
        at = counts[span.half][kind]
        name = "embedding" if at == 0 else ("attention", "mlp")[(at - 1) % 2]
        layer = (at - 1) // 2 if at else -1
        spans.append(Span(0, span.half, kind, name, layer, span.start / 1e3, span.end / 1e3))
    return spans


def test_measuring_finds_the_costs() -> None:
    found = profile.measure(as_played, 4, most_rows=512, most_tokens=2048, seam_ctas=(0, 4))
    assert found.rows == TRUE.rows and found.seam_ctas == TRUE.seam_ctas
    for name in ("embedding", "attention", "mlp"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert list(found.seams) == [pytest.approx(line, rel=1e-6) for line in TRUE.seams]
    assert found.per_work == pytest.approx(TRUE.per_work, rel=1e-6)
    # At 8 and 32 rows the halves' own times are not straight between those that were measured.
    for i in range(2):
        assert found.block_beside[i][2:] == pytest.approx(TRUE.block_beside[i][2:], abs=0.1)
        assert found.seam_beside[i][2:] == pytest.approx(TRUE.seam_beside[i][2:], abs=0.15)
    chosen = Planner(found).plan(512, 512 * 256.5, 512 * 64.0)
    # The seams with few CTAs end under the blocks all the same, and slow them down less.
    assert chosen.cut and chosen.woven_ms < chosen.whole_ms and chosen.seam_ctas == (4, 4)


def test_costs_between_and_beyond_what_was_measured() -> None:
    assert TRUE.seam(20, 0) == pytest.approx(0.75)
    assert TRUE.seam(1024, 0) == pytest.approx(32.0) and TRUE.seam(20, 4) == pytest.approx(1.0)
    assert TRUE.beside(384, 4) == (pytest.approx(1.075), pytest.approx(1.45))
    assert TRUE.block("attention", 128, 100.0, 0) == pytest.approx(6.0 + 2e-5 * 128 * 100)


def test_a_kept_profile_is_used_while_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = {"model": "m", "tp": 2}
    with caplog.at_level(logging.WARNING):
        assert profile.load(key, 4.0) is None and not caplog.records  # none yet: nothing to warn of
        profile.save(key, TRUE, 4.0)
        kept = profile.load(key, 4.4)
        assert kept is not None and kept.seam(20, 0) == TRUE.seam(20, 0) and not caplog.records
        assert profile.load({"model": "other", "tp": 2}, 4.0) is None and not caplog.records
        assert profile.load(key, 9.0) is None  # the network is another one
        assert "measured anew" in caplog.text
        (file,) = (tmp_path / "weaveinf" / "profiles").iterdir()
        for spoilt in (
            "{",
            '{"key": {}, "profile": {}}',
            '{"profile": 3}',
            file.read_text().replace("mlp", "lpm"),
            file.read_text().replace("16.0", "16.0, 17.0"),
            file.read_text().replace('"seam_ctas": [', '"seam_ctas": [2, '),
        ):
            caplog.clear()
            file.write_text(spoilt)
            assert profile.load(key, 4.0) is None
            assert "measured anew" in caplog.text
