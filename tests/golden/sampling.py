"""Images of every sampler and of both guidances, as sha256; weights that are exported after training; pictures of the process."""

from __future__ import annotations

import re
from typing import Any

from tests.golden.training import train
from tests.golden.workshop import Workshop

MAIN = "long"
GUIDE = "guide.safetensors"
POWER = '{"kind":"power","bnr":0.5,"exponent":0.2,"sigma_ref":1.0,"cap":2.0}'
FALLING = '{"kind":"power","bnr":0.5,"exponent":-0.2}'
TABLE = '{"kind":"table","sigma":[0.1,1,10],"bnr":[1,0.5,0.5]}'
SAMPLES = {
    "heun": "--method heun --nfe 17",
    "first_order": "--method first_order --nfe 17",
    "multistep": "--method multistep --nfe 17",
    "churn": "--method churn --nfe 17",
    "ancestral": "--method ancestral --nfe 17",
    "the config's own": "",
    "heun, bnr 0": "--method heun --nfe 17 --bnr 0",
    "heun, bnr 2": "--method heun --nfe 17 --bnr 2",
    "heun, power": f"--method heun --nfe 17 --set sampler.bnr={POWER}",
    "heun, table": f"--method heun --nfe 17 --set sampler.bnr={TABLE}",
    "multistep, bnr 0": "--method multistep --nfe 17 --bnr 0",
    "multistep, falling power": f"--method multistep --nfe 17 --set sampler.bnr={FALLING}",
    "churn 0": "--method churn --nfe 17 --set sampler.s_churn=0",
    "churn 10": "--method churn --nfe 17 --set sampler.s_churn=10 --set sampler.s_max=20 --set sampler.s_noise=1",
    "churn, power": f"--method churn --nfe 17 --set sampler.bnr={POWER}",
    "ancestral, eta 0": "--method ancestral --nfe 17 --set sampler.eta=0",
    "ancestral, eta 0.5": "--method ancestral --nfe 17 --set sampler.eta=0.5",
    "ancestral, bnr 0": "--method ancestral --nfe 17 --bnr 0",
    "ancestral, table": f"--method ancestral --nfe 17 --set sampler.bnr={TABLE}",
    "log-linear": "--method heun --nfe 17 --set sampler.grid=log_linear --set sampler.sigma_max=20",
    "levels": "--method first_order --nfe 4 --set sampler.grid=[40,5,1,0.1]",
    "rho 3, plain start": "--method heun --nfe 17 --set sampler.rho=3 --set sampler.start=plain",
    "classifier-free 2": "--method heun --nfe 17 --set sampler.guidance=2",
    "classifier-free 0.5": "--method ancestral --nfe 17 --set sampler.guidance=0.5",
    "autoguidance 1.5": f"--method heun --nfe 17 --set sampler.guidance=1.5 --set sampler.guide={GUIDE}",
    "autoguidance 2": f"--method churn --nfe 17 --set sampler.guidance=2 --set sampler.guide={GUIDE}",
    "label 7": "--method heun --nfe 17 --label 7",
}
"""Name → arguments of launch/sample.py, with the weights of MAIN."""
CASES: dict[str, dict[str, str]] = {
    MAIN: SAMPLES,
    "cold": {name: f"--method {name} --nfe 17" for name in ("cold", "heun", "first_order", "multistep", "ancestral")}
    | {
        "churn": "--method churn --nfe 17 --set sampler.s_min=0",
        "plain start": "--method cold --nfe 17 --set sampler.start=plain",
        "levels": "--method cold --nfe 3 --set sampler.grid=[4,1,0.2]",
    },
    "uniform": {
        "bnr 0.2": "--nfe 5 --bnr 0.2",
        "bnr 1.5": "--method heun --nfe 5 --bnr 1.5",
        "power": f"--nfe 5 --set sampler.bnr={POWER}",
    },
    "log-uniform": {"ancestral": "--nfe 5"},
    "power": {"ancestral": "--nfe 5"},
    "table": {"ancestral": "--nfe 5"},
    "per-frequency": {"heun": "--method heun --nfe 5", "ancestral": "--nfe 5"},
    "colour": {"heun": "--method heun --nfe 5", "ancestral": "--nfe 5"},
    "zero2-bf16-2": {"ancestral": "--nfe 5"},
}
"""Run → name → arguments."""


def values(shop: Workshop) -> dict[str, Any]:
    """The sha256 of the images, and what the command says of them."""
    train(shop, list(CASES))
    _make_guide(shop)
    pairs = [(run, name) for run, cases in CASES.items() for name in cases]
    said = shop.out(*(_sample(run, *CASES[run][name].split(), "--out", _file(run, name)) for run, name in pairs))
    out: dict[str, Any] = {run: {} for run in CASES}
    for (run, name), text in zip(pairs, said, strict=True):
        out[run][name] = {
            "images": shop.sha(_file(run, name)),
            "says": re.sub("sha256 [0-9a-f]{12}", "sha256 …", text).splitlines(),
        }
    shop.out(_sample(MAIN, "--nfe", "5", "--out", "samples/grid.png"))
    return out | {"grid.png": shop.sha("samples/grid.png")}


def _sample(run: str, *words: str) -> list[str]:
    return ["launch/sample.py", "--weights", f"runs/{run}", "--n", "32", "--seed", "3", "--batch-size", "12", *words]


def _file(run: str, name: str) -> str:
    return f"samples/{run}-{re.sub('[^a-z0-9.]+', '-', name)}.npy"


def _make_guide(shop: Workshop) -> None:
    """The main run's weights at an earlier time."""
    shop.out(f"launch/export.py runs/{MAIN} --nimg 6400 --out {GUIDE}".split())


def exported(shop: Workshop) -> dict[str, Any]:
    """Weights of every kind that a run's checkpoints and snapshots hold, and EMAs of a length that was not tracked."""
    runs = ["local-fp32-1", "zero3-fp32-2"]
    train(shop, runs)
    commands = []
    for run in runs:
        for kind in ("ema", "master", "ema_0.05"):
            commands.append(
                f"launch/export.py runs/{run} --kind {kind} --out exported/{run}-{kind}.safetensors".split()
            )
        commands.append(f"launch/export.py runs/{run} --nimg 80 --out exported/{run}-80.safetensors".split())
        commands.append(f"launch/ema.py runs/{run} --length 0.08 0.2 --out exported/{run}-lengths".split())
    told = shop.out(*commands)
    files = sorted(path for path in (shop.folder / "exported").rglob("*.safetensors"))
    out: dict[str, Any] = {str(path.relative_to(shop.folder / "exported")): shop.sha(str(path)) for path in files}
    return out | {"says": [line for text in told for line in text.splitlines()]}


def pictures(shop: Workshop) -> dict[str, Any]:
    """What launch/trajectory.py and launch/spectrum.py draw."""
    train(shop, [MAIN, "cold", "colour"])
    lines = (
        f"launch/trajectory.py runs/{MAIN} --bnr 0 0.5 2 --nfe 5 --method heun --columns 4 --out drawn/warm",
        "launch/trajectory.py runs/cold --nfe 5 --method cold --columns 4 --out drawn/cold",
        "launch/spectrum.py digits8/manifest.parquet --out drawn/digits8",
        "launch/spectrum.py openmoji16/manifest.parquet --bnr 0.3 1 --out drawn/openmoji16",
    )
    shop.out(*(line.split() for line in lines))
    files = sorted(path.relative_to(shop.folder) for path in (shop.folder / "drawn").rglob("*.*"))
    return {str(path): shop.sha(str(path)) for path in files if path.suffix in (".png", ".json")}
