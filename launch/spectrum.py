"""Analyse a data set's spectrum and suggest a BNR and a path: `launch/spectrum.py MANIFEST`.

Writes OUT/spectrum.png and OUT/spectrum.json; --mlflow-url also logs both to MLflow.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from launch.arguments import as_bnr
from warm_dist import errors
from warm_dist.config.urls import check_url
from warm_dist.errors import ConfigError
from warm_dist.paths import path_argument, place_argument


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=place_argument, metavar="MANIFEST", help="URL or path of a manifest.parquet")
    parser.add_argument("--endpoint-url", help="an S3 endpoint other than AWS's own")
    ratios = [0.1, 0.25, 0.5, 1.0, 2.0]
    parser.add_argument("--bnr", type=as_bnr, nargs="+", default=ratios, help="ratios to compare, at most 8")
    parser.add_argument("--out", type=path_argument, default=Path("spectrum"), help="output folder")
    parser.add_argument("--mlflow-url", help="also log both to this MLflow server")
    parser.add_argument("--experiment", default="warm-dist")
    args = parser.parse_args()
    if args.mlflow_url:
        check_url(args.mlflow_url, server=True, flag="--mlflow-url")
    if len(args.bnr) > 8:
        raise ConfigError("--bnr needs at most 8 ratios")

    from data_pipelines.shards.manifest import read_manifest
    from warm_dist.diffusion.analysis import suggested_bnr, suggested_path
    from warm_dist.diffusion.analysis_figure import spectrum_figure
    from warm_dist.files import make_folder, write_json

    info = read_manifest(args.manifest, args.endpoint_url).info
    path = suggested_path(info.power_spectrum)
    bnr = suggested_bnr(path)
    tree = _numbers(info, args.bnr, path, bnr)
    make_folder(args.out)
    picture, numbers = args.out / "spectrum.png", args.out / "spectrum.json"
    spectrum_figure(info.power_spectrum, info.sigma_data, args.bnr, path, bnr, picture)
    write_json(numbers, tree)
    errors.tell(_report(tree, path.model_dump()))
    errors.tell(f"{picture}  {numbers}")
    if args.mlflow_url:
        errors.tell(f"MLflow run {_log(args, tree, [picture, numbers])}")
    return errors.EXIT_OK


def _numbers(info: Any, bnrs: list[float], path: Any, bnr: float) -> dict[str, Any]:
    """All numbers of the figure, for JSON."""
    from warm_dist.config.bnr import ConstantBNR
    from warm_dist.diffusion.analysis import SIGMAS, alphas, radial, shares, snr

    rings = radial(info.power_spectrum)
    compared = []
    for ratio in bnrs:
        split = shares(info.power_spectrum, ConstantBNR(bnr=ratio))
        curves = {name: getattr(split, name).tolist() for name in (*split._fields, "price")}
        signal = {f"{s:g}": radial(snr(info.power_spectrum, s, ratio * s)).power.tolist() for s in (0.05, 0.5, 5.0)}
        compared.append({"bnr": ratio, "worst_price": max(curves["price"]), **curves, "snr_by_sigma": signal})
    return {
        "fingerprint": info.fingerprint,
        "num_images": info.num_images,
        "sigma_data": info.sigma_data,
        "frequency": rings.frequency.tolist(),
        "power": rings.power.tolist(),
        "sigma": SIGMAS.tolist(),
        "bnr": compared,
        "suggested_bnr": bnr,
        "suggested_path": path.model_dump(),
        "suggested_alpha": alphas(path, SIGMAS).tolist(),
    }


def _report(tree: dict[str, Any], path: dict[str, Any]) -> str:
    rows = [f"{tree['num_images']} images, sigma_data {tree['sigma_data']:.4f}, fingerprint {tree['fingerprint'][:12]}"]
    rows.append(f"{'BNR':>6}  {'deblurrer share of the error at σ = 0.05, 0.5, 5':<50}  worst price of blur")
    sigma = tree["sigma"]
    near = [min(range(len(sigma)), key=lambda k: abs(math.log(sigma[k] / s))) for s in (0.05, 0.5, 5)]
    for row in tree["bnr"]:
        part = "   ".join(f"{row['deblurrer'][k] / row['total'][k]:8.4f}" for k in near)
        rows.append(f"{row['bnr']:>6g}  {part:<50}  {row['worst_price']:.3f}")
    rows.append("suggested, to pass to launch/train.py:")
    rows.append(f"  --set process.bnr={tree['suggested_bnr']:.3g}")
    rows.append(f"  --set 'process.bnr={json.dumps(path, separators=(',', ':'))}'")
    return "\n".join(rows)


def _log(args: argparse.Namespace, tree: dict[str, Any], files: list[Path]) -> str:
    from warm_dist.tracking.client import log_finished

    values = {"suggested_bnr": tree["suggested_bnr"], "sigma_data": tree["sigma_data"]}
    values |= {f"worst_price/bnr_{row['bnr']:g}": row["worst_price"] for row in tree["bnr"]}
    fingerprint, num_images = tree["fingerprint"], tree["num_images"]
    params = {"manifest": args.manifest, "fingerprint": fingerprint, "num_images": num_images}
    metrics = {(key, 0): value for key, value in values.items()}
    run = f"spectrum-{fingerprint[:8]}", f"spectrum-{fingerprint}-{num_images}"
    return log_finished(args.mlflow_url, args.experiment, *run, params=params, metrics=metrics, files=files)


if __name__ == "__main__":
    errors.run(main)
