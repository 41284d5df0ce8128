"""How a run is laid out: timesteps and sigmas for every way in which pipelines ask, and the attributes they read.

Knows grids, the meaning of diffusers' arguments to ``set_timesteps`` and which run a thread works on.  Knows nothing of
tables or steps.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffusers_sde.configs import path_from_config
from diffusers_sde.defaults import measured_defaults
from diffusers_sde.grids import Nodes, distinct_integers, nodes_from_times, nodes_from_user
from diffusers_sde.named_grids import distilled, make_grid
from diffusers_sde.paths import Path
from diffusers_sde.schedulers.noising import Noising
from diffusers_sde.schedulers.runs import LOCK, Layout, Run, Runs, kept_rows, new_run


class RunLayout(Noising):
    """A scheduler as far as it lays out runs; a subclass validates its config and chooses the default grid."""

    config: Any
    _runs: Runs

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise; such a scheduler has a ``noise_seed`` in its config."""
        return False

    def _check(self) -> None:
        """Raise ``ValueError`` for config values that no run could use."""
        raise NotImplementedError

    def _default_grid(self, path: Path, n: int, mu: float | None, start: float = 1.0) -> np.ndarray:
        """``n`` times where the config names no grid, from a fraction ``start`` of equal steps of time on."""
        default = measured_defaults(path, round(n / start), self.stochastic)
        return make_grid(path, default.grid, n, mu=mu, start=start, **default.options)

    # -- attributes that pipelines and training scripts read --

    @property
    def path(self) -> Path:
        """The forward process of the current config (pipelines may change the config after construction)."""
        return path_from_config(self.config)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the state to start from: 1, or ``sqrt(sigma_max^2 + sigma_data^2)`` for EDM."""
        return self.path.start_scale

    @property
    def _run(self) -> Run:
        """The run that this thread works on; before ``set_timesteps`` one on the training grid, one timestep a row."""
        return self._runs.of_thread() or self._training_run()

    def _training_run(self) -> Run:
        path, n = self.path, self.config.num_train_timesteps
        return self._new_run(
            nodes_from_times(path, make_grid(path, "linspace", n, mu=1.0), self.config.final_sigmas_type)
        )

    @property
    def timesteps(self) -> torch.Tensor:
        """What the network is to be evaluated at, (n,), float32 (int64 with round_timesteps).

        A run belongs to these numbers: hand their elements to :meth:`step`.  Assigning a part of them, or them in
        another dtype or on another device, lays out that part; any other numbers are a grid of the caller's own.
        """
        run = self._run
        held = run.tensor()
        return self._times(run.layout.nodes, None) if held is None else held

    @timesteps.setter
    def timesteps(self, value: torch.Tensor) -> None:
        run, value = self._run, torch.as_tensor(value)
        layout, rows = run.layout, kept_rows(run, value)
        if rows is None:
            layout = self._new_run(self._user_nodes(self.path, value, None, None)).layout
        elif len(rows) <= len(layout):
            nodes = self._nodes(layout)
            layout = self._new_run(Nodes(nodes.time[rows], nodes.alpha[rows], nodes.sigma[rows])).layout
        self._put(run._replace(layout=layout).anew().asked_at(value)._replace(key=run.key, begin=None))

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels, (n + 1,), float32, on the CPU; may be written to before the first step."""
        return self._run.layout.sigmas

    @sigmas.setter
    def sigmas(self, value: torch.Tensor) -> None:
        run = self._run
        self._put(run._replace(layout=replace(run.layout, sigmas=value)))

    @property
    def levels(self) -> Nodes:
        """The exact ``time``, ``alpha``, ``sigma``, ``log_snr`` of the run's nodes, float64 (n + 1,) each.

        What a pipeline wrote into ``sigmas`` counts.
        """
        return self._nodes(self._run.layout)

    @property
    def num_inference_steps(self) -> int | None:
        run = self._runs.of_thread()
        return None if run is None else len(run.layout)

    @property
    def step_index(self) -> int | None:
        """Index of the next row, None before the first step."""
        run = self._runs.of_thread()
        return None if run is None else run.next

    @property
    def _step_index(self) -> int | None:
        return self.step_index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        """Some pipelines (Cosmos) take a step twice: the run goes back to where it was, to the same noise."""
        self._put(self._run.put_back(value))

    @property
    def begin_index(self) -> int | None:
        run = self._runs.of_thread()
        return None if run is None else run.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of ``timesteps`` (image-to-image); any index is a valid start."""
        run = self._run
        self._put((run if run.next is None else run.anew())._replace(begin=begin_index))

    # -- layout --

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        original_inference_steps: int | None = None,
        strength: float | None = None,
        levels: Nodes | None = None,
    ) -> None:
        """Lay out a run: on the config's grid, on the user's ``timesteps`` and/or ``sigmas``, or as another run was.

        Args:
            num_inference_steps: evaluations of the network.
            device: of the timesteps.
            sigmas, timesteps: (n,), see :func:`diffusers_sde.grids.nodes_from_user`.
            mu: the dynamic shift of flow models, ignored by models without one.
            original_inference_steps: the number of equal steps that a distilled network was trained on: the run keeps
                to those (:func:`diffusers_sde.named_grids.distilled`).
            strength: the fraction of time below which all steps are spent (latent consistency's image-to-image).
            levels: those of another run (:attr:`levels`), taken exactly as they are.

        Raises:
            ValueError: for no, wrong or contradictory arguments, and for a config that no run could use.
        """
        self._check()
        path, n = self.path, _count(num_inference_steps)
        if sigmas is not None and timesteps is None and not self._asks_for_a_grid(path, sigmas):
            n, sigmas = n or len(sigmas), None
        steps = None if n is None else self._steps(n)
        choice = None
        if levels is not None:
            if timesteps is not None or sigmas is not None or n not in (None, len(levels) - 1):
                raise ValueError("levels are a whole run: pass them alone.")
            nodes = levels
        elif timesteps is not None or sigmas is not None:
            nodes = self._user_nodes(path, timesteps, sigmas, mu)
            given = len(timesteps if timesteps is not None else nodes.time[:-1])
            if n not in (None, given, len(nodes) - 1):
                raise ValueError(f"num_inference_steps is {n} but {given} steps were passed.")
        elif steps is None:
            raise ValueError("Pass num_inference_steps, timesteps or sigmas to set_timesteps.")
        elif original_inference_steps is not None:
            times = distilled(path, steps, _count(original_inference_steps) or 1, strength or 1.0)
            nodes = self._rounded_nodes(path, times)
        elif strength not in (None, 1):
            nodes = self._rounded_nodes(path, self._default_grid(path, steps, mu, start=strength))
        else:
            nodes, choice = self._own_nodes(path, steps, mu)
        self._put(self._new_run(self._evaluated(nodes), device, choice))

    def _asks_for_a_grid(self, path: Path, sigmas: Any) -> bool:
        """Whether these sigmas are a grid that somebody wants, and not what pipelines pass whatever the user wants."""
        return True

    def _is_habit(self, path: Path, sigmas: Any) -> bool:
        """Whether these sigmas are what pipelines pass whatever the user wants."""
        values = np.asarray(sigmas.cpu() if hasattr(sigmas, "cpu") else sigmas, np.float64)
        habit = path.habitual_sigmas(len(values))
        return habit is not None and bool(np.allclose(values, habit, atol=1e-6))

    def _steps(self, evaluations: int) -> int:
        """How many steps of the grid make at most so many evaluations."""
        return evaluations

    def _evaluated(self, nodes: Nodes) -> Nodes:
        """The nodes of the evaluations that the steps of a grid make."""
        return nodes

    def _own_nodes(self, path: Path, n: int, mu: float | None) -> tuple[Nodes, tuple[int, float | None] | None]:
        """The nodes for ``n`` evaluations, and ``(n, mu)`` where they are not a grid that the config names."""
        config = self.config
        grid = config.grid or config.sigma_schedule
        if grid is None:
            return self._rounded_nodes(path, self._default_grid(path, n, mu)), (n, mu)
        times = make_grid(path, grid, n, rho=config.rho, mu=mu, steps_offset=config.steps_offset)
        return self._rounded_nodes(path, times), None

    def _rounded_nodes(self, path: Path, times: np.ndarray) -> Nodes:
        if self.config.round_timesteps:
            times = distinct_integers(times)
        return nodes_from_times(path, times, self.config.final_sigmas_type)

    def _user_nodes(self, path: Path, timesteps: Any, sigmas: Any, mu: float | None) -> Nodes:
        config = self.config
        ramp_rho = None if config.sigma_schedule == "exponential" else config.rho or 7.0
        final = config.final_sigmas_type
        nodes = nodes_from_user(path, timesteps, sigmas, mu=mu, final=final, ramp_rho=ramp_rho)
        if not config.round_timesteps:
            return nodes
        if timesteps is None or sigmas is None:  # the level moves together with its label
            return self._rounded_nodes(path, nodes.time[:-1])
        return Nodes(np.append(distinct_integers(nodes.time[:-1]), nodes.time[-1]), nodes.alpha, nodes.sigma)

    def _new_run(
        self, nodes: Nodes, device: str | torch.device | None = None, choice: tuple[int, float | None] | None = None
    ) -> Run:
        labels = self._labels(nodes)
        return new_run(Layout(nodes, torch.from_numpy(labels.copy()), labels, choice), self._times(nodes, device))

    def _labels(self, nodes: Nodes) -> np.ndarray:
        return self.path.sigma_label(nodes.alpha, nodes.sigma).astype(np.float32)

    def _times(self, nodes: Nodes, device: str | torch.device | None) -> torch.Tensor:
        times = torch.from_numpy(nodes.time[:-1]).to(torch.int64 if self.config.round_timesteps else torch.float32)
        return times if device is None else times.to(device, non_blocking=True)

    def _put(self, run: Run) -> Run:
        """Make ``run`` the current one."""
        with LOCK:
            runs = self._runs.with_current(run)
            if runs.others:  # the run before must hold nothing any more when it is asked who still does
                self._runs = runs
                runs = runs.without_abandoned()
            self._runs = runs
        return run

    def _nodes(self, layout: Layout) -> Nodes:
        """The layout's nodes with whatever a pipeline wrote into ``sigmas``."""
        now = layout.sigmas.detach().cpu().double().numpy()
        changed = np.flatnonzero(now != layout.labels) if len(now) == len(layout.labels) else np.arange(0)
        if not len(changed):
            return layout.nodes
        alpha, sigma = layout.nodes.alpha.copy(), layout.nodes.sigma.copy()
        alpha[changed], sigma[changed] = self.path.alpha_sigma_of(self.path.log_snr_of_label(now[changed]))
        for i in changed:  # a copied entry means that node exactly, not its float32 label
            for j in np.flatnonzero(layout.labels == now[i])[:1]:
                alpha[i], sigma[i] = layout.nodes.alpha[j], layout.nodes.sigma[j]
        return Nodes(layout.nodes.time, alpha, sigma)

    def _laid_out_from(self, run: Run, row: int) -> Run:
        """The run with its grid laid out for a start at ``row`` on noised data: there, equal steps of time say what a
        strength means; the rest is the default grid's law on what is left.  The tensors that pipelines hold follow."""
        layout, path = run.layout, self.path
        if layout.choice is None or layout.start == row or not 0 <= row < len(layout):
            return run
        if not np.array_equal(layout.sigmas.numpy(), layout.labels):  # somebody wrote into it: a grid of their own
            return run
        n, mu = layout.choice
        whole = layout.whole or layout.nodes
        nodes = whole
        if row:
            before = make_grid(path, "trailing", n, mu=mu)[:row]
            times = np.append(before, self._default_grid(path, n - row, mu, start=(n - row) / n))
            nodes = self._rounded_nodes(path, times)
        labels = self._labels(nodes)
        with torch.inference_mode():  # they may have been laid out under it
            layout.sigmas.copy_(torch.from_numpy(labels))
            if (held := run.tensor()) is not None:
                held.copy_(self._times(nodes, None), non_blocking=True)
        return run._replace(layout=Layout(nodes, layout.sigmas, labels, layout.choice, row, whole))


def _count(steps: Any) -> int | None:
    """A number of steps as an int; raises ``ValueError`` for what is none."""
    if steps is None:
        return None
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number, at least 1, not {steps!r}.")
    return int(steps)
