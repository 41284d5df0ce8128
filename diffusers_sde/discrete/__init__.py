"""Discrete state spaces: noising by continuous-time Markov chains, their reversal, exact oracles, and what a sampler of
tokens decides.  NumPy and torch alone; no diffusers, no networks."""
