"""The description of a sampler, by which results are known to be comparable."""

import pytest

from tests.support.tiny_run import config
from warm_dist.config.run import SamplerConfig
from warm_dist.errors import ConfigError
from warm_dist.evaluation.sampler_choice import describe_sampling, sampler_for, training_note


def test_the_description_has_a_guides_bytes(tmp_path):
    """Fault: a guide is known by its path alone, so that other weights at that path pass for the same."""
    settings, path = config(tmp_path), tmp_path / "weak.safetensors"
    options = SamplerConfig(guidance=2.0, guide=str(path))
    assert describe_sampling(settings, options).endswith(f"guidance 2 by {path}")  # none there: load_guide tells
    path.write_bytes(b"abc")
    assert describe_sampling(settings, options).endswith(f"by {path} (sha256 ba7816bf8f01)")  # FIPS 180-2, B.1
    path.write_bytes(b"abd")
    assert "ba7816bf8f01" not in describe_sampling(settings, options)
    assert str(path) not in describe_sampling(settings, SamplerConfig(guide=str(path))), "weight 1 needs none"
    unguided = settings.model_copy(update={"sampler": SamplerConfig()}), SamplerConfig(guidance=2.0)
    assert describe_sampling(*unguided).endswith("by the network without class")


def test_so_many_evaluations_are_never_exceeded(tmp_path):
    for method, nfe, num_steps in (("heun", 35, 18), ("heun", 36, 18), ("ancestral", 36, 36)):
        assert sampler_for(config(tmp_path), [], method, nfe, spend_less=True).num_steps == num_steps
    with pytest.raises(ConfigError, match="nfe 36: heun needs an odd number"):
        sampler_for(config(tmp_path), [], "heun", 36)


@pytest.mark.parametrize(
    ("bnr", "told"),
    [(0.5, False), (1.0, False), (2.0, False), (0.4, True), (2.1, True), (None, False)],
)
def test_a_path_that_training_has_not_seen_is_told_of(tmp_path, bnr, told):
    trained = config(tmp_path, process__bnr={"kind": "uniform", "low": 0.5, "high": 2.0}, sampler={"bnr": 1.0})
    note = training_note(trained, SamplerConfig(bnr=bnr))
    assert (note is not None) == told
    assert training_note(config(tmp_path), SamplerConfig(bnr=0.5)) is None
    assert "trained at BNR 0.5 alone" in training_note(config(tmp_path), SamplerConfig(bnr=0.6))


@pytest.mark.parametrize(
    ("key", "method"),
    [("rho", "heun"), ("sigma_min", "heun"), ("sigma_max", "heun"), ("bnr", "heun"), ("guidance", "heun"),
     ("eta", "ancestral"), ("s_churn", "churn"), ("s_min", "churn"), ("s_max", "churn"), ("s_noise", "churn")],
)  # fmt: skip
def test_the_description_knows_every_digit(tmp_path, key, method):
    texts = {
        describe_sampling(config(tmp_path), SamplerConfig(method=method, **{key: value}))
        for value in (0.1234567, 0.12345671)
    }
    assert len(texts) == 2


@pytest.mark.parametrize(
    "setting",
    [
        "rho=1e-15",  # overflows
        'bnr={"kind": "power", "bnr": 1e15, "exponent": 10, "sigma_ref": 1e-15}',  # a blur without a square
    ],
)
def test_levels_that_cannot_be_computed_are_refused(tmp_path, setting):
    """Fault: sampling ends in an OverflowError or a division by zero."""
    with pytest.raises(ConfigError, match=r"levels from 80 to 0\.002 .* must be distinct finite numbers"):
        sampler_for(config(tmp_path), [f"sampler.{setting}"])
    assert sampler_for(config(tmp_path), ["sampler.sigma_max=1e15", "sampler.bnr=1e15"]).bnr == 1e15


def test_the_description_of_usual_numbers_is_short(tmp_path):
    text = "heun 18 steps, grid edm, sigma 0.002..80, rho 7, bnr 0.5, start measured"
    assert describe_sampling(config(tmp_path), SamplerConfig(method="heun", num_steps=18)) == text
    half = config(tmp_path, parallel__precision="bf16")
    for settings, precision in ((half, None), (config(tmp_path), "bf16")):
        options = SamplerConfig(method="heun", num_steps=18, precision=precision)
        assert describe_sampling(settings, options) == f"{text}, network in bf16"
    assert describe_sampling(half, SamplerConfig(method="heun", num_steps=18, precision="fp32")) == text


@pytest.mark.parametrize(
    ("setting", "choice", "told"),
    [
        ("sampler.num_steps=7", {"nfe": 2}, "--nfe 2 and --set sampler.num_steps: give one of the two"),
        ("sampler.bnr=1", {"bnr": 2.0}, "--bnr 2.0 and --set sampler.bnr: give one of the two"),
        ("sampler.method=heun", {"method": "churn"}, "--method churn and --set sampler.method: give one of the two"),
        ("sampler", {}, "--set 'sampler': needs the form a.b=VALUE"),
        ("train.lr=1", {}, "--set 'train.lr=1': only sampler.* can change after training"),
        ("sampler.eta=2", {}, "--set sampler.eta: needs 1 or less, got 2"),
        ("sampler.rho=7", {"method": "odd"}, "--method odd: 'sampler.method': needs "),
    ],
)
def test_what_is_wrong_or_given_twice_is_named(tmp_path, setting, choice, told):
    """Fault: of a flag and a --set of the same thing one is ignored, --nfe one way and --bnr the other."""
    with pytest.raises(ConfigError) as caught:
        sampler_for(config(tmp_path), [setting], **choice)
    assert str(caught.value).startswith(told)
