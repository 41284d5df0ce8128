"""Forward processes ``x_t = alpha(t) x_0 + sigma(t) eps``: variance preserving, variance exploding, flow matching.

Knows ``alpha``, ``sigma`` and the half log-SNR ``log_snr = log(alpha / sigma)`` as functions of the time ``t`` that
the network sees, their derivatives, and everything else that is a fact of a family of processes: its network's input
scale and parameterisation, its start, its range of noise, the clock its grids take equal steps of, what its pipelines
call sigma.  A new family is one subclass of :class:`Path`, in a module of its own here.  Everything is float64 on the
host but :meth:`Path.alpha_sigma_on_device`.  Knows nothing of configs, solvers or networks.

Sources: Kingma et al. 2021 (arXiv:2107.00630) for the log-SNR; Fu & Wang (arXiv:2605.22586), setup; Lipman et al. 2022
(arXiv:2210.02747) for flow matching; Karras et al. 2022 (arXiv:2206.00364) for variance exploding / EDM.
"""

from __future__ import annotations

from diffusers_sde.paths._flow_matching import FlowMatching
from diffusers_sde.paths._path import Path
from diffusers_sde.paths._variance_exploding import VarianceExploding
from diffusers_sde.paths._variance_preserving import VariancePreserving

__all__ = ["FlowMatching", "Path", "VarianceExploding", "VariancePreserving"]
