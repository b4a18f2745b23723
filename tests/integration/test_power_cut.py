"""A power cut at random moments of a run that saves: what it had announced is intact afterwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.checkpoints import Fixture
from warm_dist.checkpoints.format import CHECKPOINTS, complete_names, nimg_of
from warm_dist.records import read_record
from warm_dist.runs.folder import Attempt
from warm_dist.runs.metrics import read_metrics

CUTS = 6
WRITER = """
import sys
from pathlib import Path
from tests.support.checkpoints import Fixture
from warm_dist.records import write_record
from warm_dist.runs.metrics import MetricsLog
run = Path(sys.argv[1])
mine = Fixture(run, [], keep_last=2)
log = MetricsLog(run / "metrics.jsonl", 1)
log.begin()
for nimg in range(8, 80_000, 8):
    write_record(run / "run.json", {"attempt": nimg})
    log.write(nimg, "train", loss=1.0)
    log.sync()
    mine.save(nimg)
    print(nimg, flush=True)
"""


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 file system in a file, which shows what has reached the disk."""
    path = tmp_path / "disk.img"
    if os.geteuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("only root may mount a file system here, and mkfs.ext4 makes it")
    with path.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)
    try:
        with mounted(path, tmp_path / "probe"):
            pass
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device can be mounted here: {error.stderr.decode().strip()}")
    return path


def test_what_was_saved_survives_the_cut(image: Path, tmp_path: Path) -> None:
    """Fault: nothing is synced, and after a cut every kept checkpoint is empty."""
    said: list[str] = []
    cuts, moments = list[tuple[Path, int]](), random.Random(4)
    with mounted(image, tmp_path / "disk") as disk:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(disk / "run")], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        try:
            for number in range(CUTS):
                for _ in range(3 + number):
                    last = int(writer.stdout.readline())
                time.sleep(moments.uniform(0, 0.02))
                writer.send_signal(signal.SIGSTOP)
                cut = tmp_path / f"cut{number}.img"
                shutil.copyfile(image, cut)
                cuts.append((cut, last))
                writer.send_signal(signal.SIGCONT)
        finally:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    for cut, last in cuts:
        with mounted(cut, tmp_path / "after") as disk:
            mine = Fixture(disk / "run", said)
            restored = mine.restore()
            assert restored is not None
            assert restored >= last, f"announced {last}, found {complete_names(mine.storage.local, CHECKPOINTS)}"
            assert said == [], "no checkpoint is damaged"
            # the end of an older one reaches the disk with the next save
            assert all(nimg_of(name) >= last - 16 for name in complete_names(mine.storage.local, CHECKPOINTS))
            assert max(record["nimg"] for record in read_metrics(disk / "run" / "metrics.jsonl")) >= last
            attempt = read_record(disk / "run" / "run.json", Attempt)
            assert attempt is not None
            assert attempt.attempt >= last
