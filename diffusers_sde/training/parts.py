"""The trained parts of a task: LoRA adapters on them, their place, their files.

Knows peft and how diffusers and transformers save.  Knows nothing of losses, data sets or optimizers.
"""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import PreTrainedModel

from diffusers_sde.training.networks import Task

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TEXT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(task: Task, rank: int) -> None:
    """Freeze what is trained and add trainable LoRA adapters of this rank to its attention projections (Hu et al. 2021,
    arXiv:2106.09685), through peft.

    Raises ``ValueError`` for a network or pipeline that cannot carry or save them.
    """
    if not hasattr(task.network, "add_adapter") or not hasattr(task.pipe, "save_lora_weights"):
        raise ValueError(
            f"{type(task.pipe).__name__} does not take LoRA weights: leave out --rank to train the whole network."
        )
    takes = inspect.signature(task.pipe.save_lora_weights).parameters
    for name, part in task.parts.items():
        if f"{name}_lora_layers" not in takes:
            raise ValueError(
                f"{type(task.pipe).__name__} takes no LoRA weights on its {type(part).__name__}: leave out "
                f"{'--rank' if name == task.name else '--train_text_encoder'}."
            )
    from peft import LoraConfig

    for name, part in task.parts.items():
        part.requires_grad_(False)
        targets = LORA_TARGETS if name == task.name else TEXT_LORA_TARGETS
        part.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        )
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def place(task: Task, device: Any) -> None:
    """Move every module of the task's pipeline but the trained ones to ``device``; Accelerate places those."""
    trained = list(task.parts.values())
    for part in task.pipe.components.values():
        if isinstance(part, torch.nn.Module) and not any(part is other for other in trained):
            part.to(device)


def part_states(task: Task, state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each of ``task.parts`` in the weights of ``task.trained``."""
    if task.trained is task.network:
        return {task.name: state}
    prefixes = {name: "network." if name == task.name else f"{name}." for name in task.parts}
    return {
        name: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for name, prefix in prefixes.items()
    }


def save_weights(task: Task, state: dict[str, torch.Tensor], folder: Path, lora: bool, dtype: torch.dtype) -> None:
    """Write the LoRA weights, the whole pipeline, or the network of a task without one into ``folder``.

    Args:
        state: the weights of ``task.trained``.
        lora: whether only adapters were trained.
        dtype: of the trained weights in the files; frozen parts keep theirs.
    """
    states = part_states(task, state)
    if lora:
        from peft.utils import get_peft_model_state_dict

        layers = {}
        for name, part in task.parts.items():  # in peft's names, all of which diffusers loads
            own = get_peft_model_state_dict(part, state_dict=states[name])
            layers[f"{name}_lora_layers"] = {key: value.to(dtype) for key, value in own.items()}
        task.pipe.save_lora_weights(folder, **layers)
        return
    whole = {name: _whole(part, states[name], dtype) for name, part in task.parts.items()}
    if not isinstance(task.pipe, diffusers.DiffusionPipeline):
        whole[task.name].save_pretrained(folder)
        return
    task.pipe.register_modules(**whole)
    try:
        task.pipe.save_pretrained(folder)
        for name, part in whole.items():
            if isinstance(part, PreTrainedModel):
                _load_as_float32(folder / name / "config.json")
    finally:
        task.pipe.register_modules(**task.parts)


def _load_as_float32(config: Path) -> None:
    """Let a model of transformers be loaded in float32 whatever its weights are stored in, as those of diffusers are:
    a pipeline without a ``torch_dtype`` would mix the two."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")


def _whole(part: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """A copy of a trained module on the host, with these weights, however it was wrapped for training."""
    make = getattr(type(part), "from_config", None) or type(part)  # diffusers' models, transformers'
    module = make(part.config)
    module.load_state_dict(state)
    for values in itertools.chain(module.parameters(), module.buffers()):
        if values.is_floating_point():
            values.data = values.data.to(dtype)
    return module
