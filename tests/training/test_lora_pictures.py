"""LoRA weights of every family that can be tuned: one step, saved, loaded by diffusers into a fresh pipeline, whose
picture is that of the pipeline that was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from training_tasks import one_step, picture, text_task

from diffusers_sde.training import text
from diffusers_sde.training.parts import add_lora, save_weights

FAMILIES = ["sd", "sdxl", "sd3", "sana", "cogview4", "flux", "qwen_image", "z_image"]


def assert_the_loaded_picture_is_the_trained_one(name: str, task: Any, folder: Path) -> None:
    fresh = copy.deepcopy(task.pipe)
    add_lora(task, 2)
    one_step(task, learning_rate=0.1)
    trained = picture(name, task.pipe)
    save_weights(task, task.trained.state_dict(), folder, lora=True, dtype=torch.float32)
    untuned = picture(name, fresh)
    fresh.load_lora_weights(folder)
    torch.testing.assert_close(picture(name, fresh), trained, rtol=0, atol=1e-5)
    assert (trained - untuned).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_pipeline_with_the_saved_weights_makes_the_picture_of_the_trained_one(
    name: str, tmp_path: Path
) -> None:
    assert_the_loaded_picture_is_the_trained_one(name, text_task(name), tmp_path)


def test_weights_that_the_pipeline_could_not_save_are_refused_before_the_training() -> None:
    task = text.with_text_encoder(text_task("cogview4"))
    with pytest.raises(ValueError, match="takes no LoRA weights on its CLIPTextModel: leave out --train_text_encoder"):
        add_lora(task, 2)


def test_weights_on_the_text_encoder_are_loaded_with_those_on_the_network(tmp_path: Path) -> None:
    assert_the_loaded_picture_is_the_trained_one("sd", text.with_text_encoder(text_task("sd")), tmp_path)
