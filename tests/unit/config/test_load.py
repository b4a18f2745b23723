"""Loading a config: strict keys, --set, every mistake with its path."""

import json
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from warm_dist.config.load import dump, flatten, known_keys
from warm_dist.config.run import Config, load_config
from warm_dist.errors import ConfigError

QUICKSTART = str(ROOT / "configs" / "quickstart.json")
NETWORK = {"arch": "adm", "channels": 64, "channel_mult": [1], "num_blocks": 1}


def refusal(*overrides: str, path: str | Path = QUICKSTART) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    "secret", ["https://u:hun/ter2@host/x", "https://hunter2@host/x", "https://host/x?sig=hunter2"]
)
@pytest.mark.parametrize(
    "key", [key for key in known_keys(Config) if key.endswith(("url", "manifest", "output", "guide", "$schema"))]
)
def test_no_key_takes_a_url_with_credentials(key, secret):
    """Fault: a password stands in clear in config.json, and in COMPLETE on S3."""
    told = refusal(f"{key}={secret}")
    assert f"--set {key}: holds a user, password, token or query" in told
    assert "MLFLOW_TRACKING_USERNAME" in told
    assert "AWS_SECRET_ACCESS_KEY" in told
    assert "hun" not in told


def test_the_keys_that_hold_urls_are_those():
    keys = [key for key in known_keys(Config) if key.endswith(("url", "manifest"))]
    assert keys == ["data.manifest", "data.endpoint_url", "checkpoint.url", "checkpoint.endpoint_url", "eval.extractor_url",
                    "tracking.mlflow_url"]  # fmt: skip


def test_misspelt_keys_are_named_with_the_nearest_one():
    assert "unknown key 'trian'; did you mean 'train'?" in refusal("trian=1")
    assert "unknown key 'train.batchsize'; did you mean 'train.batch_size'?" in refusal("train.batchsize=32")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size=true", "--set train.batch_size: needs a whole number, got true"),
        ("train.lr=fast", '--set train.lr: needs a number, got "fast"'),
        ("process.bnr=-1", "--set process.bnr: needs 0 or more, got -1"),
        ('process.bnr={"kind":"cool"}', "whose kind is 'number', 'power'"),
        ('process.bnr={"kind":"power","bnr":1,"exponent":-1}', "'process.bnr.exponent'"),
        ('process.bnr={"kind":"table","sigma":[1,2],"bnr":[1,0.4]}', "must not fall as sigma rises"),
        ('process.bnr={"kind":"uniform","low":2,"high":1}', "must be below the high end"),
        ('process.bnr={"kind":"uniform","low":0,"high":1}', "sampler.bnr is needed"),
        (
            'sampler.bnr={"kind":"uniform","low":0,"high":1}',
            "--set sampler.bnr: needs a number, or an object whose kind is",
        ),
        ("sampler.method=cold", "needs process.bnr cold"),
        ("sampler.grid=[3,2]", "grid has 2 entries, num_steps is 35"),
        ("sampler.grid=linear", "'edm' or 'log_linear'"),
        ("sampler.guidance=2", "train.label_dropout above 0"),
        ("process.sigma_data=guess", "'measured'"),
        ("network.arch=resnet", "'ddpmpp', 'ncsnpp' or 'adm'"),
        ("data.num_lanes=5", "not a multiple of data.num_lanes 5"),
        ("train.total_nimg=33", "train.total_nimg 33 is not a multiple"),
        ("eval.eval_nimg=33", "eval.eval_nimg 33 is not a multiple"),
        ("data.resolution=15", "cannot be halved"),
        ("network.attention_resolutions=[7]", "the network works at [16, 8, 4]"),
        ("eval.extractor=inception", "eval.extractor_sha256"),
        ("eval.extractor=torchscript", "eval.extractor_sha256"),
        ('eval={"eval_nimg":32,"num_images":2,"extractor":"pixels","extractor_bf16":true}', "pixels is always float32"),
        ("tracking.mlflow_url=https://", "needs the URL of a server, http://… or https://…"),
        ("tracking.mlflow_url=sqlite:///mlflow.db", "needs the URL of a server, http://… or https://…"),
        ("tracking.parent_run_id=sweep", 'needs an id of 32 hex digits, got "sweep"'),
        ('tracking={"log_model":false,"registered_model":"x"}', "needs tracking.log_model"),
        ("sampler.sigma_max=0.001", "must be below sigma_max"),
        ("process.bnr=NaN", "must be finite"),
        ("process.bnr=1e999", "must be finite"),
        ('process.bnr={"kind":"power","bnr":1e999,"exponent":0}', "must be finite"),
        *(
            (f"{key}={value}", "a size from 1e-15 to 1e15, whose square float32 can hold, got ")
            for key in ("process.bnr", "process.sigma_data", "sampler.sigma_max", "sampler.bnr", "train.lr")
            for value in ("1e200", "1e-320")
        ),
        ("process.p_mean=-1e19", "--set process.p_mean: needs -20 or more, got -1e+19"),
        ("train.ema_lengths=[1e-300]", "'train.ema_lengths.0': "),
        ("parallel.timeout_s=9999999999999", "--set parallel.timeout_s: needs 1000000 or less, got 9999999999999"),
        *(
            (f"{key}={10**23}", f"--set {key}: needs ")
            for key in ("data.window", "data.num_classes", "network.num_blocks")
        ),
        (f"train.total_nimg={'9' * 5000}", f"--set train.total_nimg: {'9' * 30}… is no number here"),
        ("train.betas=" + "[" * 30_000, "--set train.betas: nested too deeply"),
        ('process.bnr={"kind":"power","bnr":1,"exponent":11}', "'process.bnr.exponent'"),
        *(
            (f"network={json.dumps(NETWORK | changes)}", told)
            for changes, told in (
                ({"channels": 7}, "network.channels must be even and at least 4, is 7"),
                ({"channels": 2}, "network.channels must be even and at least 4, is 2"),
                (
                    {"channels": 200},
                    "network.channels 200 x channel_mult 1 = 200 cannot be shared among 3 attention heads",
                ),
                (
                    {"channels": 100, "channel_mult": [2, 1], "attention_resolutions": [16]},
                    "channel_mult 2 = 200 cannot",
                ),
            )
        ),
        ("train.lr.x=1", "is not a section"),
        ("nonsense", "a.b=VALUE"),
    ],
)
def test_bad_values_are_refused_with_their_path(override, words):
    assert words in refusal(override)


def test_duplicates_nan_and_broken_files_are_refused(tmp_path):
    for text, words in [
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"a": NaN}', "NaN is no number here; it must be finite"),
        ('{"a": {"b": -1e999}}', "-1e999 is no number here"),
        ('{"a": ' + "9" * 5000 + "}", f"{'9' * 30}… is no number here"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ("null", "holds null, needs an object"),
        ("{", "not JSON, line 1"),
        ("[]", "needs an object"),
        ("{}", "missing key 'data'"),
    ]:
        (tmp_path / "c.json").write_text(text)
        assert words in refusal(path=tmp_path / "c.json")
    assert "does not exist" in refusal(path=tmp_path / "absent.json")


@pytest.mark.parametrize("url", ["runs/a", "./runs/b/../a/copies", "file://" + str(Path("runs/a").resolve())])
def test_checkpoints_are_not_copied_into_their_own_run(url):
    """Fault: a checkpoint is its own copy, and pruning the copies removes it."""
    assert "is in output, the run's own folder" in refusal("output=runs/a", f"checkpoint.url={url}")
    assert load_config(QUICKSTART, ["output=runs/a", "checkpoint.url=runs/ab"]).checkpoint.url == "runs/ab"


def test_a_file_of_a_windows_editor_is_read(tmp_path):
    """Fault: the mark at its beginning is no JSON."""
    (tmp_path / "c.json").write_text(Path(QUICKSTART).read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load_config(tmp_path / "c.json") == load_config(QUICKSTART)


def test_a_section_that_an_override_began_is_blamed_on_both(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(json.loads(Path(QUICKSTART).read_text()) | {"eval": None}))
    with pytest.raises(ConfigError, match=r"c\.json with --set eval\.num_images: missing key 'eval\.eval_nimg'$"):
        load_config(tmp_path / "c.json", ["train.seed=1", "eval.num_images=4"])


def test_overrides_are_json_or_else_strings():
    c = load_config(
        QUICKSTART,
        ["train.lr=2e-3", "network.channel_mult=[1,1]", "output=runs/x", "eval=null", "process.sigma_data=0.5"],
    )
    assert (c.train.lr, c.network.channel_mult, c.output, c.eval, c.process.sigma_data) == (
        2e-3,
        (1, 1),
        "runs/x",
        None,
        0.5,
    )


def test_every_error_is_reported_at_once():
    message = refusal("train.lr=-1", "process.bnr=-1", "foo=1")
    assert all(word in message for word in ("--set train.lr: ", "--set process.bnr: ", "unknown key 'foo'"))


def test_flatten_gives_the_keys_of_set():
    """Fault: the parameters in MLflow have names that --set does not take."""
    flat = flatten(dump(load_config(QUICKSTART)))
    assert flat["process.bnr"] == 0.5
    assert flat.keys() <= set(known_keys(Config))
