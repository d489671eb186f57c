"""From a path or a Hub id to one rank's share of a model."""

from __future__ import annotations

from pathlib import Path

import torch

from weaveinf.models.config import ModelConfig
from weaveinf.models.layers import Model, Parts, Scratch, Share
from weaveinf.models.registry import families
from weaveinf.models.weights import Checkpoint, Dummy, Progress, Source, Weights


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory of a model: `model` itself if it is one, else that Hub repository's snapshot.

    The revision is pinned to one commit before anything is fetched, and no pickled file is.

    Raises:
        ValueError: neither a directory nor a Hub repository that can be fetched.
    """
    if Path(model).is_dir():
        return Path(model)
    # Imported by need: a local model must load where the Hub's client is not installed.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    wanted = ["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*"]
    try:
        try:
            commit = HfApi().model_info(model, revision=revision).sha
        except (OfflineModeIsEnabled, ConnectionError):
            return Path(snapshot_download(model, revision=revision, local_files_only=True))
        return Path(snapshot_download(model, revision=commit, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{model!r} is no directory here, and the Hub does not give it: {words[0]}"
        ) from error


def load_model(
    path: str | Path,
    config: ModelConfig,
    rank: int,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str = "auto",
    progress: Progress | None = None,
) -> Model:
    """Builds rank `rank` of `size`, reading from `path` only what this rank keeps.

    Besides its own share a rank holds at most one tensor (and its packed copy) at any moment.
    `load_format="dummy"` makes random weights, the same for any `size`, and reads nothing.
    `progress(done, total)` is called with bytes after every tensor.

    Raises:
        ValueError: sizes that `size` ranks cannot share; missing, unexpected or misshapen tensors;
            files that are missing, corrupt or pickled. Found before any weight is read.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format={load_format!r}, expected 'auto' or 'dummy'")
    config.check_ranks(size)
    source: Source = Dummy() if load_format == "dummy" else Checkpoint(Path(path))
    layer = families()[config.architecture].layer
    share, scratch = Share(config, rank, size), Scratch()

    survey = Weights(source, device, dtype, survey=True)
    Model(Parts(config, share, survey, torch.empty(0), scratch), layer)
    if load_format != "dummy":
        survey.check()

    rotary = config.rope.table(config.max_model_len, device)
    weights = Weights(source, device, dtype, progress=progress, total=survey.total)
    return Model(Parts(config, share, weights, rotary, scratch), layer)
