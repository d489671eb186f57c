"""One page table, many pools: whoever stores something per token or per page declares it here."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from weaveinf.ops import large


@dataclass(frozen=True)
class PoolSpec:
    """What is stored, for every token or page of the cache, in each of `layers` layers.

    Attributes:
        name: how the owner finds it again.
        shape: per token (or per page).
        per: whether `shape` is per "token" or per "page".
        host: the layers whose part lies in the host's memory; that of the others lies on the device.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: int
    per: Literal["token", "page"] = "token"
    host: range = range(0)

    def bytes_per_page(self, page_size: int) -> int:
        """Of one layer."""
        return (page_size if self.per == "token" else 1) * prod(self.shape) * self.dtype.itemsize


class Pools:
    """Storage of all pools for `num_pages` pages; one block table addresses them all.

    `pools["key"][layer]` is `[num_pages, page_size, *shape]`, or `[num_pages, *shape]` per page.
    scattered: single tokens will be read here and there.
    """

    def __init__(
        self,
        specs: Sequence[PoolSpec],
        num_pages: int,
        page_size: int,
        device: torch.device,
        scattered: bool = False,
    ) -> None:
        self.specs = tuple(specs)
        self.num_pages = num_pages
        self.page_size = page_size
        self._pools: dict[str, list[Tensor]] = {}
        for spec in self.specs:
            per_page = (page_size, *spec.shape) if spec.per == "token" else spec.shape
            self._pools[spec.name] = [
                _zeros((num_pages, *per_page), spec.dtype, device, scattered, layer in spec.host)
                for layer in range(spec.layers)
            ]

    def occupy(self) -> None:
        """Takes all memory now, before anything is stored; else the system gives it bit by bit, in steps."""
        for layer in (layer for layers in self._pools.values() for layer in layers):
            layer.zero_()

    def __getitem__(self, name: str) -> list[Tensor]:
        return self._pools[name]


def _zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scattered: bool, host: bool
) -> Tensor:
    if device.type != "cpu" and not host:
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = prod(shape) * dtype.itemsize
    if scattered and nbytes >= large.PAGE:
        memory = large.memory(nbytes)
    else:  # calloc: the system gives memory to a page of the cache when it is first written
        memory = torch.from_numpy(np.zeros(nbytes, np.uint8))
    if device.type != "cpu":
        memory = torch.as_tensor(_Pinned(memory), device=device)
    return memory.view(dtype).view(shape)


class _Pinned:
    """The host's memory (uint8 [n]) as a GPU's (CUDA array interface, version 3): kernels read and write it
    by its own address, over the bus. Never run so far."""

    def __init__(self, memory: Tensor) -> None:
        # torch's own pinned memory would be rounded up to a power of two.
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
        self.memory = memory
        where = {"data": (memory.data_ptr(), False), "shape": tuple(memory.shape), "typestr": "|u1"}
        self.__cuda_array_interface__ = where | {"version": 3}


def bytes_per_page(specs: Sequence[PoolSpec], page_size: int) -> tuple[int, int]:
    """Bytes that one page costs this rank over all pools and layers: on the device, and on the host."""
    host = sum(len(spec.host) * spec.bytes_per_page(page_size) for spec in specs)
    return sum(spec.layers * spec.bytes_per_page(page_size) for spec in specs) - host, host
