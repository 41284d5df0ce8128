"""Evaluations from a pipeline turned inside out.

Knows how to make a pipeline's own call answer questions about its network at any state and time, so that guidance and
conditioning are whatever the user samples with.  Knows nothing of tables or fits.
"""

from __future__ import annotations

import contextlib
import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from diffusers_sde.calibration.arguments import check_names
from diffusers_sde.calibration.sources import Batch, sample_generators
from diffusers_sde.grids import Nodes
from diffusers_sde.prediction import split_variance
from diffusers_sde.schedulers import ProbabilityFlowScheduler, SchedulerOutput

CHUNK = 1000  # evaluations of one call of a pipeline


class _Stop(BaseException):
    """Ends a pipeline's call from inside; no pipeline catches it."""


class _QuestionScheduler(ProbabilityFlowScheduler):
    """Answers a pipeline's ``step`` with the next state the calibration wants evaluated, and the time it wants in the
    next entry of ``timesteps``, which the pipeline's loop sees since it iterates over views of that tensor."""

    _call: _Call
    _position: int  # in ``timesteps`` of the evaluation being made

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
        original_inference_steps: Any = None,
        strength: Any = None,
        levels: Any = None,
    ) -> None:
        grid = next((v for v in (sigmas, timesteps) if v is not None), ())
        times = np.full((num_inference_steps or len(grid)) + 1, self.path.noisiest)
        self._put(self._new_run(Nodes(times, *self.path.alpha_sigma(times)), device))
        self._position, self._call.mu = 0, mu

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
        if model_output.shape != sample.shape:
            model_output = split_variance(model_output, sample, self.config.variance_type)
        state, time = self._call.answer(model_output, timestep, sample)
        self._position += 1
        if self._position < len(self.timesteps):
            self.timesteps[self._position] = time.to(self.timesteps)
        state = state.to(sample.dtype)
        return SchedulerOutput(state, state, state, 0.0) if return_dict else (state, state)


class _Call:
    """One call of a pipeline in a thread of its own, which evaluates its network where the calibration wants it."""

    mu: float | None = None

    def __init__(self, call: Callable[[], Any]):
        self._answers: queue.Queue[Any] = queue.Queue(1)
        self._questions: queue.Queue[Any] = queue.Queue(1)
        self._requested: float | None = None  # the time of the last question
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

    def answer(
        self, prediction: torch.Tensor, timestep: Any, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In the pipeline's thread: hand over a prediction, wait for the next question."""
        seen = float(torch.as_tensor(timestep).flatten()[0])
        if self._requested is not None and abs(seen - self._requested) > 1e-2 * max(1.0, abs(self._requested)):
            raise ValueError(
                f"This pipeline evaluates its network at t = {seen:g} where {self._requested:g} was wanted: "
                "calibrate a bare denoiser instead."
            )
        self._answers.put((prediction, sample))
        question = self._questions.get()
        if question is None:
            raise _Stop
        self._requested = float(question[1])
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
            raise ValueError(f"The pipeline made {len(state)} samples instead of {size}: pass batch_size=1.")
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


def _is_dealt(name: str) -> bool:
    """Whether an input of a pipeline is one value a sample."""
    return name.startswith(("prompt", "negative_prompt", "class_labels")) and "embeds" not in name


class PipelineSource:
    """A pipeline with the keyword arguments that the user samples with.

    Args:
        pipe: any text-to-image or unconditional pipeline of diffusers.
        inputs: of its call.  Lists given for prompts or class labels are dealt out over the samples, a list of guidance
            scales over the batches; anything else is passed on as it is.
        batch_size: samples of one call.
        seed: of the noise.

    Raises:
        ValueError: for inputs that the pipeline does not take or that a calibration chooses itself.
    """

    def __init__(self, pipe: Any, inputs: Mapping[str, Any], batch_size: int, seed: int):
        known = inspect.signature(pipe.__call__).parameters
        clash = sorted({"generator", "latents", "output_type", "timesteps", "sigmas"} & set(inputs))
        if clash:
            raise ValueError(f"Calibration chooses {' and '.join(clash)} itself: leave it out.")
        check_names(type(pipe).__name__, inputs, known)
        lists = {k: v for k, v in inputs.items() if isinstance(v, list | tuple)}
        empty = [k for k, v in lists.items() if not v and (_is_dealt(k) or k == "guidance_scale")]
        if empty:
            raise ValueError(f"{empty[0]} is an empty list: pass at least one.")
        if "generator" not in known:
            raise ValueError(f"{type(pipe).__name__} takes no generator, so its noise cannot be fixed.")
        if not {"prompt", "class_labels", "batch_size"} & set(known):
            batch_size = 1
        labels = known.get("class_labels")
        if labels is not None and labels.default is labels.empty and "class_labels" not in inputs:
            raise ValueError(f"{type(pipe).__name__} needs class_labels: pass one or a list.")
        self._pipe, self._inputs, self._known = pipe, dict(inputs), known
        self.batch_size, self._seed = batch_size, seed
        self.mu: float | None = None

    def _arguments(self, first: int) -> dict[str, Any]:
        out, b = dict(self._inputs), self.batch_size
        for key in filter(_is_dealt, self._inputs):
            values = out[key]
            if isinstance(values, torch.Tensor):
                values = values.tolist()
            if isinstance(values, str | int):
                values = [values]
            if values is not None:
                out[key] = [values[(first + i) % len(values)] for i in range(b)]
        for count in {"batch_size", "num_images"} & set(self._known):
            out[count] = b
        if isinstance(out.get("guidance_scale"), list | tuple):
            out["guidance_scale"] = out["guidance_scale"][first // b % len(out["guidance_scale"])]
        if "output_type" in self._known and "vae" in self._pipe.components:
            out["output_type"] = "latent"
        return out

    @contextlib.contextmanager
    def open(self, first: int) -> Iterator[Batch]:
        pipe, arguments = self._pipe, self._arguments(first)
        replaced, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
        call: _Call | None = None

        def start() -> _Call:
            nonlocal call
            ready = threading.Event()

            def run() -> None:
                ready.wait()
                with torch.no_grad():
                    pipe(**arguments, num_inference_steps=CHUNK, generator=generators)

            generators = sample_generators(self._seed, first, self.batch_size)
            scheduler = _QuestionScheduler.from_config(replaced.config, clip_sample=False)
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
            pipe.scheduler = replaced
            pipe.set_progress_bar_config(**{"disable": False, **bar})
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()
