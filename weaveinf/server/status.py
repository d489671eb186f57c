"""What the status page shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from weaveinf.server.async_engine import AsyncEngine
from weaveinf.weave.timeline import hidden_seams


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
