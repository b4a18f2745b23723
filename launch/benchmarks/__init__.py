"""Benchmarks: each measures one part against its target."""
