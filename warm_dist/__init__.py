"""Distributed training of blur-noise mixture diffusion models (Warm Diffusion, arXiv 2511.16904)."""

__version__ = "0.1.0"
