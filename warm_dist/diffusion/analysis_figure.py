"""The figure of a spectral analysis: spectrum, signal-to-noise ratio, the heads' shares, cost of blur, BNR paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import Any

import numpy as np

from warm_dist.config.bnr import ConstantBNR, TableBNR
from warm_dist.diffusion import analysis
from warm_dist.diffusion.analysis import SIGMAS, Array
from warm_dist.diffusion.spectrum import fallback_spectrum
from warm_dist.figures import new_figure, save_figure

_SNR_SIGMAS = (0.05, 0.5, 5.0)
_STYLES = (":", "--", "-")
_COLOURS = ("tab:blue", "tab:cyan", "tab:green", "tab:orange", "tab:red", "tab:purple", "tab:brown", "tab:pink")


def spectrum_figure(
    spectrum: Array, sigma_data: float, bnrs: Sequence[float], path: TableBNR, bnr: float, file: File
) -> None:
    """Write the 2 x 3 panels as one PNG.

    spectrum: (H, W), S_k. bnrs: constant ratios to compare. path, bnr: the suggestions. Raises OutputError.
    """

    figure = new_figure(figsize=(16, 9), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for panel in panels:
        panel.grid(alpha=0.25, which="major")
    _power(panels[0], spectrum, sigma_data)
    _snr(panels[1], spectrum, bnrs)
    for panel, name in zip(panels[2:4], ("denoiser", "deblurrer"), strict=True):
        _shares(panel, name, spectrum, bnrs)
    _price(panels[4], spectrum, bnrs)
    _paths(panels[5], path, bnr, bnrs)
    for panel in panels:
        panel.legend(fontsize=8)
    save_figure(figure, file)


def _power(panel: Any, spectrum: Array, sigma_data: float) -> None:
    rings = analysis.radial(spectrum)
    natural = analysis.radial(fallback_spectrum(spectrum.shape[0], spectrum.shape[1], sigma_data).numpy())
    panel.loglog(rings.frequency, rings.power, "o-", color="black", markersize=4, label="measured")
    panel.loglog(natural.frequency, natural.power, color="grey", linewidth=1, label=f"1/f², σ_data {sigma_data:.2f}")
    for sigma, style in zip(_SNR_SIGMAS, _STYLES, strict=True):
        panel.axhline(sigma**2, color="tab:red", linestyle=style, linewidth=1, label=f"noise, σ = {sigma:g}")
    panel.set(title="Power per mode", ylabel="S")
    _frequencies(panel)


def _snr(panel: Any, spectrum: Array, bnrs: Sequence[float]) -> None:
    for colour, bnr in zip(_COLOURS, bnrs, strict=False):
        for sigma, style in zip(_SNR_SIGMAS, _STYLES, strict=True):
            ratio = analysis.radial(analysis.snr(spectrum, sigma, bnr * sigma))
            label = f"BNR {bnr:g}" if style == "-" else None
            panel.loglog(ratio.frequency, np.maximum(ratio.power, 1e-9), color=colour, linestyle=style, label=label)
    panel.axhline(1, color="black", linewidth=0.8)
    styles = zip(_SNR_SIGMAS, ("dotted", "dashed", "solid"), strict=True)
    title = "Signal to noise, σ = " + ", ".join(f"{sigma:g} ({style})" for sigma, style in styles)
    panel.set(title=title, ylabel="a²S/σ²", ylim=(1e-6, None))
    _frequencies(panel)


def _shares(panel: Any, name: str, spectrum: Array, bnrs: Sequence[float]) -> None:
    for colour, bnr in zip(_COLOURS, bnrs, strict=False):
        split = analysis.shares(spectrum, ConstantBNR(bnr=bnr))
        panel.semilogx(SIGMAS, getattr(split, name) / split.total, color=colour, label=f"BNR {bnr:g}")
    panel.set(title=f"{name.capitalize()}'s share of the error", xlabel="σ", ylabel="share", ylim=(0, 1.05))


def _price(panel: Any, spectrum: Array, bnrs: Sequence[float]) -> None:
    for colour, bnr in zip(_COLOURS, bnrs, strict=False):
        price = analysis.shares(spectrum, ConstantBNR(bnr=bnr)).price
        panel.semilogx(SIGMAS, price, color=colour, label=f"BNR {bnr:g}")
    panel.set(title="Price of blur: error against hot diffusion at the same σ", xlabel="σ", ylabel="total / hot")


def _paths(panel: Any, path: TableBNR, bnr: float, bnrs: Sequence[float]) -> None:
    panel.semilogx(SIGMAS, analysis.alphas(path, SIGMAS) / SIGMAS, color="black", linewidth=2, label="suggested path")
    panel.axhline(bnr, color="black", linestyle="--", label=f"suggested BNR {bnr:.3g}")
    for colour, ratio in zip(_COLOURS, bnrs, strict=False):
        panel.axhline(ratio, color=colour, linewidth=0.8, label=f"BNR {ratio:g}")
    panel.set(title="Paths: the ratio of both levels", xlabel="σ", ylabel="BNR = α/σ, pixels")


def _frequencies(panel: Any) -> None:
    panel.set_xlim(*panel.get_xlim())
    panel.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 4], labels=["0.05", "0.1", "0.2", "0.5", "1", "2", "4"], minor=False)
    panel.set_xticks([], minor=True)
    panel.set_xlabel("frequency √λ, radians a pixel")
