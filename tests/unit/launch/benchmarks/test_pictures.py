"""The benchmark's pictures."""

from __future__ import annotations

import zlib

from launch.benchmarks.pictures import crop, photographs


def test_pictures_are_the_same_in_every_run_and_differ() -> None:
    photos = photographs()
    images = [crop(photos, number) for number in range(50)]
    assert all(image.shape == (64, 64, 3) for image in images)
    assert len({image.tobytes() for image in images}) == 50
    assert zlib.crc32(images[0].tobytes()) == 2017775910  # what `crop(photographs(), 0)` gave when this was written
