"""Words of people in a rendered manifest arrive as they were written: no parser takes them for another type, no kubelet expands them."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import k8s
from tests.k8s.expand import substitute
from tests.k8s.render import offline, tool
from warm_dist.errors import ConfigError
from warm_dist.kubernetes import jobs
from warm_dist.kubernetes.jobs import JobSize

SECRETS = {"AWS_SECRET_ACCESS_KEY": "hunter2", "A": "hunter2", "": "hunter2"}
SIZE = JobSize(nodes=2, gpus=0, processes=1, cpus=1, memory_gib=4)
TYPES = "y Y n N yes No on Off true False null ~ = << 1e-3 1E5 -1e3 +1 0o7 0b1 0x1f 017 08 1_000 12:30:45 1. .5 .inf -.INF .NaN 2001-01-01 1e400"
CORPUS = [
    *TYPES.split(),
    *("", " ", "a b ", "- a", "a: b", "a #b", "#a", "? a", "! a", "&a", "*a", "%a", "@a", "`a", "[a", "{a", "|", ">", "'", '"', "---", "..."),
    *("$(AWS_SECRET_ACCESS_KEY)", "$$(A)", "$$$(A)", "$$", "$", "$(", "a$", "$()", "$(A", "$((A))", "${A}", "s3://b/$(A)/$$x", "\\", "é猫🐈"),
]  # fmt: skip


def rendered(words: list[str]) -> str:
    """The manifest of a packing with these arguments."""
    template = k8s._template("data/pack.yaml")
    return k8s._yaml(jobs.packing("digits", "s3://b/c", None, words, "y", SIZE, template, None).objects)


def arguments(tree: dict) -> list[list[str]]:
    """Of both containers, as they start: what the kubelet has made of what is written."""
    pods = [job["template"]["spec"]["template"]["spec"] for job in tree["spec"]["replicatedJobs"]]
    return [[substitute(word, SECRETS) for word in pod["containers"][0]["args"]] for pod in pods]


def test_kubectl_reads_each_word_as_it_was_written(tmp_path):
    """Fault: `--name y` is true, 1e-3 a number, and $(AWS_SECRET_ACCESS_KEY) in a path puts the secret there."""
    command = [tool("kubectl"), "annotate", "--local", "--filename=-", "a=b", "--output=json"]
    done = subprocess.run(
        command, input=rendered(CORPUS), env=offline(tmp_path), capture_output=True, text=True, check=True
    )
    tree = json.loads(done.stdout)
    assert tree["metadata"]["name"] == "y"
    assert arguments(tree) == [[*CORPUS, "--workers", "1"]] * 2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(
        st.text(
            st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.sampled_from("$()yno1e-_:.~ "), max_size=12
        )
    )
)
def test_any_word_survives(words):
    assert arguments(yaml.safe_load(rendered(words))) == [[*words, "--workers", "1"]] * 2


@pytest.mark.parametrize("word", ["a\nb", "a\x1b[2J", os.fsdecode(b"\xff"), "a\u2028b"])
def test_a_word_that_no_manifest_holds_is_refused(word):
    with pytest.raises(ConfigError, match="cannot hold"):
        rendered([word])


def test_a_model_of_the_kubelet():
    """Source: Kubernetes, third_party/forked/golang/expansion/expand_test.go."""
    for text, told in {
        "$(A)": "hunter2",
        "$$(A)": "$(A)",
        "$$$(A)": "$hunter2",
        "$(B)": "$(B)",
        "$(A": "$(A",
        "$": "$",
        "a$$b": "a$b",
    }.items():
        assert substitute(text, SECRETS) == told
