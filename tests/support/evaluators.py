"""Made-up real images, and what a small evaluation of them needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from warm_dist.evaluation.evaluator import Evaluator

EVAL = {"eval_nimg": 80, "num_images": 20, "extractor": "pixels", "grid": 2, "batch_size": 8, "kid_images": 12}
REAL = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)
Make = Callable[..., Evaluator]
