"""Ranks above 0 as Ray actors: Ray places them and tells of their ends, and carries no step and no tensor."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any, NamedTuple

import ray
import torch.distributed as dist
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.ray_constants import LOG_PREFIX_ACTOR_NAME
from ray.exceptions import RayError
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from weaveinf.cluster.rank import LOADING_S, follow
from weaveinf.cluster.spawn import say
from weaveinf.comm.errors import RankDied
from weaveinf.config import EngineConfig

log = logging.getLogger("weaveinf")

PLACING_S = 300.0
"""Ray must have placed all actors within this time; a cluster that grows by need takes minutes."""
PASSED_ON = ("GLOO_", "HF_", "NCCL_", "TORCH_")
"""Variables of rank 0's environment that the actors get, where their nodes have none of their own."""


class Seat(NamedTuple):
    """Where Ray put a process.

    card: the GPU that it was given. guarded: whether Ray asks for a token there.
    """

    node: str
    address: str
    card: str | None
    guarded: bool

    @classmethod
    def mine(cls) -> Seat:
        node, card = ray.get_runtime_context().get_node_id(), next(map(str, ray.get_gpu_ids()), None)
        return cls(node, ray.util.get_node_ip_address(), card, is_token_auth_enabled())

    @property
    def place(self) -> int | None:
        """Of the card, among those that this process sees."""
        if self.card is None:
            return None
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        return seen.split(",").index(self.card) if seen else int(self.card)


def connect() -> str:
    """Joins the Ray cluster of this machine or of RAY_ADDRESS, or starts one; this node's address in it."""
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    if ray.util.client.ray.is_connected():
        raise ValueError("rank 0 must run on a node of the Ray cluster; a ray:// address leaves it outside")
    return str(ray.util.get_node_ip_address())


def share(device: str) -> dict[str, float]:
    """What a rank takes of its node; with "auto", GPUs where the cluster has some."""
    if device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU")):
        return {"GPU": 1.0}
    return {"CPU": 1.0}


def see_all_cards() -> None:
    """Undoes that Ray shows an actor its own GPU only: ranks of a host reach into each other's."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def settle(answers: list[ray.ObjectRef], wanted: str) -> list[Any]:
    """Waits for the first answers of actors that Ray has yet to place.

    TimeoutError after PLACING_S, with what each node has; RankDied when one cannot start.
    """
    began, pause = time.monotonic(), 5.0
    while ray.wait(answers, num_returns=len(answers), timeout=min(pause, PLACING_S))[1]:
        waited = time.monotonic() - began
        if waited >= PLACING_S:
            raise TimeoutError(
                f"Ray found no place for {wanted} within {waited:.0f} s; free are {_free()}. "
                "Use fewer ranks, add nodes, or end what holds them (ray status)"
            )
        say(f"weaveinf: waiting for Ray to place {wanted}; free: {_free()}")
        pause = min(2 * pause, PLACING_S - waited)
    try:
        return list(ray.get(answers))
    except RayError as error:
        raise RankDied(None, f"its actor did not start: {_last_line(error)}") from None


def _free() -> str:
    free = ray._private.state.available_resources_per_node()
    nodes = [(node, free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
    return "; ".join(
        f"{has.get('CPU', 0):g} of {node['Resources'].get('CPU', 0):g} CPU and {has.get('GPU', 0):g} of "
        f"{node['Resources'].get('GPU', 0):g} GPU on {node['NodeManagerAddress']}"
        for node, has in nodes
    )


def _last_line(error: RayError) -> str:
    return str(error).strip().splitlines()[-1].split(". ")[0]


class Actors:
    """Ranks 1 to the last, each an actor with a bundle of one placement group, in which rank 0 has the first.

    Inside a placement group, as a replica of Ray Serve is, its other bundles are taken; a group of its own
    is given back at the end. The actors go, too, when rank 0's process ends.

    Raises: what `settle` raises.
    """

    def __init__(self, config: EngineConfig, host: str, port: int) -> None:
        size, kind = config.tensor_parallel_size, config.torch_device.type
        self.ranks = range(1, size)
        self._given = {"config": {**config.to_dict(), "device": kind}, "host": host, "port": port}
        self._runs: dict[int, ray.ObjectRef] = {}
        self._own = None
        here, take = Seat.mine(), share(kind)
        group = get_current_placement_group()
        # Only Ray knows which GPU is rank 0's, and tells an actor in its bundle.
        first = int(kind == "cpu" or group is not None)
        if group is None:
            labels = [{"ray.io/node-id": here.node}] + [{}] * (size - 1)
            strategy = config.placement.upper()
            group = self._own = placement_group([take] * size, strategy, bundle_label_selector=labels)
        actor: Any = ray.remote(_Actor)
        self._actors = {
            bundle: actor.options(
                num_cpus=take.get("CPU", 0),
                num_gpus=take.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle if self._own else -1),
            ).remote()
            for bundle in range(first, size)
        }
        try:
            answers = [actor.seat.remote() for actor in self._actors.values()]
            seats = dict(zip(self._actors, settle(answers, f"{size} ranks of {take} each"), strict=True))
        except BaseException:
            self.signal(signal.SIGTERM)
            raise
        self.card = seats.get(0, here).place
        # Ranks of a node are neighbours, and those of rank 0's node the first.
        order = sorted(range(1, size), key=lambda b: (seats[b].node != here.node, seats[b].node, b))
        self._places = {rank: (self._actors[bundle], seats[bundle]) for rank, bundle in enumerate(order, 1)}
        if open_nodes := {seat.address for seat in [here, *seats.values()] if not seat.guarded}:
            log.warning(
                "Ray asks for no token on %s, so whoever reaches its ports can run code there; start every "
                "node with RAY_AUTH_MODE=token and the same ~/.ray/auth_token",
                ", ".join(sorted(open_nodes)),
            )

    def start(self) -> None:
        """Has them follow rank 0; each call lasts as long as its rank."""
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        for rank, (actor, _) in self._places.items():
            self._runs[rank] = actor.run.remote(rank, len(self._places) + 1, environment, **self._given)

    def ended(self, rank: int) -> bool:
        """Whether the rank was started and has ended."""
        return rank in self._runs and (
            not ray.is_initialized() or bool(ray.wait([self._runs[rank]], timeout=0)[0])
        )

    def end(self, rank: int) -> str:
        """How a rank ended."""
        where = f"its actor on {self._places[rank][1].address}"
        try:
            return f"{where} ended with exit status {ray.get(self._runs[rank])}"
        except RayError as error:
            return f"{where} is gone: {_last_line(error)} (what it wrote is in Ray's logs there)"

    def signal(self, number: signal.Signals) -> None:
        """Ends all at once, whatever the signal, and gives their place back."""
        if ray.is_initialized():
            for actor in self._actors.values():
                ray.kill(actor)
            if self._own is not None:
                remove_placement_group(self._own)

    def wait(self, seconds: float) -> bool:
        """Waits until all have ended; False when some have not in that time."""
        runs = list(self._runs.values())
        if runs and ray.is_initialized() and ray.wait(runs, num_returns=len(runs), timeout=seconds)[1]:
            return False
        self.signal(signal.SIGTERM)  # an actor whose rank has left is still there
        return True


class _Actor:
    """Does nothing until it is told its rank."""

    def seat(self) -> Seat:
        return Seat.mine()

    def run(
        self, rank: int, size: int, environment: dict[str, str], config: dict[str, Any], host: str, port: int
    ) -> int:
        see_all_cards()
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        for stream in (sys.stdout, sys.stderr):  # rank 0's Ray shows it before each line from here
            print(f"{LOG_PREFIX_ACTOR_NAME}rank {rank}", file=stream, flush=True)
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=LOADING_S))
        return follow(EngineConfig(**config), store, rank, size, Seat.mine().place)
