"""launch/k8s.py: the arithmetic, what it refuses, and that the overlays' jobs are what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import yaml

from tests.k8s.expand import expand
from tests.k8s.objects import containers
from tests.k8s.render import K8S, documented, parse, told
from tests.k8s.trainer import jobset_of
from tests.support.planted import Planted
from tests.support.processes import ROOT
from warm_dist.config.run import load_config
from warm_dist.config.sweep import load_sweep
from warm_dist.errors import ConfigError, WarmDistError, WorldSizeError
from warm_dist.kubernetes import checks
from warm_dist.kubernetes.jobs import JobSize
from warm_dist.sweeps.trials import trials

IMAGENET = ["render", "--config", "configs/imagenet64.json", "--nodes", "4", "--gpus", "8"]
STORED = ["--set", "checkpoint.url=s3://bucket/runs/imagenet64"]
TRAIN = [*IMAGENET, *STORED]
INCEPTION = ["--set", "eval.extractor=inception", "--set", f"eval.extractor_sha256={'0' * 64}"]
PACK = ["pack", "--nodes", "2", "--"]
SWEEP = ["render", "--config", "configs/sweep_bnr.json", "--nodes", "4", "--gpus", "8"]


def test_a_training_for_32_gpus():
    """Fault: a world size counted in nodes, or requests and limits for one GPU instead of a node's."""
    (settings, job), said = told(*TRAIN)
    assert "4 nodes x 8 GPUs = 32 processes; batch 4096 = 32 ranks x 32 images x 4 accumulations" in said
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
    assert trainer["resourcesPerNode"]["requests"] == {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8"}
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "512Gi", "nvidia.com/gpu": "8"}
    assert "env" not in trainer
    assert settings["immutable"]
    text = json.dumps(job)
    assert settings["metadata"]["name"] in text
    assert '{"name": "WORLD_SIZE", "value": "32"}' in text


@pytest.mark.parametrize(
    "words", [TRAIN, SWEEP, [*PACK, "digits", "s3://b/c", "--resolution", "8"]], ids=["training", "sweep", "pack"]
)
def test_nothing_of_the_environment_is_rendered(words, tmp_path, monkeypatch):
    planted = Planted(tmp_path)
    for name, value in planted.env.items():
        monkeypatch.setenv(name, value)
    objects, said = told(*words)
    assert planted.told(json.dumps(objects), said) == []


def test_the_config_in_the_pod_is_the_file_s_but_for_the_pod(tmp_path):
    (settings, _), _ = told(*TRAIN)
    path = tmp_path / "train.json"
    path.write_text(settings["data"]["train.json"])
    inside = load_config(path)
    there = ["output=/scratch/imagenet64", "data.cache_dir=/scratch/cache", "parallel.preemption_file=/scratch/stop"]
    there += ["tracking.mlflow_url=http://mlflow:5000", "tracking.run_name=imagenet64"]
    there += ["tracking.prometheus_port=9400", "tracking.prometheus_host=0.0.0.0", STORED[1]]
    assert inside == load_config(ROOT / "configs" / "imagenet64.json", there)


def test_a_config_map_is_named_after_its_content():
    names = set()
    for seed in ("1", "2", "1"):
        (settings, job), _ = told(*TRAIN, "--set", f"train.seed={seed}")
        assert f'"{settings["metadata"]["name"]}"' in json.dumps(job)
        names.add(settings["metadata"]["name"])
    assert len(names) == 2


def test_processes_on_the_cpu():
    """Fault: a job without GPUs that requests one, or that lacks DS_ACCELERATOR=cpu."""
    (_, job), said = told(*IMAGENET[:-2], *STORED, "--processes", "2", "--cpus", "3", "--memory", "5")
    assert "4 nodes x 2 processes = 8 processes" in said
    assert job["spec"]["trainer"]["resourcesPerNode"] == {
        "requests": {"cpu": "6", "memory": "10Gi"},
        "limits": {"memory": "10Gi"},
    }
    assert job["spec"]["trainer"]["env"] == [{"name": "DS_ACCELERATOR", "value": "cpu"}]


def test_memory_is_written_as_kubernetes_itself_would():
    (_, job), _ = told(*TRAIN, "--memory", "128")
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"]["memory"] == "1Ti"


def test_images_with_a_tag_or_a_digest():
    """Fault: a pattern that refuses a registry's port, a path or a digest."""
    for image in ("a/b:1", "reg.example:5000/a/b:1.2-x", f"a/b@sha256:{'0' * 64}"):
        checks.check_image(image)


def test_examples_are_named():
    """Fault: a placeholder rendered without a note, or a note about a value that the user has set."""
    _, said = told(*SWEEP)
    assert "note: s3://your-bucket is a placeholder; set yours with --set" in said
    assert "note: registry.example.com is a placeholder; set yours with --image" in said
    _, said = told(*SWEEP, "--image", "a/b:1", "--set", "output=s3://b/s", "--set", "data.manifest=s3://b/m")
    assert "note" not in said


def test_another_image_is_everywhere_in_a_training():
    objects, _ = told(*TRAIN, "--image", "other:1", "--name", "mine")
    assert [tree["kind"] for tree in objects] == ["ConfigMap", "TrainingRuntime", "TrainJob"]
    pods = expand(objects)
    assert len(pods) == 4
    for pod in pods:
        assert {container["image"] for container in containers(pod)} == {"other:1"}


@pytest.mark.parametrize("more", [[], ["--image", "other:1"], ["--gpus", "0", "--processes", "2"]])
def test_the_jobset_has_the_pods_that_trainer_would_make(more):
    runtime = yaml.safe_load((K8S / "base" / "training" / "runtime.yaml").read_text())
    objects, _ = told(*TRAIN, *more)
    train_job = objects[-1]
    own = next((tree for tree in objects if tree["kind"] == "TrainingRuntime"), runtime)
    (settings, jobset), _ = told(*TRAIN, *more, "--jobset")
    assert settings == objects[0]
    expected = jobset_of(train_job, own)
    assert jobset["spec"]["failurePolicy"] == expected["spec"]["failurePolicy"]
    assert jobset["metadata"] == train_job["metadata"]
    assert [pod["spec"] for pod in expand([jobset])] == [pod["spec"] for pod in expand([expected])]


def test_a_sweep(tmp_path):
    """Fault: pods that train other trials than the file lists, or Ray workers that offer less than their node."""
    (settings, job), said = told(*SWEEP)
    assert "24 trials of 8 processes, 4 at a time on 4 nodes x 8 GPUs" in said
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    assert group["rayStartParams"] | {"num-cpus": "64", "num-gpus": "8"} == group["rayStartParams"]
    for name, text in settings["data"].items():
        (tmp_path / name).write_text(text)
    inside, here = load_sweep(tmp_path / "sweep.json"), load_sweep(ROOT / "configs" / "sweep_bnr.json")
    assert [trial.name for trial in trials(*inside)] == [trial.name for trial in trials(*here)]
    assert inside[1]["tracking"]["mlflow_url"] == "http://mlflow:5000"
    assert inside[0].node_dir == "/scratch/sweeps"


@pytest.mark.parametrize(("arguments", "said"), [
    ([*SWEEP, "--gpus", "4"], "a trial needs 32 CPU and 8 GPU on each of 1 nodes"),
    ([*SWEEP, "--cpus", "3"], "a trial needs 32 CPU"),
    ([*SWEEP, "--set", "output=runs/sweep"], "output 'runs/sweep': pods cannot see your folders"),
    ([*SWEEP, "--set", "ray_address=10.0.0.1:6379"], "a RayJob starts its own Ray"),
    ([*SWEEP, "--jobset"], "--jobset is for a training"),
    ([*SWEEP, "--set", "space.train.nonsense={\"grid\": [1]}"], "nonsense"),
    (IMAGENET, "checkpoint.url is null"),
    ([*TRAIN, "--set", "data.manifest=/data/manifest.parquet"], "data.manifest '/data/manifest.parquet': pods cannot see your folders"),
    ([*IMAGENET, "--set", "checkpoint.url=/data"], "checkpoint.url '/data': pods cannot see your folders"),
    ([*TRAIN, "--set", "data.endpoint_url=http://127.0.0.1:8333"], "is the pod itself"),
    ([*TRAIN, "--set", "tracking.mlflow_url=http://localhost:5000"], "is the pod itself"),
    ([*TRAIN, *INCEPTION, "--set", "eval.extractor_url=inception.pt"], "eval.extractor_url inception.pt is a path"),
    ([*TRAIN, "--set", "train.nonsense=1"], "nonsense"),
    ([*TRAIN, "--nodes", "0"], "must be positive"),
    ([*TRAIN, "--processes", "4"], "4 processes cannot use 8 GPUs"),
    ([*TRAIN, "--name", "Not_A_Name"], "name 'Not_A_Name'"),
    ([*TRAIN, "--name", "a" * 41], "at most 40"),
    ([*TRAIN, "--set", "tracking.mlflow_url=https://me:secret@mlflow.example"], "--set tracking.mlflow_url: holds a user, password"),
    ([*TRAIN, *INCEPTION, "--set", "eval.extractor_url=https://x.example/i.pt?X-Amz-Signature=abc"], "--set eval.extractor_url: holds a user, password"),
    ([*SWEEP, "--set", "endpoint_url=https://me:secret@s3.example"], "--set endpoint_url: holds a user, password"),
    ([*SWEEP, "--set", "tracking.mlflow_url=https://me:secret@mlflow.example"], "holds a user, password"),
    ([*SWEEP, "--set", "data.endpoint_url=http://[::1]:8333"], "is the pod itself"),
    ([*PACK, "photos", "photos64", "--resolution", "64"], "out_url 'photos64': pods cannot see your folders"),
    ([*PACK, "/home/me", "s3://b/c", "--resolution", "64"], "source '/home/me': pods have openmoji, digits, and the claim `images` at /images"),
    ([*PACK, "/images/../etc", "s3://b/c", "--resolution", "64"], "source '/images/../etc'"),
    ([*PACK, "/imagesX", "s3://b/c", "--resolution", "64"], "source '/imagesX'"),
    ([*PACK, "train", "s3://b/c", "--resolution", "64"], "source 'train'"),
    ([*PACK, "digits", "s3://b/c", "--resolution", "8", "--endpoint-url", "http://127.0.0.1:1"], "is the pod itself"),
    ([*PACK, "digits", "s3://b/c", "--resolution", "8", "--work", "3"], "follow from"),
    ([*PACK, "digits", "s3://b/c", "--resolution", "8", "--workers=3"], "follow from"),
    ([*TRAIN, "--set", "data.cache_dir=/mnt/nvme"], "data.cache_dir /mnt/nvme: a pod can write below /scratch only"),
    ([*TRAIN, "--set", "eval.cache_dir=/scratch/../x"], "eval.cache_dir"),
    ([*TRAIN, "--set", "checkpoint.endpoint_url=10.0.0.1:9000"], "needs the URL of a server, http://… or https://…"),
    ([*TRAIN, "--set", "checkpoint.endpoint_url=http://0.0.0.0:9000"], "is the pod itself"),
    ([*TRAIN, "--name", "warm-dist"], "that all jobs share"),
    ([*TRAIN, "--name", "mlflow"], "that all jobs share"),
    ([*TRAIN, "--image", "warm-dist:latest"], "needs a tag other than latest"),
    ([*TRAIN, "--image", "warm-dist"], "needs a tag other than latest"),
    ([*TRAIN, "--image", ""], "needs a tag other than latest"),
    ([*SWEEP, "--set", f"set={json.dumps({'eval.extractor': 'inception', 'eval.extractor_url': '/i.pt', 'eval.extractor_sha256': '0' * 64})}"],
     "eval.extractor_url /i.pt is a path"),
    ([*PACK, "digits", "s3://b/c", "--resolution", "8", "--part", "1/2"], "follow from"),
])  # fmt: skip
def test_what_a_pod_cannot_do_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        told(*arguments)


def test_a_world_that_cannot_share_the_batch_is_refused_with_those_that_can():
    with pytest.raises(WorldSizeError, match=r"24 processes cannot share .* valid world sizes: 1, 2, 4, 8, 16, 32"):
        told(*TRAIN, "--nodes", "3")


def test_an_error_is_one_line_and_nothing_on_stdout():
    done = subprocess.run(
        [sys.executable, "launch/k8s.py", *IMAGENET], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("ConfigError: checkpoint.url")


def test_the_overlays_jobs_are_what_the_readme_s_commands_print():
    jobs = {path for path in K8S.glob("overlays/*/jobs/*.yaml") if path.stem != "kustomization"}
    assert {path for _, path in documented()} == jobs
    for arguments, path in documented():
        assert told(*arguments)[0] == parse(path.read_text()), path


def test_sizes_are_checked_where_they_are_made():
    for wrong in ({"nodes": 0}, {"gpus": -1}, {"processes": 0}, {"cpus": 0}, {"memory_gib": 0}, {"gpus": 3}):
        with pytest.raises(WarmDistError):
            JobSize(**{"nodes": 1, "gpus": 0, "processes": 2, "cpus": 1, "memory_gib": 1, **wrong})
    assert checks.check_name("a" * 40) is None
