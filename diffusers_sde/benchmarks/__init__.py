"""Benchmarks, one module a question; `diffusers-sde bench` runs them."""
