"""What the status page shows."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

import numpy as np

from weaveinf.server.async_engine import AsyncEngine
from weaveinf.weave.timeline import hidden_seams


@cache
def page() -> tuple[str, int, dict[str, str]]:
    """The page, its status, and its headers: it may run its own script only, and ask this server only."""
    text = (files("weaveinf") / "assets" / "status.html").read_text()
    policy = "default-src 'none'; connect-src 'self'; form-action 'none'; frame-ancestors 'none'"
    for tag, inside in re.findall(r"<(script|style)>(.*?)</\1>", text, re.DOTALL):
        policy += f"; {tag}-src 'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'"
    return text, 200, {"Content-Security-Policy": policy}


def status(at: AsyncEngine, model: str) -> dict[str, Any]:
    """Load, totals, latencies (ms: median, 90th and 99th percentile of the latest), and the latest recorded
    step (`timeline`: spans of rank 0 in ms from its beginning)."""
    found: dict[str, Any] = {"model": model, "state": at.state, "restarts": at.num_restarts}
    recent = {name: [*values] for name, values in at.metrics.recent.items()}
    found["latency_ms"] = {
        name: (1e3 * np.percentile(values, (50, 90, 99))).round(2).tolist() if values else None
        for name, values in recent.items()
    }
    seams, under = hidden_seams(at.timeline)
    found["seams_ms"], found["hidden_ms"] = seams * 1e3, under * 1e3
    start = min((span.start for span in at.timeline), default=0.0)
    found["timeline"] = [
        {
            "half": span.half,
            "kind": span.kind,
            "name": f"{span.name} {span.layer}" if span.layer >= 0 else span.name,
            "start": round((span.start - start) * 1e3, 3),
            "end": round((span.end - start) * 1e3, 3),
        }
        for span in at.timeline
    ]
    if (engine := at.at_work) is None:
        return found
    scheduler, blocks, worker = engine.scheduler, engine.scheduler.blocks, engine.executor.worker
    return found | {
        "tp": worker.ranks.size,
        "seam": worker.seam.name,
        "selector": engine.trace.selector,
        "running": scheduler.num_running,
        "waiting": scheduler.num_waiting,
        "kv_usage": round(1 - blocks.num_free / blocks.num_blocks, 4),
        "steps": dict(engine.trace.steps),
        "tokens": at.metrics.num_tokens,
    }
