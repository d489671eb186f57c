"""What the parts of a step cost on a GPU: matrix products in waves of tiles, attention, seams by CTAs.

A product of T rows by N columns is cut into tiles; all units (SMs) compute a tile each, wave after wave, and
units without a tile in the last wave are partly lost. So a cut in two halves is cheap where both fill their
waves, and a seam that takes units away can cost a wave more (TokenWeave, arXiv 2505.11329, section 4.2).

Two things slow down a whole layer. The host issues operations one by one and may need longer than they do:
two halves are twice as many. And power, which grows with the cube of the clock, bounds what a GPU computes
in the mean: where communication leaves no pauses, the clock sinks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weaveinf.models.config import ModelConfig
from weaveinf.weave.plan import Stage


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: units; dense bfloat16 FLOP/us; bytes/us of memory, and to other GPUs, one way."""

    units: int
    flops: float
    memory: float
    link: float


GPUS = {"h100": Gpu(132, 989.4e6, 3.35e6, 0.45e6), "h200": Gpu(132, 989.4e6, 4.8e6, 0.45e6)}

# Fitted together on what was published of 8 H100 in eager mode: kernels by rows and CTAs (tables K1 to K4),
# an MLP by rows (the split ablation), and a 70B model's prefill of 1K, 4K and 16K tokens, plain, without
# communication and woven. None is of a model or a size. Behind each: of what, and what it hangs on most.
FITTED = {
    "gemm": 0.729,  # data-sheet FLOP/s, matrix products; split ablation
    "idle": 0.254,  # share that is lost of what the last wave leaves unused; split ablation
    "kernel": 0.593,  # data-sheet FLOP/s, attention; prefill of 16K
    "memory": 0.855,  # bandwidth; norms of K1
    "gap_us": 5.23,  # from one kernel to the next; K1, split ablation
    "link": 0.706,  # bandwidth; K1 to K4
    "cta": 6620.0,  # bytes/us that one CTA of a seam sums and normalises; K4
    "beside": 1.42,  # how much slower a seam is under a block; prefill, woven
    "power": 0.472,  # data-sheet FLOP/s that full clock bears in the mean; prefill without communication
    "issue_us": 20.6,  # of the host for one operation; prefill of 1K, woven
    "outside_us": 4530.0,  # of a step, whatever its rows; prefill
    "outside_us_per_row": 2.24,  # prefill
}
_TILE, _GROUPED_TILE = (256, 128), (128, 256)  # rows by columns
_BYTES = 2
# What the host issues, output buffers included: the five kernels of attention; the three of an MLP; routing
# (product, softmax, top-k, scaling), sorting, the two grouped products, activation and sum of a mixture.
_ISSUED_ATTENTION, _ISSUED_MLP, _ISSUED_MIXTURE = 6, 4, 19
_SMALL_KERNELS = 6  # of a mixture's, those that route and sort


class GpuCosts:
    """`Costs` of a model on `tp` GPUs of a kind, by data sheet and the constants above."""

    row_block = 128
    seam_ctas: Sequence[int] = (2, 4, 8)

    def __init__(self, config: ModelConfig, tp: int, gpu: Gpu) -> None:
        if config.latents is not None:
            raise ValueError(f"what the latent attention of {config.architecture} costs is not modelled")
        self.num_layers = config.num_layers
        self._gpu, self._tp = gpu, tp
        self._hidden = config.hidden_size
        self._q = config.num_heads * config.head_dim // tp
        self._qkv = self._q + 2 * max(config.num_kv_heads // tp, 1) * config.head_dim
        self._inner = config.intermediate_size // tp
        self._windows = [window or math.inf for window in config.windows]
        self._experts = config.experts
        self._mixtures, self._chosen_inner = 0.0, 0  # share of the layers; of all chosen experts together
        if config.experts is not None:
            self._mixtures = sum(config.experts.layers) / config.num_layers
            self._chosen_inner = config.experts.top_k * config.experts.intermediate_size // tp

    # Costs

    def block(self, stage: Stage, rows: int, context: float, seam_ctas: int) -> float:
        """See `Costs.block`. With no seam beside it, pauses follow; woven, there are none."""
        units = self._gpu.units - seam_ctas
        if stage == "embedding":
            return self._moves(2 * rows * self._hidden) / 1e3
        attention, mlp = self._attention(rows, context, units), self._mlp(rows, units)
        if seam_ctas:
            seams, pauses = 0.0, self.outside(2 * rows) / 2
        else:
            seams, pauses = 2e3 * self.seam(rows, 0), self.outside(rows)
        slow = self._slow(rows, context, attention + mlp, seams, 1e3 * pauses / self.num_layers, 2)
        return (attention if stage == "attention" else mlp) * slow / 1e3

    def seam(self, rows: int, seam_ctas: int) -> float:
        """See `Costs.seam`: a kernel and two barriers, each as long as its launch, and the link, or the
        CTAs if there are too few; these have one direction of the link to wait for, all the same."""
        own = rows * self._hidden * _BYTES
        link = own * (1 + 1 / self._tp) / (FITTED["link"] * self._gpu.link)
        few = link / 2 + own / self._tp / (FITTED["cta"] * seam_ctas) if seam_ctas else 0.0
        return (3 * FITTED["gap_us"] + max(link, few)) / 1e3

    def outside(self, rows: int, halves: int = 1) -> float:
        """See `Costs.outside`."""
        return (FITTED["outside_us"] + FITTED["outside_us_per_row"] * rows) / 1e3

    def beside(self, rows: int, seam_ctas: int) -> tuple[float, float]:
        """See `Costs.beside`."""
        return 1.0, FITTED["beside"]

    def plain(self, rows: int) -> tuple[float, float]:
        """ms of a prompt of `rows` tokens with an all-reduce and then a norm at every joint, the state of
        the art without a fused seam; and of the same with the communication left out."""
        blocks = self._attention(rows, rows / 2, self._gpu.units) + self._mlp(rows, self._gpu.units)
        norm = self._moves(4 * rows * self._hidden)
        outside = 1e3 * self.outside(rows)

        def step(joint: float, issued: int) -> float:
            pauses = outside / self.num_layers
            layer = blocks * self._slow(rows, rows / 2, blocks, 2 * joint, pauses, issued) + 2 * joint
            return (outside + self.num_layers * layer + joint) / 1e3

        return step(1e3 * self.seam(rows, 0) + norm, 4), step(norm, 2)

    # Parts of a layer, in us

    def _slow(
        self, rows: int, context: float, blocks: float, joints: float, pauses: float, issued: int
    ) -> float:
        """How many times longer a layer's blocks take than alone, between joints in which the host issues
        `issued` operations."""
        products = self._hidden * (self._qkv + self._q + 3 * self._mean(self._inner, self._chosen_inner))
        flops = 2 * rows * (products + 2 * self._read(context) * self._q)
        power = flops / (blocks + joints + pauses) / (FITTED["power"] * self._gpu.flops)
        operations = issued + _ISSUED_ATTENTION + self._mean(_ISSUED_MLP, _ISSUED_MIXTURE)
        return max(1.0, power ** (1 / 3), (FITTED["issue_us"] * operations - joints) / blocks)

    def _mean(self, mlp: float, mixture: float) -> float:
        """Over the layers, of which some have an MLP and others a mixture."""
        return mlp + self._mixtures * (mixture - mlp)

    def _read(self, context: float) -> float:
        """Cached tokens that a row reads, in the mean over the layers' windows."""
        return sum(min(context, window) for window in self._windows) / len(self._windows)

    def _attention(self, rows: int, context: float, units: int) -> float:
        rate = FITTED["kernel"] * self._gpu.flops * units / self._gpu.units
        return (
            self._product(rows, self._qkv, self._hidden, units)
            + self._moves(2 * rows * self._qkv)
            + FITTED["gap_us"]
            + 4 * rows * self._read(context) * self._q / rate
            + self._product(rows, self._hidden, self._q, units)
        )

    def _mlp(self, rows: int, units: int) -> float:
        dense = self._gated(rows, self._inner, units, 0.0)
        if self._experts is None:
            return dense
        count, top_k = self._experts.count, self._experts.top_k
        hit = count * (1 - (1 - top_k / count) ** rows)  # experts that have rows at all
        mixture = (
            self._product(rows, count, self._hidden, units)
            + _SMALL_KERNELS * FITTED["gap_us"]
            + self._gated(rows * top_k, self._chosen_inner // top_k, units, hit)
            + self._moves((top_k + 1) * rows * self._hidden)
        )
        return self._mean(dense, mixture)

    def _gated(self, rows: int, inner: int, units: int, experts: float) -> float:
        return (
            self._product(rows, 2 * inner, self._hidden, units, experts)
            + self._moves(3 * rows * inner)
            + self._product(rows, self._hidden, inner, units, experts)
        )

    def _product(self, rows: int, n: int, k: int, units: int, experts: float = 0.0) -> float:
        """[rows, k] by [k, n]; at least what reading the weights takes.

        experts: among which the rows are shared, each with weights of its own. A grouped product gathers
        and scatters rows one by one, which hides under nothing, and fills half a tile less of each.
        """
        rate = FITTED["gemm"] * self._gpu.flops / self._gpu.units
        memory = FITTED["memory"] * self._gpu.memory
        height, width = _GROUPED_TILE if experts else _TILE
        height = min(height, 16 * math.ceil(rows / max(experts, 1) / 16))
        filled = tiles(max(rows + experts * height / 2, experts * height), n, (height, width)) / units
        full = filled + FITTED["idle"] * (math.ceil(filled) - filled)
        read = max(experts, 1) * n * k * _BYTES / memory
        scattered = rows * (n + k) * _BYTES / memory if experts else 0.0
        return FITTED["gap_us"] + max(full * 2 * height * width * k / rate, read) + scattered

    def _moves(self, elements: float) -> float:
        """A kernel that moves elements through memory."""
        return FITTED["gap_us"] + elements * _BYTES / (FITTED["memory"] * self._gpu.memory)


def tiles(rows: float, n: int, tile: tuple[int, int] = _TILE) -> int:
    """Of a product of `rows` by n."""
    return math.ceil(rows / tile[0]) * math.ceil(n / tile[1])
