"""Our models of Kubernetes, its operators and a shell, by exact answers: what the checks say rests on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.k8s import crds
from tests.k8s.expand import expand, substitute
from tests.k8s.failures import AGAIN, FAIL, FREE, RESTART, outcome
from tests.k8s.network import DNS, NODE, OUTSIDE, STRANGER, End, passes
from tests.k8s.objects import quantity, selects
from tests.k8s.programs import arithmetic, program, shell, variables
from tests.k8s.queueing import requests
from tests.k8s.render import Object
from tests.k8s.security import restricted
from tests.k8s.trainer import jobset_of, merge


def test_a_patch_is_merged_by_name():
    tree = {"volumes": [{"name": "a", "configMap": {"name": "x"}}, {"name": "b"}], "tolerations": [{"key": "k"}]}
    patch = {"volumes": [{"name": "a", "configMap": {"name": "y"}}, {"name": "c"}], "tolerations": [{"key": "l"}]}
    volumes = [{"name": "a", "configMap": {"name": "y"}}, {"name": "b"}, {"name": "c"}]
    assert merge(tree, patch) == {"volumes": volumes, "tolerations": [{"key": "l"}]}


def test_words_are_what_kubelet_and_shell_make_of_them():
    assert substitute("$(A)/$(B)/$$(A)/$((A + 1))", {"A": "1"}) == "1/$(B)/$(A)/$((A + 1))"
    assert arithmetic("I + 1", {"I": "3"}) == 4
    script = 'exec python -m x "$@" --part "$((I + 1))/${N:-8}" && echo done; true'
    assert shell(script, {"I": "0"}, ["sh", "s3://b/c", "a b"]) == [
        ["exec", "python", "-m", "x", "s3://b/c", "a b", "--part", "1/8"],
        ["echo", "done"],
        ["true"],
    ]
    with pytest.raises(ValueError, match="not understood"):
        arithmetic("I ** 2", {"I": "3"})


def test_a_rule_that_cannot_be_evaluated_is_no_pass():
    assert crds._broken({"rule": "self.a.b == quantity(self.c)"}, {"a": {}, "c": "1"}).startswith(
        "rule cannot be evaluated"
    )
    assert crds._broken({"rule": "self.a > 1 &&"}, {"a": 2}).startswith("rule cannot be evaluated")
    assert crds._broken({"rule": "self == oldSelf"}, {"a": 2}) == "", "of changes only"
    assert crds._broken({"rule": "has(self.__namespace__)", "message": "none"}, {"namespace": "x"}) == ""
    assert crds._broken({"rule": "self.a > 1", "message": "too small"}, {"a": 1}) == "too small"


def test_a_schema_is_strict_and_fills_in_defaults():
    schema = {
        "type": "object",
        "properties": {
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "port": {"x-kubernetes-int-or-string": True},
            "none": {"type": "string", "nullable": True},
            "mode": {"type": "string", "default": "A", "enum": ["A", "B"]},
            "empty": {"type": "object"},
        },
    }
    validator = crds.jsonschema.Draft202012Validator(crds._strict(schema))
    for tree in ({"free": {"x": 1}}, {"port": "http"}, {"port": 1}, {"none": None}):
        assert validator.is_valid(tree), tree
    for tree in ({"port": 1.5}, {"mode": "C"}, {"mode": None}, {"other": 1}, {"empty": {"x": 1}}):
        assert not validator.is_valid(tree), tree
    tree: Object = {}
    crds.default(schema, tree)
    assert tree == {"mode": "A"}


def test_crds_that_lack_are_told_of(monkeypatch, tmp_path):
    monkeypatch.setenv("K8S_CRDS", str(tmp_path))
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="NO CUSTOM RESOURCE WAS CHECKED"):
        crds.need_crds()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="lacks clusterqueues"):
        crds.need_crds()


def test_quantities_and_selectors():
    assert [quantity(text) for text in ("500m", "2", "16Gi", "1k", 8)] == [0.5, 2, 2**34, 1000, 8]
    with pytest.raises(ValueError, match="no quantity"):
        quantity("8 GB")
    labels = {"a": "1", "b": "2"}
    assert selects({}, labels)
    assert not selects(None, labels)
    assert selects(
        {"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "In", "values": ["2"]}]}, labels
    )
    for item in ({"key": "c", "operator": "Exists"}, {"key": "a", "operator": "NotIn", "values": ["1"]}):
        assert not selects({"matchExpressions": [item]}, labels)
    assert selects({"matchExpressions": [{"key": "c", "operator": "DoesNotExist"}]}, labels)


def test_a_pod_asks_for_its_containers_together_or_for_its_largest_init_container():
    def container(cpu: str, **more: Any) -> Object:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    small = {
        "spec": {"initContainers": [container("2"), container("3")], "containers": [container("1"), container("1500m")]}
    }
    assert requests(small) == {"cpu": 3}
    large = {
        "spec": {
            "initContainers": [container("1", restartPolicy="Always")],
            "containers": [container("1"), container("1500m")],
        }
    }
    assert requests(large) == {"cpu": 3.5}, "a sidecar goes on"
    assert requests({"spec": {"containers": [{"resources": {"limits": {"memory": "1Gi"}}}]}}) == {"memory": 2**30}


TEMPLATE: Object = {
    "metadata": {"labels": {"app": "x"}},
    "spec": {"containers": [{"name": "main", "image": "a:1", "command": ["run", "$(NAME)"], "env": [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "ADDRESS", "value": "$(NAME).$(OTHER)"},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]}]},
}  # fmt: skip


def _made(kind: str, spec: Object) -> list[Object]:
    return expand(
        [{"apiVersion": "v1", "kind": kind, "metadata": {"name": "x", "namespace": "n"}, "spec": copy.deepcopy(spec)}]
    )


def test_controllers_make_pods():
    for kind, spec, names in [
        ("Deployment", {"replicas": 2, "template": TEMPLATE}, ["x-0", "x-1"]),
        ("StatefulSet", {"serviceName": "s", "template": TEMPLATE}, ["x-0"]),
        ("Job", {"template": TEMPLATE}, ["x-0"]),
        ("CronJob", {"jobTemplate": {"spec": {"completions": 2, "completionMode": "Indexed", "template": TEMPLATE}}}, ["x-0", "x-1"]),
        ("JobSet", {"replicatedJobs": [{"name": "r", "replicas": 2, "template": {"spec": {"template": TEMPLATE}}}]}, ["x-r-0-0", "x-r-1-0"]),
    ]:  # fmt: skip
        pods = _made(kind, spec)
        assert [pod["metadata"]["name"] for pod in pods] == names
        assert {pod["metadata"]["namespace"] for pod in pods} == {"n"}
        (container,) = pods[0]["spec"]["containers"]
        assert container["command"] == ["run", names[0]]
        assert variables(container) | {"JOB_COMPLETION_INDEX": ""} == {
            "NAME": names[0],
            "ADDRESS": f"{names[0]}.$(OTHER)",
            "JOB_COMPLETION_INDEX": "",
        }
        assert "valueFrom" in container["env"][2], "known on its node only"


def test_an_index_is_a_label_a_name_and_a_variable():
    spec = {"network": {"subdomain": "sub"}, "replicatedJobs": [
        {"name": "r", "template": {"spec": {"completions": 2, "parallelism": 2, "template": TEMPLATE}}}
    ]}  # fmt: skip
    pod = _made("JobSet", spec)[1]
    assert pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == "1"
    assert pod["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] == "x"
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("x-r-0-1", "sub")
    assert variables(pod["spec"]["containers"][0])["JOB_COMPLETION_INDEX"] == "1"
    assert pod["spec"]["restartPolicy"] == "OnFailure", "JobSet's webhook"


def test_ray_s_pods_have_the_token_and_workers_wait_for_the_head():
    cluster = {
        "authOptions": {"mode": "token", "secretName": "t"},
        "headGroupSpec": {"template": TEMPLATE},
        "workerGroupSpecs": [{"groupName": "g", "replicas": 2, "template": TEMPLATE}],
    }
    pods = _made("RayJob", {"entrypoint": "true", "rayClusterSpec": cluster})
    assert [pod["metadata"]["name"] for pod in pods] == ["x-head", "x-g-worker-0", "x-g-worker-1", "x-submitter"]
    assert [len(pod["spec"].get("initContainers", [])) for pod in pods] == [0, 1, 1, 0]
    assert pods[3]["spec"]["containers"][0]["image"] == "a:1"
    for pod in pods:
        (token,) = [item for item in pod["spec"]["containers"][0]["env"] if item["name"] == "RAY_AUTH_TOKEN"]
        assert token["valueFrom"] == {"secretKeyRef": {"name": "t", "key": "auth_token"}}
    assert len(_made("RayJob", {"submissionMode": "HTTPMode", "rayClusterSpec": cluster})) == 3


def test_a_train_job_overrides_its_runtime():
    node = {
        "name": "node",
        "image": "a:1",
        "args": ["old"],
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
    }
    pod = {"initContainers": [{"name": "check"}, {"name": "other"}], "containers": [node, {"name": "side"}]}
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    job = {"name": "node", "template": {"metadata": {"labels": labels}, "spec": {"template": {"spec": pod}}}}
    torch = {"envInjection": {"targets": [{"jobName": "node", "containerNames": ["check"]}]}}
    runtime = {"spec": {"mlPolicy": {"numNodes": 2, "torch": torch}, "template": {"spec": {"replicatedJobs": [job]}}}}
    limits = {"limits": {"nvidia.com/gpu": "4"}}
    trainer = {"image": "b:2", "args": ["new"], "env": [{"name": "B", "value": "3"}], "resourcesPerNode": limits}
    train = {"metadata": {"name": "t", "namespace": "n"}, "spec": {"trainer": trainer}}
    made = jobset_of(train, runtime)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (made["parallelism"], made["completions"]) == (2, 2)
    check, other = made["template"]["spec"]["initContainers"]
    main, side = made["template"]["spec"]["containers"]
    assert (main["image"], main["args"], main["resources"], main["ports"]) == (
        "b:2",
        ["new"],
        limits,
        [{"containerPort": 29500}],
    )
    assert {"A": "1", "B": "3", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4"}.items() <= variables(main).items()
    assert "PET_MASTER_ADDR" in variables(check)
    assert other == {"name": "other"}
    assert side == {"name": "side"}
    assert node["args"] == ["old"], "the runtime is as it was"


def _policy(spec: Object) -> Object:
    return {"kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "n"}, "spec": spec}


def test_network_policies_are_a_sum_of_what_they_allow():
    def end(name: str) -> End:
        ports = [{"name": "web", "containerPort": 80}]
        return End(name, "n", {"app": name}, {"spec": {"containers": [{"ports": ports}]}})

    a, b = end("a"), end("b")
    to_b = {"podSelector": {"matchLabels": {"app": "b"}}}
    out = _policy({"podSelector": to_b["podSelector"] | {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"], "egress": [
        {"to": [to_b], "ports": [{"port": "web"}, {"port": 8000, "endPort": 8010}]},
        {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}], "ports": [{"port": 443}]},
        {"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}], "ports": [{"protocol": "UDP", "port": 53}]},
    ]})  # fmt: skip
    assert passes([], a, b, 1234), "without a policy everything is open"
    for target, port, protocol, right in [
        (b, 80, "TCP", True), (b, 80, "UDP", False), (b, 8010, "TCP", True), (b, 8011, "TCP", False), (a, 80, "TCP", False),
        (OUTSIDE, 443, "TCP", True), (OUTSIDE, 80, "TCP", False), (NODE, 443, "TCP", False), (DNS, 53, "UDP", True), (DNS, 53, "TCP", False),
        (STRANGER, 53, "UDP", False),
    ]:  # fmt: skip
        assert passes([out], a, target, port, protocol) == right, (target.name, port)
    assert passes([out], b, a, 80), "of another pod it says nothing"
    closed = _policy({"podSelector": {}, "policyTypes": ["Ingress"]})
    assert not passes([out, closed], a, b, 80), "both ends must allow it"
    opened = _policy({"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]})
    assert passes([out, closed, opened], a, b, 80)
    assert not passes([opened], STRANGER, b, 80), "a pod selector is of the policy's own namespace"
    assert passes([out], a, b, 443, doubt=True), "who knows whether an address block has the pod"


def test_a_job_s_end_is_what_the_controllers_make_of_it():
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [2]}},
        {"action": "Count", "onExitCodes": {"operator": "In", "values": [3]}},
        {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0, 4]}},
    ]
    job: Object = {"name": "r", "template": {"spec": {"backoffLimit": 0, "podFailurePolicy": {"rules": rules}}}}
    policy = {"maxRestarts": 1, "rules": [
        {"name": "a", "action": FREE, "onJobFailureReasons": ["PodFailurePolicy"], "onJobFailureMessagePatterns": ["exit code 2 .* index 1$"]},
        {"name": "b", "action": FAIL, "onJobFailureReasons": ["PodFailurePolicy"], "targetReplicatedJobs": ["r"]},
    ]}  # fmt: skip
    jobset: Object = {"metadata": {"name": "j", "namespace": "n"}, "spec": {"failurePolicy": policy}}
    for code, disrupted, container, end in [
        (2, True, "main", AGAIN), (2, False, "main", FREE), (2, False, "side", FAIL), (3, False, "main", RESTART), (4, False, "main", RESTART),
        (5, False, "main", FAIL),
    ]:  # fmt: skip
        assert outcome(jobset, job, container, code, disrupted) == end, (code, disrupted, container)
    job["template"]["spec"]["backoffLimit"] = 1
    assert outcome(jobset, job, "main", 3, False) == AGAIN
    del job["template"]["spec"]["backoffLimit"], jobset["spec"]["failurePolicy"]
    assert outcome(jobset, job, "main", 3, False) == AGAIN, "the default is 6"
    assert outcome(jobset, job, "main", 2, False) == FAIL, "without a policy a failed Job is the end"


SAFE: Object = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {"name": "c", "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
    ],
}


@pytest.mark.parametrize(("where", "change", "told"), [
    ("container", {}, ""),
    ("container", {"capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}, ""),
    ("container", {"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}, "SYS_PTRACE"),
    ("container", {"capabilities": {"drop": ["NET_RAW"]}}, "drop ALL"),
    ("container", {"privileged": True}, "privileged"),
    ("container", {"runAsUser": 0}, "runAsUser is 0"),
    ("container", {"runAsNonRoot": False}, "runAsNonRoot"),
    ("container", {"procMount": "Unmasked"}, "procMount"),
    ("container", {"seccompProfile": {"type": "Unconfined"}}, "seccompProfile"),
    ("container", {"appArmorProfile": {"type": "Unconfined"}}, "appArmorProfile"),
    ("container", {"seLinuxOptions": {"type": "spc_t"}}, "seLinuxOptions"),
    ("container", {"windowsOptions": {"hostProcess": True}}, "hostProcess"),
    ("pod", {"securityContext": {"runAsNonRoot": True}}, "no seccompProfile"),
    ("pod", {"securityContext": {**SAFE["securityContext"], "runAsUser": 0}}, "runAsUser is 0"),
    ("pod", {"securityContext": {**SAFE["securityContext"], "sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}, "sysctl"),
    ("pod", {"hostPID": True}, "hostPID"),
    ("pod", {"volumes": [{"name": "v", "nfs": {}}]}, "of kind nfs"),
    ("pod", {"volumes": [{"name": "v", "emptyDir": {}}]}, ""),
    ("spec", {"ports": [{"containerPort": 80, "hostPort": 80}]}, "hostPort"),
    ("spec", {"livenessProbe": {"httpGet": {"host": "example.com"}}}, "names a host"),
])  # fmt: skip
def test_the_restricted_profile(where: str, change: Object, told: str):
    spec = copy.deepcopy(SAFE)
    target = {"container": spec["containers"][0]["securityContext"], "pod": spec, "spec": spec["containers"][0]}[where]
    target.update(change)
    metadata = {"name": "p", "ownerReferences": [{"kind": "Pod", "name": "p"}]}
    messages = restricted([], [{"metadata": metadata, "spec": spec}])
    assert told in "".join(messages)
    assert bool(messages) == bool(told)


def test_programs_are_known_by_what_python_is_given():
    assert program(["exec", "python3.11", "-u", "launch/train.py", "--x"]) == ("launch.train", ["--x"])
    assert program(["A=1", "/opt/venv/bin/python", "-m", "data_pipelines.pack", "a"]) == ("data_pipelines.pack", ["a"])
    assert program(["python", "/opt/warm-dist/launch/sweep.py"]) == ("launch.sweep", [])
    assert program(["python", "-c", "pass"]) is None
    assert program(["mlflow", "server"]) is None
