"""Pictures for benchmarks: photographs where they are installed, cut to any size; and random ones for the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from warm_dist.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from warm_dist.config.run import Config
    from warm_dist.data import Batch, DataInfo
    from warm_dist.distributed.world import World
    from warm_dist.training.inputs import Prepared

SIZE = 64  # pixels
SCALES = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the photographs that crops are taken from


def photographs() -> list[list[NDArray[np.uint8]]]:
    """scikit-learn's two photographs, each in several sizes, (H, W, 3)."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise ConfigError("the pictures come with scikit-learn: pip install 'warm-dist[test]'") from None
    import numpy as np
    from PIL import Image

    photos = [Image.fromarray(image) for image in load_sample_images().images]
    return [
        [
            np.asarray(photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BOX))
            for scale in SCALES
        ]
        for photo in photos
    ]


def crop(photos: list[list[NDArray[np.uint8]]], number: int) -> NDArray[np.uint8]:
    """The picture of this number, (SIZE, SIZE, 3); the same in every run."""
    from warm_dist.rng import generator

    draw = generator(0, "bench", number).bit_generator.random_raw(4).tolist()
    image: NDArray[np.uint8] = photos[draw[0] % len(photos)][draw[1] % len(SCALES)]
    top, left = (bits % (extent - SIZE + 1) for bits, extent in zip(draw[2:], image.shape, strict=False))
    return image[top : top + SIZE, left : left + SIZE]


def made_up(config: Config) -> DataInfo:
    """Facts of a data set with a natural spectrum that nobody packed."""
    import numpy as np

    from warm_dist.data import LOW_MODES, DataInfo
    from warm_dist.diffusion.spectrum import fallback_spectrum

    size, channels = config.data.resolution, config.data.channels
    low = LOW_MODES**2 * channels
    return DataInfo(
        *(size, channels, config.data.num_classes, 1 << 20, np.zeros(channels), np.zeros((channels, size, size))),
        *(fallback_spectrum(size, size, 0.5).numpy(), 0.5, np.zeros(low), np.eye(low), "made up"),
    )


def images(config: Config, world: World) -> Iterator[Batch]:
    """This rank's batches: the same pictures over and over, at new positions."""
    import numpy as np

    from warm_dist.data import Batch
    from warm_dist.rng import generator

    share, nimg = config.train.batch_size // world.size, 0
    shape = (share, config.data.channels, config.data.resolution, config.data.resolution)
    pictures = generator(0, "bench", world.rank).integers(0, 256, shape, dtype=np.uint8)
    labels = np.full(share, 0 if config.data.num_classes else -1)
    while True:
        positions = np.arange(nimg + world.rank * share, nimg + (world.rank + 1) * share)
        yield Batch(pictures, labels, positions, tuple(map(str, positions)))
        nimg += config.train.batch_size


def prepared(config: Config, world: World) -> Prepared:
    """The inputs of one training step on made-up pictures."""
    from warm_dist.training.inputs import prepare

    return prepare(next(images(config, world)), config, made_up(config), world.device)
