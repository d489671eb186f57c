"""Times the bfloat16 product of csrc/cpu/gemm.cpp beside oneDNN's with a weight reordered once, on one core.

    .venv/bin/python bench/linear.py

The shapes are those of one of two ranks of bench/make_model.py's model, and each has weights enough that the
caches do not hold them, as in a model. Microseconds of the fastest of some rounds, and how many times longer
oneDNN takes.
"""

from __future__ import annotations

from functools import partial

import torch
from machine import describe, fastest

from weaveinf.ops import native
from weaveinf.ops.linear import Product, _onednn, _panels, panels_product

SHAPES = {
    "qkv": (768, 1024),
    "o": (1024, 512),
    "gate_up": (2816, 1024),
    "down": (1024, 1408),
    "head": (16000, 1024),
}
ROWS = (1, 8, 32, 128, 1024)
ROUNDS = 9
COLD_BYTES = 64 << 20


def row(name: str, n: int, k: int) -> str:
    """A line of the table: all counts of rows of one shape."""
    assert native.lib is not None
    weights = [torch.randn(n, k).bfloat16() for _ in range(-(-COLD_BYTES // (2 * n * k)))]
    own = [panels_product(_panels(w, native.lib), n, k, w.dtype) for w in weights]
    onednn = [_onednn(w) for w in weights]
    cells = []
    for rows in ROWS:
        x, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n, dtype=torch.bfloat16)

        def all_of(products: list[Product], x: torch.Tensor, out: torch.Tensor) -> None:
            for product in products:
                product(x, None, out)

        took = [fastest(partial(all_of, ps, x, out), ROUNDS) / len(ps) * 1e6 for ps in (own, onednn)]
        cells.append(f"{took[0]:.0f} / {took[1]:.0f} ({took[1] / took[0]:.2f}x)")
    return f"| {name} [{n}, {k}] | " + " | ".join(cells) + " |"


def main() -> None:
    if native.lib is None:
        raise SystemExit(f"there is nothing to time: {native.reason}")
    machine = describe()
    torch.set_num_threads(1)
    print("| us: own / oneDNN | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("| --- |" + " --- |" * len(ROWS))
    for name, (n, k) in SHAPES.items():
        print(row(name, n, k), flush=True)
    said = "; ".join(f"{key}: {value}" for key, value in machine.items())
    print(f"\nMachine: {said}; torch {torch.__version__}; kernels {native.isa}")


if __name__ == "__main__":
    main()
