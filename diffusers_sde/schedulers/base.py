"""The shared base of all schedulers: lays out a grid, compiles a table at the first step, executes one row per step.

Knows diffusers' scheduler contract (arguments, indices, dtypes, who synchronises with the device when).  Knows no
solver: a subclass says which table it builds and, if it is stochastic, the law of its noise.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput

from diffusers_sde import noise
from diffusers_sde.configs import settled
from diffusers_sde.grids import Nodes, check_final
from diffusers_sde.named_grids import check_grid
from diffusers_sde.paths import Path
from diffusers_sde.prediction import model_coefficients
from diffusers_sde.schedulers import traced
from diffusers_sde.schedulers.compiled import Compiled, CompiledRow, Normals, compiled_rows
from diffusers_sde.schedulers.conversion import Conversion
from diffusers_sde.schedulers.execution import HALF, data_prediction, evaluate_row, for_arithmetic, next_mean
from diffusers_sde.schedulers.layout import RunLayout
from diffusers_sde.schedulers.per_token import per_token_step
from diffusers_sde.schedulers.runs import (
    Layout,
    Run,
    Runs,
    is_single,
    nearest_row,
    row_by_value,
)
from diffusers_sde.schedulers.transitions import Transitions
from diffusers_sde.tables import Table


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


class TableScheduler(RunLayout, Conversion):
    """Base of the public schedulers.  A subclass says its table and, if it is stochastic, its noise levels."""

    _internal_dict: Any  # diffusers' name for the config
    order = 1  # every model evaluation has its own timestep, whatever the solver

    # -- what a subclass says --

    def _table(self, path: Path, nodes: Nodes, tau: list[float]) -> Table:
        """The table for these nodes; ``tau`` is the noise level of each step, zeros for an ODE."""
        raise NotImplementedError

    @property
    def _final(self) -> str:
        """The config's ``final`` or its default; a limited data prediction must be what the last step returns."""
        limits = self.config.clip_sample or self.config.thresholding
        return self.config.final or ("denoise" if limits else "corrected")

    def _taus(self, nodes: Nodes) -> list[float]:
        """The noise level of each step of the whole grid."""
        return [0.0] * (len(nodes) - 1)

    @property
    def _doubts(self) -> bool:
        """Whether a run follows its rows only as far as its own errors let it."""
        return bool(getattr(self.config, "trust", False))

    def _normals(self, nodes: Nodes, tau: list[float], data_std: float) -> list[Normals]:
        """The normals of each row's noise and their weights."""
        return list(noise.brownian_weights(nodes.log_snr, tau=tau, data_std=data_std))

    def _check(self) -> None:
        """Raise ``ValueError`` for config values that no run could use."""
        path = self.path  # raises on a process that does not exist
        middle = 0.5 * (path.noisiest + path.cleanest)
        alpha, sigma = (float(v) for v in path.alpha_sigma(middle))
        model_coefficients(path, self.config.prediction_type, alpha, sigma)  # raises on an unknown prediction type
        for grid in (self.config.grid, self.config.sigma_schedule):
            if grid is not None:
                check_grid(grid)
        check_final(self.config.final_sigmas_type)

    # -- configs and copies --

    def _setup(self) -> None:
        """Make what is not config and validate what is; called by every ``__init__``."""
        self._runs = Runs()
        self._last_compiled: tuple[Any, Compiled] | None = None
        self._handle = traced.register(self)
        self._check()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, made in any way, shares nothing that changes with its original."""
        self.__dict__.update(state)
        self._internal_dict = FrozenDict(settled(self._internal_dict))
        self._runs = self._runs.independent()
        self._handle = traced.register(self)

    # -- where a step stands --

    def index_for_timestep(self, timestep: Any, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Index of a timestep in the current grid: for an element of ``scheduler.timesteps`` its place in memory (no
        synchronisation), else the nearest in value."""
        run, row = self._runs.find(timestep, None)
        return nearest_row((run or self._run).layout, timestep) if row is None else row

    def _located(self, timestep: Any, sample: Any) -> tuple[Run, int]:
        """The run and row of a step, whether or not it may be taken now."""
        run, row = self._runs.find(timestep, sample)
        if run is None:
            run = self._put(self._training_run())
        return run, row_by_value(run, timestep) if row is None else row

    def _turn(self, timestep: Any, sample: torch.Tensor) -> tuple[Run, int]:
        """The run of a step, standing at the row returned; raises where the row contradicts the run."""
        run, row = self._located(timestep, sample)
        if run.next != row or run.tiled or run.released:
            run = run.about_to(row)
            if run.layout.start > row:  # the grid was laid out for a start further down
                run = self._laid_out_from(run, 0)
        return run, row

    def _with_table(self, run: Run, row: int) -> Run:
        """The run with a table that holds for ``row`` and for what the config says now."""
        compiled = run.compiled
        if compiled is not None and not _unchanged(compiled.settings, self._internal_dict):
            compiled, run = None, run.anew(row)._replace(seeds=run.seeds)
        if compiled is None or compiled.rows[row - compiled.begin].reads > len(run.history) + 1:
            run = run._replace(compiled=self._compile(run.layout, row), history=())
        return run

    def _compile(self, layout: Layout, begin: int) -> Compiled:
        """The table from grid index ``begin`` on; host floats only.  The last one built is kept, since pipelines are
        called again with the same grid and the same config."""
        nodes, settings = self._nodes(layout), _settings(self._internal_dict)
        key = (begin, *(v.tobytes() for v in (nodes.time, nodes.alpha, nodes.sigma)))
        last = self._last_compiled
        if last is None or last[0] != key or not _unchanged(last[1].settings, self._internal_dict):
            last = self._last_compiled = (key, self._compiled(nodes, begin, settings))
        return last[1]

    def _compiled(self, nodes: Nodes, begin: int, settings: Mapping[str, Any]) -> Compiled:
        path, kind, tau = self.path, self.config.prediction_type, self._taus(nodes)
        table = self._table(path, nodes[begin:], tau[begin:])
        normals: list[Normals] = [()] * (len(nodes) - 1)
        if self.stochastic:
            normals = self._normals(nodes, tau, table.data_std)
        rows = compiled_rows(table, path, kind, normals[begin:], doubting=self._doubts)
        return Compiled(begin, rows, bool(self.config.clip_sample or self.config.thresholding), settings)

    # -- the step --

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The network's input: ``x / sqrt(sigma^2 + sigma_data^2)`` for EDM, the sample itself otherwise."""
        path = self.path
        if path.input_scale(1.0) == 1.0:
            return sample
        if isinstance(timestep, torch.Tensor) and timestep.numel() > 1 and not is_single(timestep):
            return sample * path.input_scale(self._alpha_sigma(timestep, sample)[1])
        run = self._run
        row = run.next or run.begin or 0
        if timestep is not None:
            run, row = self._located(timestep, sample)
        return sample * path.input_scale(float(self._nodes(run.layout).sigma[row]))

    def _get_conditioning_c_in(self, sigma: Any) -> Any:
        """The factor of :meth:`scale_model_input` at noise level ``sigma``; Cosmos' video pipeline asks for it."""
        return self.path.input_scale(sigma)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Execute one row: ``x <- a x + sum_j b_j F_j + c z`` with F the model output in the table's terms, followed as
        far as the run's own errors let it (:func:`diffusers_sde.extrapolation.trust`).

        Args:
            model_output: what the network says, of the config's prediction_type; float, shape of ``sample`` (or twice
                its channels with a learned variance).
            timestep: an element of ``timesteps``: it knows its run and its row.  A number, a copy or one equal value a
                sample is taken for the row whose turn it is, unless it is another row's.
            sample: the state x (N, ...).
            generator: seeds the noise of a stochastic scheduler at the first step; one, or one a sample.
            return_dict: False for a tuple.
            kwargs: of the further keywords of diffusers' schedulers ``pred_original_sample`` (the x_0 that the step is
                to follow) and ``per_token_timesteps`` are honoured, the others ignored.

        Returns:
            A :class:`SchedulerOutput`, or ``(prev_sample, pred_original_sample)``, in the sample's dtype; arithmetic is
            float32 for half precision.

        Raises:
            ValueError: for a step that contradicts its run: rows left out or taken again, a batch or shape that changed
                on the way, one timestep for each sample; and for shapes that do not fit.
        """
        if torch.compiler.is_compiling():
            outputs = traced.step(self._handle, model_output, timestep, sample, generator, return_dict, **kwargs)
            return SchedulerOutput(*outputs) if return_dict else outputs
        run, i = self._turn(timestep, sample)
        if kwargs.get("per_token_timesteps") is not None:
            levels = kwargs["per_token_timesteps"] / self.config.num_train_timesteps
            prev, x0 = per_token_step(self.path, run.layout.sigmas, levels, sample, model_output)
            self._put(run._replace(next=i + 1, output=weakref.ref(prev)))
            return SchedulerOutput(prev, x0, prev) if return_dict else (prev, x0)
        run = self._with_table(run, i)
        assert run.compiled is not None
        row = run.compiled.rows[i - run.compiled.begin]

        dtype = sample.dtype
        model_output, sample = for_arithmetic(model_output, sample, self.config.variance_type)
        history, tiled = run.history, False
        if history and history[0].shape != sample.shape:
            history, tiled = _tiled(history, sample), True
        limits = self.config if run.compiled.limits else None
        evaluation, x0 = evaluate_row(row, model_output, sample, limits, kwargs.get("pred_original_sample"))
        if x0 is None:
            x0 = data_prediction(row, sample, evaluation)
        mean = next_mean(row, sample, evaluation, history)
        prev, seeds = mean, run.seeds
        if row.noise and row.c:
            seeds = self._seeds(run, sample, generator)
            prev = torch.add(mean, noise.combine(row.noise, seeds, sample.shape).to(mean.dtype), alpha=row.c)
        if dtype in HALF:
            prev, x0 = prev.to(dtype), x0.to(dtype)
        self._put(_after(run, i, row, (evaluation, *history)[: row.keep], seeds, prev, tiled))
        if not return_dict:
            return prev, x0
        if dtype in HALF:
            mean = mean.to(dtype) if row.c else prev
        return SchedulerOutput(prev, x0, mean, row.c)

    def _seeds(self, run: Run, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        """One seed per sample: the run's; at its first noise from the pipeline's generator, else ``noise_seed``, else
        the latents themselves."""
        batch = len(sample)
        if run.seeds is not None:
            copies, rest = divmod(batch, len(run.seeds))
            if copies and not rest:  # a step on copies of the batch
                return run.seeds if copies == 1 else run.seeds.repeat(copies)
            if run.twice and len(run.seeds) % batch == 0:  # after one
                return run.seeds[:batch]
            raise _changed_batch(len(run.seeds), batch)
        if generator is not None:
            return noise.seeds_from_generator(generator, batch, sample.device)
        if self.config.noise_seed is not None:
            return noise.seeds_from_int(self.config.noise_seed, batch, sample.device)
        return noise.seeds_from_latents(sample)

    def transitions(self, sample: torch.Tensor, generator: Any = None) -> Transitions:
        """The rows of the run laid out last as functions of state and evaluations, which take no turn in it.

        Args:
            sample: the state (N, ...) to start from.
            generator: seeds the noise of a stochastic scheduler, as at the first step of :meth:`step`.
        """
        run, config = self._run, self.config
        compiled = self._compile(run.layout, 0)
        seeds = self._seeds(run.anew(0), sample, generator) if any(r.noise and r.c for r in compiled.rows) else None
        nodes, times = self._nodes(run.layout), self.timesteps.to(sample.device)
        limits = config if compiled.limits else None
        return Transitions(compiled.rows, nodes, self.path, times, seeds, limits, config.variance_type)

    def rewind(self, index: int) -> None:
        """Go on from row ``index`` with another state: earlier evaluations and the noise path are forgotten."""
        self._put(self._run.anew(index))

    def reorder(self, index: torch.Tensor | slice) -> None:
        """Between two steps: go on with the samples ``index`` of the batch, as particle methods do after resampling, or
        as a batch does that shrinks or grows.  Stored evaluations follow, cut off from autograd's graph."""
        run = self._run
        self._put(
            run._replace(
                history=tuple(evaluation.detach()[index] for evaluation in run.history),
                seeds=None if run.seeds is None else run.seeds[index],
                before=None,
                tiled=False,
            )
        )

    @property
    def model_outputs(self) -> StoredEvaluations:
        """The evaluations that later rows read, newest first; a pipeline that changes the shape of its latents on the
        way (ChronoEdit) trims them here."""
        return StoredEvaluations(self)

    last_sample = None  # read beside model_outputs; no state but the pipeline's own is kept here

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class StoredEvaluations(Sequence[torch.Tensor]):
    """The stored evaluations of a scheduler's run, each of which may be replaced."""

    def __init__(self, scheduler: TableScheduler):
        self._scheduler = scheduler

    def __len__(self) -> int:
        return len(self._scheduler._run.history)

    def __getitem__(self, index: Any) -> Any:
        return self._scheduler._run.history[index]

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        run = self._scheduler._run
        history = list(run.history)
        history[index] = value
        self._scheduler._put(run._replace(history=tuple(history), before=None))


def _after(
    run: Run, i: int, row: CompiledRow, history: tuple[torch.Tensor, ...], seeds: Any, prev: torch.Tensor, tiled: bool
) -> Run:
    """The run after its row ``i``."""
    before = run.history if i + 1 < len(run.layout) or run.twice else None
    return run._replace(
        next=i + 1, history=history, seeds=seeds, before=before, output=weakref.ref(prev), tiled=tiled,
        thread=threading.get_ident(),
    )  # fmt: skip


def _tiled(history: tuple[torch.Tensor, ...], sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The evaluations of a batch for several copies of it, as a pipeline with guidance has when it looks at x_0."""
    old = history[0]
    copies, rest = divmod(len(sample), len(old)) if sample.ndim == old.ndim else (0, 0)
    if not copies or rest or sample.shape[1:] != old.shape[1:]:
        if sample.shape[1:] == old.shape[1:]:
            raise _changed_batch(len(old), len(sample))
        raise ValueError(
            f"The sample has shape {tuple(sample.shape)}, this run had {tuple(old.shape)}: call set_timesteps for a "
            "new run, or trim scheduler.model_outputs too."
        )
    return tuple(evaluation.repeat(copies, *[1] * (evaluation.ndim - 1)) for evaluation in history)


def _changed_batch(old: int, new: int) -> ValueError:
    return ValueError(
        f"The batch changed from {old} to {new} in the middle of a run: tell the scheduler which samples go on with "
        "reorder(index), or call set_timesteps for a new run."
    )


def _settings(config: Any) -> dict[str, Any]:
    """What the config says now: diffusers lets its attributes be changed."""
    return dict(vars(config))


def _unchanged(settings: Mapping[str, Any], config: Any) -> bool:
    """Whether the config still says what it said."""
    now = vars(config)
    try:
        return now == settings
    except ValueError:  # arrays
        return now.keys() == settings.keys() and all(np.array_equal(now[k], v) for k, v in settings.items())
