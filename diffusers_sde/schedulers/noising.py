"""The forward process on tensors: ``alphas_cumprod``, ``add_noise``, ``scale_noise``, ``get_velocity``.

Knows which level a noising belongs to, the run's or that of the timestep handed in, and how to evaluate a path at times
that live on a device without bringing them to the host.  Knows nothing of solvers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.schedulers.runs import Layout, Run, Runs, is_single

Levels = tuple[torch.Tensor, torch.Tensor]  # alpha and sigma, (N,) each


class Noising:
    """What a scheduler offers to training scripts and image-to-image pipelines."""

    _runs: Runs

    @property
    def path(self) -> Path:
        raise NotImplementedError

    def _nodes(self, layout: Layout) -> Nodes:
        raise NotImplementedError

    def _laid_out_from(self, run: Run, row: int) -> Run:
        raise NotImplementedError

    def _put(self, run: Run) -> Run:
        raise NotImplementedError

    # -- the discrete schedule that training scripts read --

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """``alpha^2`` at the training times, float32 (T,); a timestep between them may be the index too."""
        table = torch.from_numpy(self._trained_alphas_cumprod()).float().as_subclass(_AlphasCumprod)
        table.path = self.path
        return table

    def _trained_alphas_cumprod(self) -> np.ndarray:
        table = self.path.alphas_cumprod
        if table is None:
            raise AttributeError(f"A {self.path.family} process has no alphas_cumprod at integer times.")
        return table

    @property
    def alphas(self) -> torch.Tensor:
        """``alpha_t^2 / alpha_{t-1}^2``, float32 (T,)."""
        abar = self._trained_alphas_cumprod()
        return torch.from_numpy(np.append(abar[0], abar[1:] / abar[:-1])).float()

    @property
    def betas(self) -> torch.Tensor:
        """``1 - alphas``, float32 (T,)."""
        return 1 - self.alphas

    @property
    def final_alpha_cumprod(self) -> torch.Tensor:
        """``alpha^2`` of clean data."""
        return torch.tensor(1.0)

    # -- noising --

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        """``alpha x_0 + sigma eps``.

        The level is that of ``timesteps``; where these are the run's own (an element of ``scheduler.timesteps``, or all
        equal to one), it is that of the row at which the run stands: ``step_index`` once stepping, else
        ``begin_index``.  A run that is about to start inside a grid which was the scheduler's own choice starts at the
        level of equal steps of time from then on, so that a strength means what it means elsewhere.

        Args:
            original_samples, noise: (N, ...).
            timesteps: a number, or a tensor of one time per sample.

        Returns:
            (N, ...), in the dtype of ``original_samples``.
        """
        self._start_on_noised_data(timesteps)
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        """:meth:`add_noise` in the argument order of the flow matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: Any) -> torch.Tensor:
        """The v-prediction target ``alpha eps - sigma x_0``, at the level that :meth:`add_noise` takes."""
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return alpha * noise - sigma * sample

    def _start_on_noised_data(self, timesteps: Any) -> None:
        """Lay out the run for its start, where these timesteps say that this is one."""
        run = self._runs.of_thread()
        if run is None or run.next is not None or run.layout.choice is None:
            return
        row = _own_row(run, timesteps)
        if row is None and _on_accelerator(timesteps) and timesteps.dtype == run.dtype:
            # only where no start was set is it worth waiting for the device, once a run
            row = _own_row(run, timesteps.cpu()) if run.begin is None else run.begin
        if row is not None and run.begin is not None:
            row = run.begin
        if row is not None and row > 0:
            self._put(self._laid_out_from(run, row)._replace(begin=row))

    def _alpha_sigma(self, timesteps: Any, like: torch.Tensor) -> Levels:
        """``(alpha, sigma)`` that broadcast over ``like`` (N, ...), in its dtype and on its device."""
        run = self._runs.of_thread()
        t = timesteps if isinstance(timesteps, torch.Tensor) else torch.as_tensor(timesteps)
        if run is not None and (row := _own_row(run, t)) is not None:
            nodes = self._nodes(run.layout)
            row = row if run.stands_at is None else run.stands_at
            pair: Levels = (torch.tensor([nodes.alpha[row]]), torch.tensor([nodes.sigma[row]]))
        elif t.device.type == "cpu":
            pair = self._levels_on_host(run, t)
        else:
            pair = self._levels_on_device(run, t)
        alpha, sigma = (v.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1)) for v in pair)
        return alpha, sigma

    def _levels_on_host(self, run: Run | None, t: torch.Tensor) -> Levels:
        """The path's levels at ``t``, the run's own where a time is one of its nodes: sigmas may have been given."""
        times = t.double().numpy().reshape(-1)
        alpha, sigma = self.path.alpha_sigma(times)
        if run is not None and t.dtype.is_floating_point:
            nodes = self._nodes(run.layout)
            for j, time in enumerate(times):
                hit = _hits(run.layout, time)
                if len(hit):
                    alpha[j], sigma[j] = nodes.alpha[hit[0]], nodes.sigma[hit[0]]
        return torch.from_numpy(np.asarray(alpha)), torch.from_numpy(np.asarray(sigma))

    def _levels_on_device(self, run: Run | None, t: torch.Tensor) -> Levels:
        """The same for times that live on an accelerator, without waiting for them; a time that all samples share and
        that is one of the run's is the row at which the run stands."""
        t = t.flatten()
        pair = self.path.alpha_sigma_on_device(t)
        if run is None or not t.dtype.is_floating_point:
            return pair
        nodes = self._nodes(run.layout)
        whole = run.layout.whole or nodes
        table = torch.from_numpy(np.stack([nodes.alpha, nodes.sigma, nodes.time, whole.time])).float()
        *levels, times, times_before = table.to(t.device, non_blocking=True)
        t = t.float()
        distance = torch.minimum(*((t[:, None] - v[None, :-1]).abs() for v in (times, times_before)))
        row = distance.argmin(1)
        hit = distance.amin(1) <= 1e-6 * t.abs().clamp(min=1e-3)
        if run.stands_at is not None:
            shared = (hit & (t == t[:1])).all()
            row, hit = torch.where(shared, run.stands_at, row), hit | shared
        alpha, sigma = (torch.where(hit, level[row], path) for level, path in zip(levels, pair, strict=True))
        return alpha, sigma


def _hits(layout: Layout, time: float) -> np.ndarray:
    """The rows whose time this is, before a grid was laid out anew too."""
    close = [
        np.abs(nodes.time[:-1] - time) <= 1e-6 * max(abs(time), 1e-3) for nodes in (layout.nodes, layout.whole) if nodes
    ]
    return np.flatnonzero(np.any(close, axis=0))


def _own_row(run: Run, timesteps: Any) -> int | None:
    """The row of the run that ``timesteps`` are, one for the whole batch, as far as the host can see: an element of the
    run's own, or a copy of one; None for other times, as training code draws them."""
    if not isinstance(timesteps, torch.Tensor) or timesteps.numel() == 0:
        return None
    if is_single(timesteps) and run.owns(timesteps.untyped_storage()):
        return run.row(timesteps)
    if timesteps.device.type != "cpu" or timesteps.dtype != run.dtype:
        return None
    values = timesteps.flatten()
    hit = _hits(run.layout, float(values[0]))
    return int(hit[0]) if len(hit) and bool((values == values[0]).all()) else None


def _on_accelerator(timesteps: Any) -> bool:
    return isinstance(timesteps, torch.Tensor) and timesteps.device.type not in ("cpu", "meta")


class _AlphasCumprod(torch.Tensor):
    """``alphas_cumprod`` that pipelines may also index with a timestep between two integers."""

    path: Path
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, float) or (isinstance(index, torch.Tensor) and index.dtype.is_floating_point):
            t = torch.as_tensor(index)
            if t.device.type == "cpu":
                return torch.from_numpy(np.asarray(self.path.alpha_sigma(t.double().numpy())[0] ** 2)).float()
            return self.path.alpha_sigma_on_device(t)[0] ** 2
        return super().__getitem__(index)
