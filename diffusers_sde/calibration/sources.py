"""Where evaluations come from: a bare denoiser, or a pipeline turned inside out.

Knows how to draw the same noise again, to ask a network for one prediction at any state and time, and how to make a
pipeline's own call answer such questions, so that guidance and conditioning are whatever the user samples with.
Knows nothing of tables or fits.
"""

from __future__ import annotations

import contextlib
import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from diffusers_sde.grids import Nodes
from diffusers_sde.noise import seeds_from_int
from diffusers_sde.sampling import Denoiser, network_denoiser
from diffusers_sde.schedulers import ProbabilityFlowScheduler
from diffusers_sde.schedulers.base import SchedulerOutput
from diffusers_sde.schedulers.data_prediction import split_variance

CHUNK = 1000  # evaluations of one call of a pipeline
HELD_OUT = 1 << 20  # held-out samples are numbered from here: never a training sample's noise


class Batch(Protocol):
    """Some samples: their unit ``noise`` (B, ...), and the network at any of their states."""

    noise: torch.Tensor

    def evaluate(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The network's prediction for its input ``sample`` (scaled, for EDM) at one ``timestep``, float32 or more."""
        ...


class Source(Protocol):
    """Batches by the index of their first sample; ``mu`` is the shift that a flow pipeline asked for."""

    batch_size: int
    mu: float | None

    def open(self, first: int) -> contextlib.AbstractContextManager[Batch]:
        """The samples ``first .. first + batch_size - 1``; the same noise each time."""
        ...


class DenoiserSource:
    """A callable ``denoiser(sample, timestep)``, always called with ``batch_size`` samples (C, H, W)."""

    mu: float | None = None

    def __init__(
        self,
        denoiser: Denoiser,
        sample_shape: tuple[int, ...],
        batch_size: int,
        seed: int,
        *,
        device: Any = "cpu",
        variance_type: str = "fixed_small",
    ):
        self._denoiser, self._shape, self.batch_size = denoiser, tuple(sample_shape), batch_size
        self._seed, self._device, self._variance_type = seed, device, variance_type
        self.noise = torch.empty(0)

    @contextlib.contextmanager
    def open(self, first: int) -> Iterator[Batch]:
        each = [torch.randn(self._shape, generator=g) for g in _generators(self._seed, first, self.batch_size)]
        self.noise = torch.stack(each).to(self._device)
        with torch.no_grad():
            yield self

    def evaluate(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        said = self._denoiser(sample, timestep.to(sample.device))
        return said if said.shape == sample.shape else split_variance(said, sample, self._variance_type)


def _generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One generator per sample: sample k does not depend on the batch it is in."""
    seeds = seeds_from_int(seed, first + count, torch.device("cpu"))[first:].tolist()
    return [torch.Generator().manual_seed(s % 2**63) for s in seeds]


def is_class_conditional(pipe: Any) -> bool:
    """Whether a pipeline is a bare class-conditional network, whose labels its own call does not pass."""
    return set(pipe.components) == {"unet", "scheduler"} and bool(pipe.unet.config.get("num_class_embeds"))


def class_conditional_source(pipe: Any, inputs: Mapping[str, Any], batch_size: int, seed: int) -> DenoiserSource:
    """A bare class-conditional network: each batch has every label at every guidance scale (1: no guidance), as often
    as fits into ``batch_size``, at least once.

    inputs: ``class_labels`` (default: all but the last class, which is null) and ``guidance_scale``, numbers or lists.
    """
    unknown = sorted(set(inputs) - {"class_labels", "guidance_scale"})
    if unknown:
        raise ValueError(f"A class-conditional network takes class_labels and guidance_scale, no {unknown[0]}.")
    network, config = pipe.unet, pipe.unet.config
    given = inputs.get("class_labels", range(config.num_class_embeds - 1))
    labels, scales = (
        [v] if isinstance(v, int | float) else list(v) for v in (given, inputs.get("guidance_scale", 1.0))
    )
    times = max(batch_size // (len(labels) * len(scales)), 1)
    each = torch.tensor([k for k in labels for _ in scales] * times, device=pipe.device)
    if len(scales) == 1:
        denoiser = network_denoiser(network, each, float(scales[0]))
    else:
        conditional = network_denoiser(network, each)
        null = network_denoiser(network, torch.full_like(each, config.num_class_embeds - 1))
        weights = torch.tensor(scales * (len(labels) * times), device=pipe.device)[:, None, None, None]

        def denoiser(sample: torch.Tensor, t: Any) -> torch.Tensor:
            return torch.lerp(null(sample, t), conditional(sample, t), weights)

    size = config.sample_size
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    kind = pipe.scheduler.config.get("variance_type", "fixed_small")
    return DenoiserSource(denoiser, shape, len(each), seed, device=pipe.device, variance_type=kind)


# -- a pipeline --


class _Stop(BaseException):
    """Ends a pipeline's call from inside; no pipeline catches it."""


class _Asked(ProbabilityFlowScheduler):
    """Answers a pipeline's ``step`` with the next state the calibration wants evaluated, and the time it wants in the
    next entry of ``timesteps``, which the pipeline's loop sees since it iterates over views of that tensor."""

    _call: _Call

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
        original_inference_steps: Any = None,
    ) -> None:
        given = next((v for v in (sigmas, timesteps) if v is not None), ())
        times = np.full((num_inference_steps or len(given)) + 1, self.path.noisiest)
        self._lay_out(Nodes(times, *self.path.alpha_sigma(times)), device)
        self._call.mu = mu

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise ValueError("Calibration starts from pure noise: use a pipeline without an input image.")

    @property
    def init_noise_sigma(self) -> float:
        return 1.0

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        return sample

    def step(  # type: ignore[override]
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        run, i = self._run, self.step_index or 0
        said = model_output
        if said.shape != sample.shape:
            said = split_variance(said, sample, self.config.variance_type)
        wanted, at = self._call.answer(said, timestep, sample)
        if i + 1 < len(self.timesteps):
            self.timesteps[i + 1] = at.to(self.timesteps)
        self._put(run._replace(next=i + 1))
        wanted = wanted.to(sample.dtype)
        if not return_dict:
            return wanted, wanted
        return SchedulerOutput(wanted, wanted, wanted, 0.0)


class _Call:
    """One call of a pipeline in a thread of its own, which evaluates what it is asked to."""

    mu: float | None = None

    def __init__(self, call: Callable[[], Any]):
        self._answers: queue.Queue[Any] = queue.Queue(1)
        self._questions: queue.Queue[Any] = queue.Queue(1)
        self._asked: float | None = None
        self._thread = threading.Thread(target=self._main, args=(call,), daemon=True)
        self._thread.start()

    def _main(self, call: Callable[[], Any]) -> None:
        try:
            call()
            self._answers.put(RuntimeError("The pipeline stopped before the calibration did."))
        except _Stop:
            pass
        except BaseException as error:
            self._answers.put(error)

    def answer(self, said: torch.Tensor, timestep: Any, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In the pipeline's thread: hand over a prediction, wait for the next question."""
        seen = float(torch.as_tensor(timestep).flatten()[0])
        if self._asked is not None and abs(seen - self._asked) > 1e-2 * max(1.0, abs(self._asked)):
            raise ValueError(
                f"This pipeline evaluates its network at t = {seen:g} where {self._asked:g} was asked for: calibrate a "
                "bare denoiser instead."
            )
        self._answers.put((said, sample))
        question = self._questions.get()
        if question is None:
            raise _Stop
        self._asked = float(question[1])
        return question

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction and the state it is for, in the calibration's thread; raises what the pipeline raised."""
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def ask(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self._questions.put((sample, timestep))
        return self.get()[0]

    def close(self) -> None:
        self._questions.put(None)
        self._thread.join()


class _PipelineBatch:
    """The samples of one call; a pipeline may hold each twice for guidance (DiT), and then wants them back twice."""

    def __init__(self, start: Callable[[], _Call], size: int):
        self._start, self._left, self._size = start, CHUNK - 1, size
        self.call = start()
        state = self.call.get()[1]
        self._copies = len(state) // size
        if not torch.equal(state, state[:size].repeat(self._copies, *[1] * (state.ndim - 1))):
            raise ValueError(f"The pipeline made {len(state)} samples where {size} were asked for: pass batch_size=1.")
        state = state[:size]
        self._dtype = torch.float32 if state.dtype in (torch.float16, torch.bfloat16) else state.dtype
        self.noise = state.to(self._dtype)

    def evaluate(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if not self._left:
            self.call.close()
            self.call, self._left = self._start(), CHUNK - 1
            self.call.get()
        self._left -= 1
        copies = sample if self._copies == 1 else sample.repeat(self._copies, *[1] * (sample.ndim - 1))
        return self.call.ask(copies, timestep)[: self._size].to(self._dtype)


class PipelineSource:
    """A pipeline with the keyword arguments that the user samples with.

    Lists given for prompts or class labels are dealt out over the samples, a list of guidance scales over the batches;
    anything else is passed on as it is.
    """

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], batch_size: int, seed: int):
        known = inspect.signature(pipe.__call__).parameters
        clash = sorted({"generator", "latents", "output_type", "timesteps", "sigmas"} & set(inputs))
        if clash:
            raise ValueError(f"Calibration chooses {' and '.join(clash)} itself: leave it out.")
        unknown = [k for k in inputs if k not in known]
        if unknown:
            raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}: leave it out.")
        if "generator" not in known:
            raise ValueError(f"{type(pipe).__name__} takes no generator, so its noise cannot be fixed.")
        if not {"prompt", "class_labels", "batch_size"} & set(known):
            batch_size = 1
        if "class_labels" in known and "class_labels" not in inputs:
            raise ValueError(f"{type(pipe).__name__} needs class_labels: pass one or a list.")
        self._pipe, self._inputs, self._known = pipe, dict(inputs), known
        self.batch_size, self._seed = batch_size, seed
        self.mu: float | None = None

    def _arguments(self, first: int) -> dict[str, Any]:
        out, b = dict(self._inputs), self.batch_size
        dealt = [k for k in out if k.startswith(("prompt", "negative_prompt", "class_labels")) and "embeds" not in k]
        for key in dealt:
            values = out[key]
            if isinstance(values, torch.Tensor):
                values = values.tolist()
            if isinstance(values, str | int):
                values = [values]
            if values is not None:
                out[key] = [values[(first + i) % len(values)] for i in range(b)]
        if "batch_size" in self._known:
            out["batch_size"] = b
        if isinstance(out.get("guidance_scale"), list | tuple):
            out["guidance_scale"] = out["guidance_scale"][first // b % len(out["guidance_scale"])]
        if "output_type" in self._known and "vae" in self._pipe.components:
            out["output_type"] = "latent"
        return out

    @contextlib.contextmanager
    def open(self, first: int) -> Iterator[Batch]:
        pipe, arguments = self._pipe, self._arguments(first)
        own, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
        call: _Call | None = None

        def start() -> _Call:
            nonlocal call
            ready = threading.Event()

            def run() -> None:
                ready.wait()
                with torch.no_grad():
                    pipe(**arguments, num_inference_steps=CHUNK, generator=generators)

            generators = _generators(self._seed, first, self.batch_size)
            scheduler = _Asked.from_config(own.config, clip_sample=False)
            call = scheduler._call = _Call(run)
            pipe.scheduler = scheduler
            ready.set()
            return call

        pipe.set_progress_bar_config(disable=True)
        try:
            batch = _PipelineBatch(start, self.batch_size)
            assert call is not None
            self.mu = call.mu
            with torch.no_grad():
                yield batch
        finally:
            if call is not None:
                call.close()
            pipe.scheduler = own
            pipe.set_progress_bar_config(**{"disable": False, **bar})
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()
