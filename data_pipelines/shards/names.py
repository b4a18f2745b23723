"""Names of what packing writes beside the manifest."""

from __future__ import annotations

import re

PARTS = "parts"  # the folder of the records of finished shards
BAD = "bad_images.json"
LISTING = "packing.json"  # what the source's listing told
SHARD = re.compile(r"\d{6,}-[0-9a-f]{12}\.tar")  # number and hash
