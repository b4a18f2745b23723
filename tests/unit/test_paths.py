"""Paths as people write them mean one thing everywhere."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from warm_dist.config.run import validate
from warm_dist.errors import ConfigError
from warm_dist.paths import local_path, path_argument, place, place_argument
from warm_dist.store.base import split_url
from warm_dist.store.open import open_store

ODD = "a b/set#1/50%25?x=é日"  # each of them is legal in a name, and none means anything in a path or S3 key


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_home_folder_is_found(home):
    assert [local_path(text) for text in ("~", "~/x", "x/~", "./~x", "/y")] == [
        str(home), f"{home}/x", "x/~", "./~x", "/y"
    ]  # fmt: skip
    assert path_argument("~/run 1") == home / "run 1"
    with pytest.raises(ValueError, match="names the home folder ~nobody-here"):
        local_path("~nobody-here/x")


def test_file_urls_are_decoded_once():
    assert place("file:///a%20b/100%2525%23") == "/a b/100%25#"
    assert place("file:///set#1?") == "/set#1?"
    assert place("file://localhost/x") == place("file:/x") == "/x"
    assert place("/a%20b") == "/a%20b"
    assert split_url("file:///d/a%20b/m%23.parquet") == ("/d/a b", "m#.parquet")


def test_odd_names_survive():
    assert local_path(f"/d/{ODD}") == f"/d/{ODD}"
    assert place(f"s3://b/{ODD}") == f"s3://b/{ODD}"
    assert split_url(f"s3://b/{ODD}/m.parquet") == (f"s3://b/{ODD}", "m.parquet")
    store = open_store(f"s3://bucket/{ODD}", "http://127.0.0.1:1")
    assert store.url == f"s3://bucket/{ODD}"


@pytest.mark.parametrize("read", [local_path, place, path_argument, place_argument])
@pytest.mark.parametrize(
    "text",
    ["", " ", "file://host/x", "file://", "file:x", "file:////x", "http://h/x", "s3:/b/x", "s3:///x", "gs://b", "a\0b"],
)
def test_what_is_no_place_is_refused(read, text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        read(text)


def test_a_store_is_no_folder():
    with pytest.raises(ValueError, match="not s3:; only data"):
        local_path("s3://bucket/runs")
    with pytest.raises(argparse.ArgumentTypeError, match="'s3://bucket/runs': needs a folder"):
        path_argument("s3://bucket/runs")


KEYS = ("output", "data.manifest", "data.cache_dir", "eval.cache_dir", "parallel.compile_cache",
        "parallel.preemption_file", "checkpoint.url", "sampler.guide", "eval.extractor_url")  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_path_reads_it_so(key, home):
    """Fault: a folder called ~ here, one called s3: there, the current folder for an unset variable."""
    assert value_of(key, "~/x") == f"{home}/x"
    assert value_of(key, "file:///a%20b") == "/a b"
    assert value_of(key, f"r/{ODD}") == f"r/{ODD}"
    with pytest.raises(ConfigError, match=f"'{key}': needs a folder, file or URL, not an empty text, got "):
        value_of(key, "")
    if key in ("data.manifest", "checkpoint.url", "eval.extractor_url"):
        assert value_of(key, f"s3://b/{ODD}") == f"s3://b/{ODD}"
        with pytest.raises(ConfigError, match=f"'{key}': needs s3://bucket/prefix or a path on this"):
            value_of(key, "gs://b/x")
    else:
        with pytest.raises(ConfigError, match=f"'{key}': needs a folder or file of this machine, not s3:"):
            value_of(key, "s3://b/x")


def value_of(key: str, text: str) -> str:
    section, _, name = key.rpartition(".")
    tree = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    (tree.setdefault(section, {}) if section else tree)[name] = text
    found = validate(tree)
    return str(getattr(getattr(found, section) if section else found, name))


def test_an_empty_endpoint_is_refused():
    with pytest.raises(ConfigError, match="s3://b/x: its endpoint URL is an empty text"):
        open_store("s3://b/x", "")
    with pytest.raises(ConfigError, match="'': needs a folder"):
        open_store("")


def test_a_store_in_a_folder_is_found_by_its_url(tmp_path):
    folder = Path(tmp_path / ODD)
    open_store(str(folder)).write("k#%20", b"1")
    url = f"file://{tmp_path}/a%20b/set%231/50%2525%3Fx=é日"
    assert open_store(url).read("k#%20") == b"1"
