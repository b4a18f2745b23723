"""Pictures for benchmarks: photographs where they are installed, cut to any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warm_dist.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
