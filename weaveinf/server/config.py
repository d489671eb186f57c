"""What the server's operator may set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server.

    Attributes:
        host: address to listen on.
        port: 0 takes a free one.
        served_model_name: what clients call the model; None: the name it was given on the command line.
        api_key_file: a file with one key a line, any of which opens every route but the probes; None: no key
            is asked for.
        max_waiting: requests that may wait for a place; one more is told to come again (429).
        max_output_tokens: of one answer; None: as many as the context holds.
        max_body_bytes: of a request.
        timeout_s: a request that is not answered by then is ended (504); it may ask for less.
        drain_s: after SIGTERM, how long what runs may take to end.
        max_restarts: times that ranks which died are started anew, before the server ends as failed.
        log_prompts: whether the log shows the prompts' token ids.
        otlp_endpoint: an OpenTelemetry collector's URL, which gets a span of each request; None: no tracing.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key_file: str | None = None
    max_waiting: int = 1024
    max_output_tokens: int | None = None
    max_body_bytes: int = 4 << 20
    timeout_s: float = 600.0
    drain_s: float = 60.0
    max_restarts: int = 5
    log_prompts: bool = False
    otlp_endpoint: str | None = None
    keys: tuple[bytes, ...] = field(init=False, repr=False)
    """Read from the file at once, so that a server without its keys never starts."""

    def __post_init__(self) -> None:
        for name, low in (("max_waiting", 0), ("max_body_bytes", 1024), ("max_restarts", 0), ("port", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if not (0 < self.timeout_s < 1e6 and 0 <= self.drain_s < 1e6):
            raise ValueError("timeout_s must be above 0, drain_s at least 0, both below a million seconds")
        object.__setattr__(self, "keys", self._read_keys())

    def _read_keys(self) -> tuple[bytes, ...]:
        if self.api_key_file is None:
            return ()
        lines = [line.strip().encode() for line in Path(self.api_key_file).read_text().splitlines()]
        if not any(lines):
            raise ValueError(f"{self.api_key_file} holds no key: write one a line")
        return tuple(filter(None, lines))
