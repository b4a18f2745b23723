"""Weights files: exported from checkpoints, and loaded as a network ready for sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from warm_dist.checkpoints.export import Part, export_tensors, is_certified
from warm_dist.checkpoints.format import COMPLETE, open_saved
from warm_dist.config.load import parse_json
from warm_dist.config.run import Config, SamplerConfig, validate
from warm_dist.data import DataInfo
from warm_dist.errors import CheckpointError, ConfigError, print_once, redact
from warm_dist.networks.flat import adopt, published
from warm_dist.networks.unet import build
from warm_dist.runs.folder import EXPORTS, WEIGHTS
from warm_dist.store.open import open_store


class Model(NamedTuple):
    """A network with the config and the data statistics that sampling needs."""

    network: nn.Module
    config: Config
    info: DataInfo


def export_weights(parts: list[Part], path: Path) -> None:
    """Write a checkpoint's weights as one self-contained safetensors file for `load_weights`.

    parts: such as [(saved, "ema", 1.0)]; several are summed, with the last one's nimg and config in the header.
    Raises CheckpointError if something is damaged or missing, OutputError if the file cannot be written.
    """
    saved = parts[-1][0]
    config = validate(redact(saved.meta["config"]), str(saved))  # an old one may hold credentials
    with torch.device("meta"):
        network = build(config)
    header = {key: json.dumps(redact(saved.meta[key])) for key in ("config", "data", "nimg")}  # others will read it
    export_tensors(parts, list(published(network)), path, header)


def load_weights(path: Path, device: torch.device | None = None) -> Model:
    """Load a network from a weights file, in evaluation mode. Raises CheckpointError for any other file."""
    try:
        certified = is_certified(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        if metadata.keys() - {"nimg"} != {"config", "data"} | ({"sha256"} if certified else set()):
            raise KeyError
        config = validate(parse_json(metadata["config"], str(path)), str(path))
        info = DataInfo.from_json(json.loads(metadata["data"]))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}); name a file of launch/export.py"
        ) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); name a file of launch/export.py") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise CheckpointError(f"{path}: not made by launch/export.py (no config inside)") from None
    if not certified:
        print_once(f"{path}: has no digest, since an older version wrote it; damage would go unnoticed", shared=True)
    network = build(config)
    try:
        adopt(network, state)
    except ValueError as error:
        raise CheckpointError(f"{path}: does not fit its own config ({error})") from None
    return Model(network.eval().to(device), config, info)


def load_guide(options: SamplerConfig, info: DataInfo, device: torch.device | None = None) -> Model | None:
    """The weaker network named by options.guide, or None. Raises CheckpointError if it was trained on other data."""
    if options.guide is None or options.guidance == 1:
        return None
    guide = load_weights(Path(options.guide), device)
    if guide.info.fingerprint != info.fingerprint:
        raise CheckpointError(
            f"{options.guide}: made from data {guide.info.fingerprint[:12]}, the network to guide from "
            f"{info.fingerprint[:12]}"
        )
    return guide


def weights_path(given: Path) -> Path:
    """The weights file of a finished run or a checkpoint (RUN/checkpoints/NIMG, exported once), or `given` itself.

    Raises ConfigError if there is none, CheckpointError for a damaged checkpoint.
    """
    where = "name a finished run's folder, a checkpoint in it (RUN/checkpoints/NIMG), or a file of launch/export.py"
    if not given.exists():
        raise ConfigError(f"{given}: does not exist; {where}")
    if given.is_dir() and not (given / COMPLETE).exists() and not (given / WEIGHTS).exists():
        raise ConfigError(f"{given}: has no {WEIGHTS}, which a run writes at its end; {where}")
    if not (given / COMPLETE).exists():
        return given / WEIGHTS if given.is_dir() else given
    run = given.resolve().parent.parent
    path = run / EXPORTS / f"ema_{given.resolve().name}.safetensors"
    if not path.exists():
        saved = open_saved(open_store(str(run)), given.resolve().relative_to(run).as_posix())
        export_weights([(saved, "ema", 1.0)], path)
    return path
