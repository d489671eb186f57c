"""A user's program: python -m tests.cluster.program MODEL RANKS close|forget|forever|stuck"""

from __future__ import annotations

import signal
import sys
import time
from itertools import count
from pathlib import Path

from tests.cluster.harness import children, start, step, tokens
from weaveinf.cluster import supervise


def main(model: str, size: str, ending: str) -> None:
    cluster = start(Path(model), int(size))
    print("tokens", *tokens(cluster, 0, 5), flush=True)
    print("ranks", *(child.pid for child in children()), flush=True)
    if ending == "forever":
        for n in count(5):
            cluster.submit(step(n % 800))
            cluster.collect()
    if ending == "stuck":
        supervise.STUCK_S = 2.0
        setattr(cluster.worker, "execute", lambda step: time.sleep(1000))  # noqa: B010
        cluster.submit(step(5))
    if ending == "close":
        cluster.close()
    print("end", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore it
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
