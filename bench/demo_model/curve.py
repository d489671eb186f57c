"""Draws the loss curve of a training run as an SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 400, 60, 50


def draw(log: Sequence[Sequence[Any]]) -> str:
    """`log`: rows whose first, fifth and sixth columns are step, train loss and held-out loss."""
    steps = max(row[0] for row in log)
    top = max(max(row[4], row[5]) for row in log)
    low = min(min(row[4], row[5]) for row in log) - 0.1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * step / steps

    def y(loss: float) -> float:
        return 20 + (HEIGHT - BOTTOM - 20) * (top - loss) / (top - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in range(int(low) + 1, int(top) + 1):
        parts.append(
            f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - 20}" stroke="#ddd"/>'
            f'<text x="{LEFT - 10}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>'
        )
    for tick in range(5):
        step = steps * tick // 4
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>')
    for column, colour in ((4, "#1f5fbf"), (5, "#c2410c")):
        points = " ".join(f"{x(row[0]):.1f},{y(row[column]):.1f}" for row in log)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    parts.append(
        f'<text x="{WIDTH - 160}" y="40" fill="#1f5fbf">train loss</text>'
        f'<text x="{WIDTH - 160}" y="60" fill="#c2410c">held-out loss</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 10}">steps of 2048 tokens; loss in nats a token</text></svg>'
    )
    return "\n".join(parts) + "\n"
