"""What decides the last bits of a number here: the processor, and the libraries that compute."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "deepspeed", "numpy", "scipy", "pillow", "pyarrow", "matplotlib", "resvg_py")


def fingerprint() -> dict[str, str]:
    """Equal where results must be equal bit by bit. torch's threads are set by OMP_NUM_THREADS, 1 in all that is run."""
    import torch

    found = {name: version(name) for name in LIBRARIES}
    found |= {"python": ".".join(platform.python_version_tuple()[:2]), "threads": "1"}
    return found | {"cpu": _cpu(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _cpu() -> str:
    """Model and vector instructions, which choose the kernels of oneDNN and OpenBLAS."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.M))
    words = [facts.get("model name", "?"), *(f"{key} {facts.get(key, '?')}" for key in ("cpu family", "model"))]
    vectors = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma")))
    return ", ".join([*words, *vectors])
