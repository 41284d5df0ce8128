r"""Text out of masks: unconditional, continued, filled in, guided, block after block; and tilted to any reward.

For every bidirectional encoder with logits of tokens and a mask (masked diffusion: LLaDA, ModernBERT and others trained
with ``diffusers_sde.train --objective masked``), with every discrete scheduler: of this package, and of diffusers
(``BlockRefinementScheduler``; those of uniform noise for networks that are trained on it).

A prompt is text with masks in it (``tokenizer.mask_token``, each one token), and ``gen_length`` masks behind it.  What
is not masked is given: the rest is drawn from its conditional law, which an exact network samples exactly where one
token is drawn a call (Lu, arXiv:2607.01693, chapter 7).  Guidance compares with the same text whose given tokens are
masked, ``logits = (1 - w) without + w with`` of the normalised log-probabilities (Nie et al. 2024, arXiv:2410.18514):
w = 1 is none, and more sharpens ``p(x|prompt) (p(x|prompt)/p(x))^{w-1}`` token by token.

```python
from diffusers import DiffusionPipeline

from diffusers_sde import MaskedDiffusionScheduler

folder = "kjv_masked"  # what `diffusers_sde.train --objective masked --output_dir kjv_masked` wrote
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipelines/text_generation.py", trust_remote_code=True)
pipe.scheduler = MaskedDiffusionScheduler.from_config(pipe.scheduler.config)
mask = pipe.tokenizer.mask_token
for prompt in (None, "And God said, ", "And God " + 8 * mask + " the light"):
    print(pipe(prompt, gen_length=100 if prompt is None else 40, num_inference_steps=40).texts[0])
```
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from diffusers_sde.errors import check_finite, check_whole
from diffusers_sde.methods.control import Particles, draw, token_kernel, twisted_smc
from diffusers_sde.schedulers import DiscreteScheduler


@dataclass
class TextGenerationOutput(BaseOutput):
    """What was written.

    Args:
        sequences: tokens (N, L), the prompt's included.
        texts: decoded, without padding; None for ``output_type="seq"``.
        calls: network calls of each block, guidance counted once.
        particles: of each text, where a reward steered (:class:`diffusers_sde.methods.control.Particles`).
    """

    sequences: torch.Tensor
    texts: list[str] | None = None
    calls: list[int] | None = None
    particles: Particles | None = None


class TextGenerationPipeline(DiffusionPipeline):
    """Discrete diffusion of text.

    Args:
        model: ``model(input_ids=...)`` with ``logits`` of every position's clean token.
        scheduler: a discrete one, of this package or of diffusers.
        tokenizer: of transformers, with a mask token; None: prompts are tensors of tokens.
    """

    _optional_components = ["tokenizer"]  # noqa: RUF012
    model_cpu_offload_seq = "model"

    def __init__(self, model: Any, scheduler: Any, tokenizer: Any = None):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | torch.Tensor | None = None,
        gen_length: int = 0,
        num_inference_steps: int | None = None,
        num_texts: int = 1,
        block_length: int | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask_token_id: int | None = None,
        reward: Callable[[list[str] | torch.Tensor], torch.Tensor] | None = None,
        beta: float = 1.0,
        num_particles: int = 16,
        generator: torch.Generator | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> TextGenerationOutput | tuple[Any, ...]:
        """Write.

        Args:
            prompt: text with masks where something is to be filled in, several of the same number of tokens, or tokens
                (N, L); None: nothing is given.
            gen_length: masks behind the prompt.
            num_inference_steps: network calls of each block; None: one for each of its masks.
            num_texts: for each prompt.
            block_length: positions that are filled in together, block after block from the left; None: all.
            guidance_scale: 1 is none.
            temperature, top_k, top_p: of the draws, where the scheduler takes them; temperature 0 takes the likeliest.
            mask_token_id: None: the tokenizer's.
            reward: of texts (of tokens (M, L) without a tokenizer) to (M,); texts are then drawn from the law tilted
                by ``exp(beta reward)``, with ``num_particles`` particles for each: by a scheduler of this package that
                draws every position by itself, without blocks.
            beta: strength of the tilt.
            num_particles: for each text.
            generator: of all draws.
            output_type: text, or seq for the tokens alone.
            return_dict: False returns ``(sequences, texts)``.
            callback_on_step_end: ``callback(pipe, step, timestep, {"sequences": tokens})`` after each call; what it
                returns as ``sequences`` is gone on from.

        Returns:
            :class:`TextGenerationOutput`.

        Raises:
            ValueError: for wrong inputs.
        """
        if output_type not in ("text", "seq"):
            raise ValueError(f"output_type {output_type!r} is unknown: use text or seq.")
        check_whole("gen_length", gen_length, 0)
        check_whole("num_texts", num_texts)
        check_finite("guidance_scale", guidance_scale)
        for name, number in (("num_inference_steps", num_inference_steps), ("block_length", block_length)):
            if number is not None:
                check_whole(name, number)
        mask = self._mask(mask_token_id)
        x = self._tokens(prompt, gen_length, mask).repeat_interleave(num_texts, 0)
        given = x != mask
        if bool(given.all()):
            raise ValueError("There is nothing to write: pass a gen_length, or a prompt with masks in it.")
        shaping = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        particles, calls = None, []
        if reward is not None:
            check_whole("num_particles", num_particles)
            check_finite("beta", beta)
            steps = num_inference_steps or int((~given).sum(-1).max())
            particles = self._steered(
                reward, x, given, mask, guidance_scale, steps, beta, num_particles, shaping, generator
            )
            chosen = draw(particles, generator)
            x, calls = particles.samples[torch.arange(len(x), device=x.device), chosen], [steps]
        else:
            length = block_length or x.shape[1]
            blocks = [slice(at, at + length) for at in range(0, x.shape[1], length)]
            open_blocks = [block for block in blocks if not bool(given[:, block].all())]
            with self.progress_bar(total=len(open_blocks)) as bar:
                for block in open_blocks:
                    x, used = self._filled(
                        x, given, block, mask, guidance_scale, num_inference_steps, shaping, generator,
                        callback_on_step_end,
                    )  # fmt: skip
                    calls.append(used)
                    bar.update()
        texts = self._texts(x) if output_type == "text" and self.tokenizer is not None else None
        self.maybe_free_model_hooks()
        if not return_dict:
            return x, texts
        return TextGenerationOutput(sequences=x, texts=texts, calls=calls, particles=particles)

    # -- tokens --

    def _mask(self, mask_token_id: int | None) -> int:
        owners = (self.tokenizer, self.model)
        known = [mask_token_id, *(getattr(owner, "mask_token_id", None) for owner in owners)]
        mask = next((number for number in known if number is not None), None)
        if mask is None:
            raise ValueError("The mask is unknown: pass mask_token_id, or use a tokenizer that has one.")
        return int(mask)

    def _tokens(self, prompt: Any, gen_length: int, mask: int) -> torch.Tensor:
        """The prompts with masks behind them, (N, L)."""
        if prompt is None:
            ids = torch.empty(1, 0, dtype=torch.int64)
        elif isinstance(prompt, torch.Tensor):
            ids = prompt if prompt.ndim == 2 else prompt[None]
            if ids.ndim != 2 or ids.dtype != torch.int64:
                raise ValueError(f"A prompt of tokens is int64 (N, L), not {ids.dtype} {tuple(prompt.shape)}.")
        elif self.tokenizer is None:
            raise ValueError("There is no tokenizer: pass the prompt as tokens.")
        else:
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            rows = self.tokenizer(texts, add_special_tokens=False).input_ids
            if len({len(row) for row in rows}) > 1:
                raise ValueError("Prompts in one call must have the same number of tokens: pass them one by one.")
            ids = torch.tensor(rows, dtype=torch.int64)
        masks = torch.full((len(ids), gen_length), mask, dtype=torch.int64)
        return torch.cat([ids.to(masks.device), masks], 1).to(self._execution_device)

    def _texts(self, x: torch.Tensor) -> list[str]:
        return self.tokenizer.batch_decode(x, skip_special_tokens=True)

    # -- the network --

    def _logits(self, given: torch.Tensor, mask: int, guidance_scale: float) -> Callable[..., torch.Tensor]:
        """``logits(tokens)``, guided: without the given tokens and with them."""

        def logits(x: torch.Tensor) -> torch.Tensor:
            told = self.model(input_ids=x).logits
            if guidance_scale == 1:
                return told
            untold = self.model(input_ids=torch.where(given, mask, x)).logits
            possible = torch.arange(told.shape[-1], device=x.device) != mask
            told, untold = (v.masked_fill(~possible, -torch.inf).log_softmax(-1) for v in (told, untold))
            guided = torch.lerp(untold, told, guidance_scale)
            return torch.where(told.isfinite() & untold.isfinite(), guided, -torch.inf)

        return logits

    # -- drawing --

    def _filled(
        self,
        x: torch.Tensor,
        given: torch.Tensor,
        block: slice,
        mask: int,
        guidance_scale: float,
        steps: int | None,
        shaping: dict[str, Any],
        generator: torch.Generator | None,
        callback: Callable[..., Any] | None,
    ) -> tuple[torch.Tensor, int]:
        """The text with one block filled in, and the network calls that it took."""
        scheduler, x, fixed = self.scheduler, x.clone(), given[:, block]
        takes, lays = (inspect.signature(f).parameters for f in (scheduler.step, scheduler.set_timesteps))
        masked = "mask_token_id" in takes
        if not masked:  # uniform noise has no masks: it starts from random tokens
            device = x.device if generator is None else generator.device
            noise = torch.randint(self.model.config.vocab_size, fixed.shape, device=device, generator=generator)
            x[:, block] = torch.where(fixed, x[:, block], noise.to(x.device))
        told = {
            **shaping,
            "mask_token_id": mask,
            "prompt_mask": fixed if isinstance(scheduler, DiscreteScheduler) else fixed[0],  # diffusers has one for all
            "generator": generator,
        }
        told = {name: value for name, value in told.items() if name in takes}
        length = {"block_length": fixed.shape[1]} if "block_length" in lays else {}
        scheduler.set_timesteps(steps or int((~fixed).sum(-1).max()), device=x.device, **length)
        logits, used = self._logits(given, mask, guidance_scale), 0
        for number, t in enumerate(scheduler.timesteps):
            if masked and not bool((x[:, block] == mask).any()):
                break
            time = t if t.is_floating_point() else number  # diffusers counts its discrete steps
            out = scheduler.step(logits(x)[:, block], time, x[:, block], **told)
            x[:, block], used = torch.where(fixed, x[:, block], out.prev_sample), used + 1
            if callback is not None:
                x = (callback(self, number, t, {"sequences": x}) or {}).get("sequences", x)
        return x, used

    def _steered(
        self,
        reward: Callable[[Any], torch.Tensor],
        x: torch.Tensor,
        given: torch.Tensor,
        mask: int,
        guidance_scale: float,
        steps: int,
        beta: float,
        num_particles: int,
        shaping: dict[str, Any],
        generator: torch.Generator | None,
    ) -> Particles:
        """Particles of the tilted law, a population for each text."""
        if not hasattr(self.scheduler, "law"):
            raise ValueError(
                f"{type(self.scheduler).__name__} does not say the law of its steps: use pipe.scheduler = "
                'MaskedDiffusionScheduler.from_config(pipe.scheduler.config, algorithm_type="ancestral").'
            )
        self.scheduler.set_timesteps(steps, device=x.device)
        fixed = given.repeat_interleave(num_particles, 0)
        logits = self._logits(fixed, mask, guidance_scale)
        kernel = token_kernel(
            lambda state, t: logits(state), self.scheduler, generator, mask_token_id=mask, prompt_mask=fixed, **shaping
        )

        def of_tokens(state: torch.Tensor) -> torch.Tensor:
            return reward(state if self.tokenizer is None else self._texts(state))

        particles = x[:, None].expand(-1, num_particles, -1)
        with self.progress_bar(total=steps) as bar:
            return twisted_smc(
                kernel, of_tokens, particles, steps=steps, beta=beta, generator=generator, callback=bar.update
            )
