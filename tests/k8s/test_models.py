"""What the checks rest on where a planted mistake does not show it: a shell's words, CEL, strict schemas, the lack of CRDs."""

from __future__ import annotations

import pytest

from tests.k8s import crds
from tests.k8s.expand import substitute
from tests.k8s.programs import program, shell
from tests.k8s.render import Object


def test_words_are_what_kubelet_and_shell_make_of_them():
    assert substitute("$(A)/$(B)/$$(A)/$((A + 1))", {"A": "1"}) == "1/$(B)/$(A)/$((A + 1))"
    script = 'touch "$0" && exec python -m x "$@" --part "$((I + 1))/${N:-8}"; sleep 1'
    told = [["touch", "sh"], ["python", "-m", "x", "s3://b/c", "a b", "--part", "1/8"]]
    assert shell(("/bin/sh", "-c", script, "sh", "s3://b/c", "a b"), (("I", "0"),)) == told
    assert program(["python", "/opt/warm-dist/launch/sweep.py", "--x"], "/tmp") == ("launch.sweep", ["--x"])
    assert program(["python", "-m", "data_pipelines.pack", "a"]) == ("data_pipelines.pack", ["a"])
    assert program(["python", "-c", "pass"]) is program(["mlflow", "server"]) is None


def test_a_rule_that_cannot_be_evaluated_is_no_pass():
    assert crds.broken({"rule": "self.a.b == quantity(self.c)"}, {"a": {}, "c": "1"}).startswith("rule cannot be")
    assert crds.broken({"rule": "self.a > 1 &&"}, {"a": 2}).startswith("rule cannot be evaluated")
    assert crds.broken({"rule": "self == oldSelf"}, {"a": 2}) == "", "of changes only"
    assert crds.broken({"rule": "self.a > 1", "message": "too small"}, {"a": 1}) == "too small"


def test_a_schema_is_strict_and_fills_in_defaults():
    mode = {"type": "string", "default": "A", "enum": ["A", "B"]}
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    kinds = {"free": free, "none": {"type": "string", "nullable": True}, "mode": mode, "empty": {"type": "object"}}
    keyed = {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    schema = {"type": "object", "properties": kinds | {"keyed": keyed}}
    for tree in ({"free": {"x": 1}}, {"none": None}, {"keyed": [{"name": "a"}, {"name": "b"}]}):
        assert crds.Validator(schema).is_valid(tree), tree
    for tree in (
        {"mode": "C"},
        {"mode": None},
        {"other": 1},
        {"empty": {"x": 1}},
        {"keyed": [{"name": "a"}, {"name": "a"}]},
    ):
        assert not crds.Validator(schema).is_valid(tree), tree
    tree: Object = {}
    crds.default(schema, tree)
    assert tree == {"mode": "A"}


def test_crds_that_lack_are_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr(crds, "crds", crds.crds.__wrapped__)
    monkeypatch.setenv("K8S_CRDS", str(tmp_path))
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="NO CUSTOM RESOURCE WAS CHECKED"):
        crds.need_crds()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="NO CUSTOM RESOURCE WAS CHECKED"):
        crds.need_crds()
