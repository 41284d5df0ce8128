"""The shared base of all schedulers: lays out a grid, compiles a table at the first step, executes one row per step.

Knows diffusers' scheduler contract (arguments, indices, configs, dtypes, who synchronises with the device when).
Knows no solver: a subclass says which table it builds and, if it is stochastic, the law of its noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from diffusers_sde import noise
from diffusers_sde.configs import path_from_config
from diffusers_sde.defaults import measured_defaults
from diffusers_sde.grids import Nodes, distinct_integers, make_grid, nodes_from_times, nodes_from_user
from diffusers_sde.paths import Path, VarianceExploding
from diffusers_sde.prediction import model_coefficients
from diffusers_sde.schedulers.compiled import Compiled, Normals, compiled_rows
from diffusers_sde.schedulers.conversion import Conversion
from diffusers_sde.schedulers.data_prediction import limited, split_variance
from diffusers_sde.schedulers.noising import Noising
from diffusers_sde.schedulers.per_token import per_token_step
from diffusers_sde.schedulers.state import PerThread, Run
from diffusers_sde.tables import Table

HALF = (torch.float16, torch.bfloat16)


@dataclass
class SchedulerOutput(BaseOutput):
    """One step: ``prev_sample ~ N(prev_sample_mean, noise_std^2 I)`` given the past, exactly.

    prev_sample: the state at the next noise level, in the sample's dtype.  pred_original_sample: ``E[x_0 | x_t]`` at
    this evaluation.  prev_sample_mean, noise_std: the Gaussian transition (noise_std = 0: ``prev_sample`` itself).
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None
    prev_sample_mean: torch.Tensor | None = None
    noise_std: float = 0.0


class TableScheduler(Noising, Conversion):
    """Base of the public schedulers.  A subclass says its table and, if it is stochastic, its noise levels."""

    order = 1  # every model evaluation has its own timestep, whatever the solver

    # -- what a subclass says --

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        """The table for these nodes; ``tau`` is the noise level of each step, zeros for an ODE."""
        raise NotImplementedError

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise; such a scheduler has a ``noise_seed`` in its config."""
        return False

    @property
    def _final(self) -> str:
        """The config's ``final`` or its default; a limited data prediction must be what the last step returns."""
        limits = self.config.clip_sample or self.config.thresholding
        return self.config.final or ("denoise" if limits else "corrected")

    def _taus(self, nodes: Nodes) -> list[float]:
        """The noise level of each step of the whole grid."""
        return [0.0] * (len(nodes) - 1)

    def _default_grid(self, path: Path, n: int, mu: float | None) -> np.ndarray:
        """The ``n`` times of a run where the config names no grid."""
        default = measured_defaults(path, n, self.stochastic)
        return make_grid(path, default.grid, n, rho=default.rho, mu=mu)

    # -- config --

    def _setup(self) -> None:
        """Validate what can be validated before a run; called by every ``__init__``."""
        self._runs = PerThread()
        self._last_compiled: tuple[Any, tuple, Compiled] | None = None
        path = path_from_config(self.config)  # raises on a process that does not exist
        middle = 0.5 * (path.noisiest + path.cleanest)
        alpha, sigma = (float(v) for v in path.alpha_sigma(middle))
        model_coefficients(path, self.config.prediction_type, alpha, sigma)  # raises on an unknown prediction type

    @property
    def path(self) -> Path:
        """The forward process of the current config (pipelines may change the config after construction)."""
        return path_from_config(self.config)

    # -- attributes that pipelines and training scripts read --

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the state to start from: 1, or ``sqrt(sigma_max^2 + sigma_data^2)`` for EDM."""
        path = self.path
        if isinstance(path, VarianceExploding):
            return float(np.hypot(path.alpha_sigma(path.noisiest)[1], path.sigma_data))
        return 1.0

    @property
    def _run(self) -> Run:
        run = self._runs.get()
        if run is None:  # not laid out yet: the training grid, one timestep a row
            path, n = self.path, self.config.num_train_timesteps
            self._lay_out(nodes_from_times(path, make_grid(path, "linspace", n, mu=1.0), self.config.final_sigmas_type))
            run = self._runs.get()
            assert run is not None
        return run

    @property
    def timesteps(self) -> torch.Tensor:
        """What the network is to be evaluated at, (n,), float32 (int64 with round_timesteps)."""
        return self._run.timesteps

    @timesteps.setter
    def timesteps(self, value: torch.Tensor) -> None:
        self._run.timesteps = value

    @property
    def sigmas(self) -> torch.Tensor:
        """Noise levels, (n + 1,), float32, on the CPU; may be written to before the first step."""
        return self._run.sigmas

    @sigmas.setter
    def sigmas(self, value: torch.Tensor) -> None:
        self._run.sigmas = value

    @property
    def levels(self) -> Nodes:
        """The exact ``time``, ``alpha``, ``sigma``, ``log_snr`` of the run's nodes, float64 (n + 1,) each.

        What a pipeline wrote into ``sigmas`` counts.
        """
        return self._nodes(self._run)

    @property
    def num_inference_steps(self) -> int | None:
        run = self._runs.get()
        return None if run is None else len(run.timesteps)

    @property
    def step_index(self) -> int | None:
        """Index of the next row, None before the first step."""
        run = self._runs.get()
        return None if run is None else run.step_index

    @property
    def _step_index(self) -> int | None:
        return self.step_index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        """Some pipelines (Cosmos) take a step twice: going back drops the evaluations made since."""
        run = self._run
        if run.step_index is not None and value is not None:
            del run.history[: max(run.step_index - value, 0)]
        run.step_index = value

    @property
    def begin_index(self) -> int | None:
        run = self._runs.get()
        return None if run is None else run.begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of ``timesteps`` (image-to-image); any index is a valid start."""
        self._run.begin_index = begin_index

    # -- layout --

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Lay out a run of ``num_inference_steps`` model evaluations on the config's grid, or on the user's
        ``timesteps`` and/or ``sigmas`` (see :func:`diffusers_sde.grids.nodes_from_user`); ``mu`` is the dynamic shift
        of flow models, ignored by models without one.

        Raises ``ValueError`` for no or contradictory arguments.
        """
        path, config = self.path, self.config
        if timesteps is not None or sigmas is not None:
            ramp_rho = None if config.sigma_schedule == "exponential" else config.rho or 7.0
            final = config.final_sigmas_type
            nodes = nodes_from_user(path, timesteps, sigmas, mu=mu, final=final, ramp_rho=ramp_rho)
            given = len(timesteps if timesteps is not None else nodes.time[:-1])
            if num_inference_steps not in (None, given, len(nodes) - 1):
                raise ValueError(f"num_inference_steps is {num_inference_steps} but {given} steps were passed.")
        elif num_inference_steps is None:
            raise ValueError("Pass num_inference_steps, timesteps or sigmas to set_timesteps.")
        else:
            n = int(num_inference_steps)
            grid = config.grid or config.sigma_schedule
            if grid is None:
                times = self._default_grid(path, n, mu)
            else:
                times = make_grid(path, grid, n, rho=config.rho, mu=mu, steps_offset=config.steps_offset)
            if config.round_timesteps:
                times = distinct_integers(times)
            nodes = nodes_from_times(path, times, config.final_sigmas_type)
        self._lay_out(nodes, device)

    def _lay_out(self, nodes: Nodes, device: str | torch.device | None = None) -> None:
        dtype = torch.int64 if self.config.round_timesteps else torch.float32
        labels = self.path.sigma_label(nodes.alpha, nodes.sigma).astype(np.float32)
        times = torch.from_numpy(nodes.time[:-1]).to(dtype)
        if device is not None:
            times = times.to(device, non_blocking=True)
        self._runs.set(Run(nodes, times, torch.from_numpy(labels.copy()), labels))

    def _nodes(self, run: Run) -> Nodes:
        """The run's nodes with whatever a pipeline wrote into ``sigmas``."""
        now = run.sigmas.detach().cpu().double().numpy()
        changed = np.flatnonzero(now != run.labels) if len(now) == len(run.labels) else np.arange(0)
        if not len(changed):
            return run.nodes
        alpha, sigma = run.nodes.alpha.copy(), run.nodes.sigma.copy()
        alpha[changed], sigma[changed] = self.path.alpha_sigma_of(self.path.log_snr_of_label(now[changed]))
        for i in changed:  # a copied entry means that node exactly, not its float32 label
            for j in np.flatnonzero(run.labels == now[i])[:1]:
                alpha[i], sigma[i] = run.nodes.alpha[j], run.nodes.sigma[j]
        return Nodes(run.nodes.time, alpha, sigma)

    def _compile(self, run: Run, begin: int) -> Compiled:
        """Build the table from grid index ``begin`` on; host floats only.  The last one built is kept, since pipelines
        are called again with the same grid."""
        nodes = self._nodes(run)
        key = (begin, *(v.tobytes() for v in (nodes.time, nodes.alpha, nodes.sigma)))
        config, last = self._internal_dict, self._last_compiled
        if last is None or last[0] is not config or last[1] != key:
            last = self._last_compiled = (config, key, self._compiled(nodes, begin))
        run.compiled = last[2]
        run.history.clear()
        return last[2]

    def _compiled(self, nodes: Nodes, begin: int) -> Compiled:
        path, kind, tau = self.path, self.config.prediction_type, self._taus(nodes)
        table = self._table(path, nodes[begin:], tau[begin:])
        normals: list[Normals] = [()] * (len(nodes) - 1)
        if self.stochastic:
            normals = noise.brownian_weights(nodes.log_snr, tau=tau, data_std=table.data_std)
        rows = compiled_rows(table, path, kind, normals[begin:])
        return Compiled(begin, rows, bool(self.config.clip_sample or self.config.thresholding))

    # -- indices --

    def index_for_timestep(self, timestep: Any, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Index of a timestep in the current grid: for an element of ``scheduler.timesteps`` its position in memory
        (no synchronisation), else the nearest in value."""
        run = self._run
        if isinstance(timestep, torch.Tensor):
            own = run.timesteps
            if timestep.numel() == 1 and timestep.device == own.device and timestep.dtype == own.dtype:
                mine, its = own.untyped_storage(), timestep.untyped_storage()
                if mine.data_ptr() == its.data_ptr() and mine.nbytes() == its.nbytes():
                    return timestep.storage_offset() - own.storage_offset()
            timestep = timestep.flatten()[0].item()
        return int(np.argmin(np.abs(run.nodes.time[:-1] - float(timestep))))

    def _index(self, run: Run, timestep: Any) -> int:
        """The row to run: the next one, else ``begin_index``, else where the timestep is."""
        if run.step_index is not None and run.step_index < len(run.timesteps):
            return run.step_index
        if run.step_index is None and run.begin_index is not None:
            return run.begin_index
        return self.index_for_timestep(timestep)

    # -- the step --

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network's input: ``x / sqrt(sigma^2 + sigma_data^2)`` for EDM, the sample itself otherwise."""
        path = self.path
        if not isinstance(path, VarianceExploding):
            return sample
        run = self._run
        sigma = float(self._nodes(run).sigma[self._index(run, timestep)])
        return sample / float(np.hypot(sigma, path.sigma_data))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Execute one row: ``x <- a x + sum_j b_j F_j + c z`` with F the model output in the table's terms.

        Args: ``model_output`` of the config's prediction_type, ``timestep`` (an element of ``timesteps``), ``sample``
        x of the same shape; ``generator`` seeds the noise of a stochastic scheduler at the first step.  Of the further
        keywords of diffusers' schedulers ``pred_original_sample`` and ``per_token_timesteps`` are honoured.
        Returns a :class:`SchedulerOutput`, or ``(prev_sample, pred_original_sample)`` with ``return_dict=False``.
        Arithmetic is float32 for half precision samples, the result has the sample's dtype.
        """
        run = self._run
        i = self._index(run, timestep)
        if kwargs.get("per_token_timesteps") is not None:
            levels = kwargs["per_token_timesteps"] / self.config.num_train_timesteps
            prev, x0 = per_token_step(self.path, run.sigmas, levels, sample, model_output)
            run.step_index = i + 1
            return SchedulerOutput(prev, x0, prev) if return_dict else (prev, x0)
        compiled = run.compiled
        k = i - compiled.begin if compiled is not None else 0
        if compiled is None or k < 0 or len(compiled.rows[k].weights) > len(run.history) + 1:
            compiled, k = self._compile(run, i), 0
        row = compiled.rows[k]

        dtype = sample.dtype
        if model_output.shape != sample.shape:
            model_output = split_variance(model_output, sample, self.config.variance_type)
        if dtype in HALF:
            sample = sample.float()
        if model_output.dtype != sample.dtype:
            model_output = model_output.to(sample.dtype)

        x0 = kwargs.get("pred_original_sample")
        if x0 is None and compiled.limits:
            x0 = limited(torch.mul(model_output, row.d_m).add_(sample, alpha=row.d_x), self.config)
        if x0 is not None:  # the model output that says this x_0
            x0 = x0.to(sample.dtype)
            model_output = torch.sub(x0, sample, alpha=row.d_x).div_(row.d_m)
        evaluation = torch.add(model_output, sample, alpha=row.kappa)
        if x0 is None:
            x0 = torch.mul(evaluation, row.d_m)
            if row.d_rest:
                x0.add_(sample, alpha=row.d_rest)
        mean = torch.mul(sample, row.a).add_(evaluation, alpha=row.weights[0])
        for weight, old in zip(row.weights[1:], run.history, strict=False):
            mean.add_(old, alpha=weight)

        run.history.insert(0, evaluation)
        del run.history[row.keep :]
        prev = mean
        if row.noise and row.c:
            if run.seeds is None or len(run.seeds) != len(sample):
                run.seeds = self._seeds(sample, generator)
            z = noise.combine(row.noise, run.seeds, sample.shape)
            prev = torch.add(mean, z.to(mean.dtype), alpha=row.c)
        run.step_index = i + 1

        if dtype in HALF:
            prev, x0 = prev.to(dtype), x0.to(dtype)
        if not return_dict:
            return prev, x0
        if dtype in HALF:
            mean = mean.to(dtype) if row.c else prev
        return SchedulerOutput(prev, x0, mean, row.c)

    def rewind(self, index: int) -> None:
        """Go on from row ``index`` with another state: earlier evaluations and the noise path are forgotten."""
        run = self._run
        run.step_index, run.seeds = index, None
        run.history.clear()

    def reorder(self, index: torch.Tensor | slice) -> None:
        """Between two steps: go on with the samples ``index`` of the batch, as particle methods do after resampling.
        Stored evaluations follow, cut off from autograd's graph."""
        run = self._run
        run.history[:] = [evaluation.detach()[index] for evaluation in run.history]
        run.seeds = None if run.seeds is None else run.seeds[index]

    def _seeds(self, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        """One seed per sample: from the pipeline's generator, else ``noise_seed``, else the latents themselves."""
        if generator is not None:
            return noise.seeds_from_generator(generator, len(sample), sample.device)
        if self.config.noise_seed is not None:
            return noise.seeds_from_int(self.config.noise_seed, len(sample), sample.device)
        return noise.seeds_from_latents(sample)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
