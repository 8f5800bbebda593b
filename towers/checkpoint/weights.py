"""Loads the towers of a checkpoint; names of checkpoints, devices and dtypes are read here too."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from twotower.kernels.quantized import EXPERT_PRODUCTS, ExpertProducts
from twotower.towers.checkpoint.checkpoint import Checkpoint, ReadProgress, tensor_shapes
from twotower.towers.checkpoint.tower_loader import TowerLoader
from twotower.towers.errors import CheckpointError, ConfigError, InvalidRequestError, shorten
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower

SHIPPED_MODEL = Path(str(files("twotower"))) / "models" / "pystdlib"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt"]


class HubOptions(TypedDict, total=False):
    """Which snapshot of a hub id is fetched, and how; None is the hub client's default."""

    revision: str | None
    cache_dir: str | Path | None
    token: str | bool | None
    force_download: bool
    local_files_only: bool


def resolve_checkpoint(path: str | Path | None, **hub: Unpack[HubOptions]) -> Path:
    """The folder of a checkpoint: `path` itself, the snapshot of a hub id (safetensors, json and
    tokenizer files are fetched), or for None the shipped model. Raises CheckpointError if there is
    no such folder or hub id."""
    if path is None:
        return SHIPPED_MODEL
    if path == "":
        # As a path it would be the working folder.
        raise CheckpointError("'': not a folder, nor a hub id like owner/name")
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError):
        # Too long, with a NUL, or below the home of an unknown user: no folder's name.
        raise CheckpointError(f"{shorten(str(path))}: not a folder's name") from None
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: not a folder, nor a hub id like owner/name")
    return _fetched(str(path), hub)


def _fetched(hub_id: str, hub: HubOptions) -> Path:
    """The local folder of a hub id's files, downloaded if needed; raises CheckpointError."""
    # Imported here: with its HTTP client it takes a tenth of a second, which a folder of this
    # machine need not wait for.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{hub_id}: could not be fetched ({type(error).__name__})") from None
    except Exception as error:
        # A proxy or a token that no header can hold: the client has a different error for each,
        # whose text may contain the token.
        raise CheckpointError(
            f"{hub_id}: could not be asked for ({type(error).__name__}); look at the hub's token "
            "and the proxies in the environment"
        ) from None


def parse_device(name: str | torch.device) -> torch.device:
    """`cpu`, `cuda` or a GPU by number (`cuda:1`) -> the device. Raises ConfigError for another
    kind of device, and for a GPU that this machine lacks."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {shorten(str(name))}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            there = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "cpu"
            raise ConfigError(f"device: got {str(name)!r}, expected {there}: {count} GPUs are here")
    elif device.index:
        raise ConfigError(f"device: got {str(name)!r}, expected cpu")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` -> the dtype; raises InvalidRequestError, a ValueError, otherwise."""
    if not isinstance(name, str) or name not in DTYPES:
        raise InvalidRequestError("dtype", name, f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_expert_products(name: str) -> ExpertProducts:
    """`widened` or `fp8`; raises InvalidRequestError, a ValueError, otherwise."""
    for products in EXPERT_PRODUCTS:
        if name == products:
            return products
    raise InvalidRequestError("expert_products", name, f"one of {', '.join(EXPERT_PRODUCTS)}")


def load_context_tower(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    for_triton: bool | None = None,
    deterministic: bool = False,
    progress: ReadProgress | None = None,
    expert_products: ExpertProducts = "widened",
) -> ContextTower:
    """Reads the context tower and its head, and no tensor of the denoiser. Raises CheckpointError,
    and ConfigError if the weights are larger than the free memory of the device.

    With `for_triton` (None: on CUDA) matrices keep the layout that Triton's kernels read, experts
    stacked; otherwise they are packed for a CPU's products. `deterministic` is the tower's.
    `progress` gets the bytes read so far, and those of this tower in its files, after each tensor.
    Routed experts in 8 bits are multiplied as `expert_products` says; "fp8" raises ConfigError for
    others.
    """
    checkpoint = Checkpoint(folder)
    checkpoint.watch(_names(checkpoint, context=True), progress)
    loader = TowerLoader(checkpoint, torch.device(device), dtype, for_triton, expert_products)
    weights = loader.tower("context_tower", "context_lm_head")
    return ContextTower(loader.config, weights, deterministic=deterministic)


def load_denoiser_tower(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    for_triton: bool | None = None,
    deterministic: bool = False,
    progress: ReadProgress | None = None,
    expert_products: ExpertProducts = "widened",
) -> DenoiserTower:
    """Reads the denoiser tower, its head and its timestep conditioning; arguments and errors as in
    `load_context_tower`."""
    checkpoint = Checkpoint(folder)
    checkpoint.watch(_names(checkpoint, context=False), progress)
    loader = TowerLoader(checkpoint, torch.device(device), dtype, for_triton, expert_products)
    weights = loader.tower("denoiser_tower", "lm_head")
    timestep = loader.timestep()
    return DenoiserTower(loader.config, weights, timestep, deterministic=deterministic)


def _names(checkpoint: Checkpoint, *, context: bool) -> list[str]:
    """Names of the context tower's tensors, or of all others, which are the denoiser's."""
    return [
        name
        for name in tensor_shapes(checkpoint.config)
        if name.startswith(("context_tower.", "context_lm_head.")) == context
    ]
