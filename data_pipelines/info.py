"""Describe a data set by its manifest: `python -m data_pipelines.info MANIFEST_URL [--json]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.shards.manifest import Manifest, read_manifest
from data_pipelines.shards.packing_record import load_listing
from warm_dist.errors import printable, run
from warm_dist.paths import place_argument
from warm_dist.store.base import split_url
from warm_dist.store.open import open_store


def describe(manifest: Manifest, source: Sequence[str] = ()) -> dict[str, Any]:
    """Summarise a manifest. "images_per_class": fewest and most; None without classes. source: what its listing told."""
    info = manifest.info
    classes = np.bincount(manifest.label, minlength=info.num_classes) if info.num_classes else None
    return {
        "images": info.num_images,
        "resolution": info.resolution,
        "channels": info.channels,
        "classes": info.num_classes,
        "images_per_class": [int(classes.min()), int(classes.max())] if classes is not None else None,
        "class_names": list(manifest.class_names),
        "payload": manifest.payload,
        "shards": len(manifest.shards),
        "bytes": sum(shard.size_bytes for shard in manifest.shards),
        "bytes_per_image": float(manifest.length.mean()),
        "sigma_data": info.sigma_data,
        "channel_mean": info.channel_mean.tolist(),
        "attribution": manifest.attribution,
        "source": list(source),
        "fingerprint": info.fingerprint,
    }


def _text(facts: dict[str, Any]) -> str:
    names = facts["class_names"]
    few = ", ".join(names[:5]) + (f", … {names[-1]}" if len(names) > 5 else "")
    spread = "{} to {} images each: {}".format(*facts["images_per_class"], few) if names else "none"
    lines = {
        "images": f"{facts['images']:,}, {facts['resolution']} x {facts['resolution']} x {facts['channels']}",
        "classes": f"{facts['classes']:,}, {spread}" if names else "none",
        "shards": f"{facts['shards']:,}, {facts['bytes'] / 1e6:,.1f} MB",
        "payload": f"{facts['payload']}, {facts['bytes_per_image']:,.0f} bytes an image",
        "sigma_data": f"{facts['sigma_data']:.4f}",
        "channel means": ", ".join(f"{mean:.4f}" for mean in facts["channel_mean"]),
        "attribution": facts["attribution"] or "none",
        "fingerprint": facts["fingerprint"],
    }
    told = [("source" if number == 0 else "", line) for number, line in enumerate(facts["source"])]
    return "\n".join(f"{name:14}{printable(value)}" for name, value in [*lines.items(), *told])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.info", description=__doc__)
    parser.add_argument("manifest_url", type=place_argument, help="s3://bucket/prefix/manifest.parquet or a path")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    parser.add_argument("--json", action="store_true", help="one JSON object, with all class names")
    args = parser.parse_args()
    store = open_store(split_url(args.manifest_url)[0], args.endpoint_url)
    facts = describe(read_manifest(args.manifest_url, args.endpoint_url), load_listing(store))
    print(json.dumps(facts) if args.json else _text(facts))
    return 0


if __name__ == "__main__":
    run(main)
