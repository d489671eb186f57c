"""What the parts of a step cost on a GPU: matrix products in waves of tiles, attention, seams by CTAs.

A product of T rows by N columns is cut into tiles; all units (SMs) compute a tile each, wave after wave, and
the last wave costs as much as a full one. So a cut in two halves is cheap where both fill their waves, and a
seam that takes units away can cost a whole wave more (TokenWeave, arXiv 2505.11329, section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from weaveinf.models.config import ModelConfig
from weaveinf.weave.plan import Stage


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures of one GPU: units; dense bfloat16 FLOP/us; bytes/us of memory, and to its peers."""

    units: int
    flops: float
    memory: float
    link: float


GPUS = {
    "h100": Gpu(132, 989.4e6, 3.35e6, 0.45e6),
    "h200": Gpu(132, 989.4e6, 4.8e6, 0.45e6),
}

FITTED = {
    "gemm": 0.774,  # of the data sheet's FLOP/s that a tile gets
    "kernel_us": 6.0,  # from one kernel to the next
    "elementwise": 0.43,  # of memory bandwidth: rotation, cache writes, activation
    "attention": 0.561,  # of FLOP/s
    "norm": 0.91,  # of memory bandwidth
    "seam_us": 15.0,  # of a collective, however small
    "link": 0.69,  # of the link's bandwidth
    "cta": 6300.0,  # bytes/us that one CTA reduces, normalises and spreads
    "outside_us": 4000.0,  # of a step, whatever its rows
    "outside_us_per_row": 1.1,
    "issue_us": 21.0,
    "beside": 1.25,  # how much slower a seam is under a block
    "throttle": 0.0, "slow": 1.0,
}
_TILES = ((128, 256), (128, 128))
_BYTES = 2


class GpuCosts:
    """`Costs` of a model on `tp` GPUs of a kind, by data sheet and the constants above."""

    row_block = 128
    seam_ctas = (2, 4, 8)

    def __init__(self, config: ModelConfig, tp: int, gpu: Gpu) -> None:
        self.num_layers = config.num_layers
        self._gpu, self._tp = gpu, tp
        self._hidden = config.hidden_size
        self._q = config.num_heads * config.head_dim // tp
        self._kv = max(config.num_kv_heads // tp, 1) * config.head_dim
        self._inner = config.intermediate_size // tp
        self._experts = config.experts
        if config.experts is not None:
            self._inner = config.experts.intermediate_size // tp

    def block(self, stage: Stage, rows: int, context: float, seam_ctas: int) -> float:
        """See `Costs.block`."""
        us = self._block(stage, rows, context, self._gpu.units - seam_ctas)
        if stage == "embedding": return us/1e3
        layer = sum(self._block(s, rows, context, self._gpu.units - seam_ctas) for s in ("attention", "mlp"))
        pause = 0 if seam_ctas else 2*self.seam(rows,0)*1e3
        return us * max(1.0, (self._issue(2)-pause)/layer)/1e3

    def _issue(self, joint):
        return FITTED["issue_us"]*(6+joint+(19 if self._experts else 4))

    def _block(self, stage: Stage, rows: int, context: float, units: int) -> float:
        if stage == "embedding":
            return self._moves(2 * rows * self._hidden, "elementwise")
        if stage == "mlp":
            return self._mlp(rows, units)
        flops = 4 * rows * context * self._q
        attention = FITTED["kernel_us"] + flops / (FITTED["attention"] * self._gpu.flops * units / self._gpu.units)
        us = self._product(rows, self._q + 2 * self._kv, self._hidden, units)
        us += self._moves(2 * rows * (self._q + 2 * self._kv), "elementwise") + attention
        return us + self._product(rows, self._hidden, self._q, units)

    def seam(self, rows: int, seam_ctas: int) -> float:
        """See `Costs.seam`. What CTAs can move and what the link can, whichever is less."""
        own = rows * self._hidden * _BYTES
        link = own * (1 + 1 / self._tp) / (FITTED["link"] * self._gpu.link)
        cta = link/2 + own / self._tp / (FITTED["cta"] * seam_ctas) if seam_ctas else 0.0
        return (FITTED["seam_us"] + max(link, cta)) / 1e3

    def outside(self, rows: int) -> float:
        """See `Costs.outside`."""
        return (FITTED["outside_us"] + FITTED["outside_us_per_row"] * rows) / 1e3

    def beside(self, rows: int) -> tuple[float, float]:
        """See `Costs.beside`."""
        return FITTED["slow"], FITTED["beside"]

    def plain(self, rows: int) -> tuple[float, float]:
        layer = self._layer(rows)
        norm = self._moves(4 * rows * self._hidden, "norm")
        reduce = 1e3*self.seam(rows, 0)
        L=self.num_layers
        hot=FITTED["throttle"]*layer
        return (
            self.outside(rows) + (L*max(layer+2*norm+2*reduce, self._issue(4))+norm+reduce)/1e3,
            self.outside(rows) + (L*max(layer+hot+2*norm, self._issue(2))+norm)/1e3,
        )

    def _layer(self, rows: int) -> float:
        return sum(self._block(stage, rows, rows / 2, self._gpu.units) for stage in ("attention", "mlp"))

    def _joints(self) -> int:
        return 2 * self.num_layers + 1

    def _mlp(self, rows: int, units: int) -> float:
        n, k, moved = self._inner, self._hidden, 3 * rows * self._inner
        if self._experts is None:
            us = self._product(rows, 2 * n, k, units) + self._product(rows, k, n, units)
            return us + self._moves(moved, "elementwise")
        count, chosen = self._experts.count, self._experts.top_k
        us = self._product(rows, 2 * n, k, units, grouped=True) + self._product(rows, k, n, units, grouped=True)
        us += self._product(rows, count, k, units) + self._moves(moved * chosen, "elementwise")
        us += self._moves((chosen+1)*rows*k,"elementwise")
        return us + 6*FITTED["kernel_us"]

    def _product(self, rows: float, n: int, k: int, units: int, grouped=False) -> float:
        rate = FITTED["attention" if grouped else "gemm"] * self._gpu.flops / self._gpu.units
        hit=1
        if grouped:
            e=self._experts
            hit = e.count * (1 - (1 - e.top_k / e.count) ** rows)
            each=rows*e.top_k/hit
        def tall(m):
            return hit*max(1,each/m+.5) if grouped else math.ceil(rows/m)
        waves = [
            math.ceil(tall(m) * math.ceil(n / w) / units) * 2 * m * w * k / rate
            for m, w in (_TILES if not grouped else _TILES+((64,256),))
        ]
        read = hit * n * k * _BYTES / (FITTED["norm"] * self._gpu.memory)
        return FITTED["kernel_us"] + max(min(waves), read)

    def _moves(self, elements: float, kind: str) -> float:
        """us to move elements through memory in one kernel."""
        return FITTED["kernel_us"] + elements * _BYTES / (FITTED[kind] * self._gpu.memory)
