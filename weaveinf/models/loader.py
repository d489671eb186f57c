"""From a path or a Hub id to one rank's share of a model."""

from hashlib import blake2b
from pathlib import Path

import torch

from weaveinf.models.config import ModelConfig
from weaveinf.models.layers import Model, Parts, Scratch, Share
from weaveinf.models.registry import families
from weaveinf.models.weights import Checkpoint, Dummy, Progress, Source, Weights, rows


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory of a model: `model` itself if it is one, else that Hub repository's snapshot.

    All files are of the one commit that `revision` names now; no pickled one is fetched. Without a
    network the newest snapshot that was fetched before is taken.

    Raises:
        ValueError: neither a directory nor a Hub repository that can be fetched.
    """
    if Path(model).is_dir():
        return Path(model)
    # Imported by need: it takes longer than everything else here together.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja"],
            ignore_patterns=["consolidated*", "original/*"],  # the same weights in other layouts
        )
    except (OSError, ValueError) as error:  # of the Hub's own classes, all are one of these
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{model!r} is no directory here, and not had from the Hub: {words}") from error
    return Path(folder)


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
    source = _source(path, load_format)
    layer = families()[config.architecture].layer
    share, scratch = Share(config, rank, size), Scratch()

    survey = Weights(source, device, dtype, survey=True)
    Model(Parts(config, share, survey, torch.empty(0), scratch), layer)
    if load_format != "dummy":
        survey.check()

    rotary = config.rope.table(min(config.max_model_len, config.rope.max_positions), device)
    weights = Weights(source, device, dtype, progress=progress, total=survey.total)
    return Model(Parts(config, share, weights, rotary, scratch), layer)


def _source(path: str | Path, load_format: str) -> Source:
    return Dummy() if load_format == "dummy" else Checkpoint(Path(path))


def fingerprint(path: str | Path, config: ModelConfig, load_format: str = "auto") -> str:
    """Tells apart models whose heads look for other things: a hash of heads, rotation and a row of every
    layer's query and key weights, as the checkpoint at `path` has them. For models without latents."""
    source, dim = _source(path, load_format), config.head_dim
    counts = {"q": config.num_heads, "k": config.num_kv_heads}
    facts = (config.architecture, config.num_layers, counts, config.rope)
    digest = blake2b(repr(facts).encode(), digest_size=16)
    row = torch.empty(1, config.hidden_size)
    for layer in range(config.num_layers):
        for which, heads in counts.items():
            name = f"model.layers.{layer}.self_attn.{which}_proj.weight"
            source.read(rows(name, heads * dim, config.hidden_size, range(1)), row)
            digest.update(row.numpy().tobytes())
    return digest.hexdigest()
