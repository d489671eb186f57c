"""What is recorded is what ran, and a trace of it can be read and seen."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.models.harness import Lockstep, make_checkpoint
from tests.weave.test_run import asks_twice, nine_rows
from weaveinf.comm.local import LocalSeam
from weaveinf.comm.ranks import Ranks
from weaveinf.comm.seam import Joint, Seam
from weaveinf.weave import timeline
from weaveinf.weave.run import run
from weaveinf.weave.timeline import Recorder, Span


@pytest.fixture
def recorded(tmp_path: Path) -> Recorder:
    make_checkpoint(tmp_path, "llama")
    ranks = Lockstep(tmp_path)
    alone = Ranks.single(torch.device("cpu"))
    seams: list[Seam] = [LocalSeam(32, ranks.config.hidden_size, ranks.dtype, alone.device) for _ in range(2)]
    recorder = Recorder(torch.device("cpu"))
    recorder.begin(7)
    with torch.inference_mode():
        halves = ranks.batch([(0, list(range(1, 20)), 1)]).split(8)
        run(recorder.chain(ranks.models[0].chain), halves, recorder.seams(seams), alone.votes)
    return recorder


def test_every_block_and_seam_of_either_half_is_there_in_order(recorded: Recorder) -> None:
    (spans,) = recorded.steps
    places = [("embedding", -1)] + [(name, layer) for layer in range(3) for name in ("attention", "mlp")]
    for half in range(2):
        for kind in ("block", "seam", "wait"):
            own = [span for span in spans if span.half == half and span.kind == kind]
            assert [(span.name, span.layer) for span in own] == places
            assert all(a.end <= b.start for a, b in pairwise(own))
    assert all(span.step == 7 and span.start <= span.end for span in spans)


def test_a_block_that_votes_is_a_span_for_each_part(tmp_path: Path) -> None:
    alone, joint = Ranks.single(torch.device("cpu")), Joint(torch.ones(8), 1e-5)
    seams: list[Seam] = [LocalSeam(9, 8, torch.float32, alone.device) for _ in range(2)]
    recorder = Recorder(torch.device("cpu"))
    recorder.begin(0)
    chain = recorder.chain([(asks_twice([], first), joint) for first in (True, False, False)])
    run(chain, nine_rows().split(4), recorder.seams(seams), alone.votes)
    blocks = [span for span in recorder.steps[0] if span.kind == "block"]
    places = [("embedding", -1), ("attention", 0), ("mlp", 0)]
    expected = [(half, *place) for place in places for _ in range(3) for half in (0, 1)]
    assert [(span.half, span.name, span.layer) for span in blocks] == expected
    waits = [(span.half, span.name) for span in recorder.steps[0] if span.kind == "wait"]
    assert waits == [(half, name) for name, _ in places for half in (0, 1)]


def test_the_summary_says_how_much_was_hidden() -> None:
    spans = [
        Span(0, 0, "block", "mlp", 0, 0.0, 0.010),
        Span(0, 0, "seam", "mlp", 0, 0.010, 0.020),
        Span(0, 1, "block", "mlp", 0, 0.011, 0.019),
        Span(0, 0, "wait", "mlp", 0, 0.019, 0.020),
    ]
    assert timeline.summary(spans) == "blocks 18.0 ms, seams 10.0 ms, 80% of them hidden, waits 1.0 ms"


def test_a_trace_and_its_picture(recorded: Recorder, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    spans = timeline.collect(recorded, Ranks.single(torch.device("cpu")))
    assert "trace.png" in timeline.write(tmp_path / "trace.json", {0: spans[0], 1: spans[0]})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    drawn = [event for event in events if event["ph"] == "X"]
    assert len(drawn) == 2 * len(spans[0]) and all(event["dur"] >= 0 for event in drawn)
    assert {event["name"] for event in drawn} >= {"attention 2", "seam after mlp 1", "wait after embedding"}
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
