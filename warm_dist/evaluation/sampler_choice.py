"""The choice of a sampler: the config's with changes, checked, and described for fingerprints."""

from __future__ import annotations

from pathlib import Path

from warm_dist.config.bnr import Cold, LogUniformBNR, UniformBNR, describe
from warm_dist.config.load import dump, override, parse_setting
from warm_dist.config.run import Config, SamplerConfig, check_sampling, sampling_precision, validate
from warm_dist.config.values import exact
from warm_dist.data import DataInfo
from warm_dist.errors import ConfigError
from warm_dist.files import file_sha256


def describe_sampling(config: Config, options: SamplerConfig) -> str:
    """Everything that determines which images `options` draw from a network of `config`, as text."""
    bnr = describe(config.process.bnr if options.bnr is None else options.bnr)
    parts = [f"{options.method} {options.num_steps} steps", f"grid {options.grid}"]
    if not isinstance(config.process.bnr, Cold):
        parts.append(f"sigma {exact(options.sigma_min)}..{exact(options.sigma_max)}")
    parts += [f"rho {exact(options.rho)}", f"bnr {bnr}", f"start {options.start}"]
    if options.method == "ancestral":
        parts.append(f"eta {exact(options.eta)}")
    if options.method == "churn":
        churn, low, high, noise = map(exact, (options.s_churn, options.s_min, options.s_max, options.s_noise))
        parts.append(f"churn {churn} in {low}..{high}, noise {noise}")
    if options.guidance != 1:
        parts.append(f"guidance {exact(options.guidance)} by {_describe_guide(options.guide)}")
    if config.data.num_classes and options.classes == "data":
        parts.append("classes as in the data")
    if (precision := sampling_precision(config, options)) != "fp32":
        parts.append(f"network in {precision}")
    return ", ".join(parts)


def _describe_guide(guide: str | None) -> str:
    """A guide's path and the hash of its content."""
    if guide is None:
        return "the network without class"
    try:
        return f"{guide} (sha256 {file_sha256(Path(guide))[:12]})"
    except OSError:  # load_guide reports it
        return guide


def sampler_for(
    config: Config,
    overrides: list[str],
    method: str | None = None,
    nfe: int | None = None,
    bnr: float | None = None,
    spend_less: bool = False,
) -> SamplerConfig:
    """The config's sampler with changes. Raises ConfigError if this network cannot be sampled so.

    overrides: `sampler.key=VALUE`. spend_less: if a method cannot have exactly `nfe` evaluations (Heun's are odd), use
    one less.
    """
    from warm_dist.diffusion.samplers import schedule

    tree = dump(config)
    keys = [parse_setting(text)[0] for text in overrides]
    for key, text in zip(keys, overrides, strict=True):
        if not key.startswith("sampler."):
            raise ConfigError(f"--set {text!r}: only sampler.* can change after training")
    given = {key: f"--set {key}" for key in reversed(keys)}
    for key, flag, value in (("method", "--method", method), ("num_steps", "--nfe", nfe), ("bnr", "--bnr", bnr)):
        if value is not None:
            if f"sampler.{key}" in keys:
                raise ConfigError(f"{flag} {value} and --set sampler.{key}: give one of the two")
            given[f"sampler.{key}"] = f"{flag} {value}"
    settings = [f"sampler.method={method}"] if method else []
    settings += [f"sampler.bnr={bnr!r}"] if bnr is not None else []
    for text in [*settings, *overrides]:
        override(tree, text)
    if nfe is not None:
        tree["sampler"]["num_steps"] = _num_steps(tree["sampler"]["method"], nfe, spend_less)
    sampler = validate(tree, "sampler", given).sampler
    check_sampling(config, sampler)
    schedule(config, sampler)
    return sampler


def _num_steps(method: str, nfe: int, spend_less: bool) -> int:
    from warm_dist.diffusion.samplers import num_steps_for

    num_steps = num_steps_for(method, nfe) or (num_steps_for(method, nfe - 1) if spend_less else None)
    if num_steps is None:
        odd = "an odd number from 3 on (2 N - 1)" if num_steps_for(method, 3) == 2 else "2 or more"
        raise ConfigError(f"nfe {nfe}: {method} needs {odd}")
    return num_steps


def training_note(config: Config, sampler: SamplerConfig) -> str | None:
    """A warning if a network is sampled along another path than it was trained on, or None."""
    trained = config.process.bnr
    if sampler.bnr is None or sampler.bnr == trained:
        return None
    asked = describe(sampler.bnr)
    if isinstance(trained, UniformBNR | LogUniformBNR):
        inside = not isinstance(sampler.bnr, float | int) or trained.low <= sampler.bnr <= trained.high
        return None if inside else f"note: trained at BNR {trained.low:g} to {trained.high:g}; {asked} is outside"
    return f"note: trained at BNR {describe(trained)} alone; BNR {asked} is outside what it has seen"


def with_data(config: Config, manifest: str | None, endpoint_url: str | None) -> Config:
    """The config with another manifest or endpoint, where given."""
    changes = {"manifest": manifest, "endpoint_url": endpoint_url}
    data = config.data.model_copy(update={key: value for key, value in changes.items() if value is not None})
    return config.model_copy(update={"data": data})


def check_data(trained: DataInfo, found: DataInfo, weights: Path) -> None:
    """Raise ConfigError unless the manifest is of the data that the network was trained on."""
    if found.fingerprint != trained.fingerprint:
        raise ConfigError(
            f"{weights}: made from data {trained.fingerprint[:12]}, this manifest is {found.fingerprint[:12]}; "
            "name the right one with --manifest"
        )
