"""How often a sample is what was asked for, and a style to be learned: the benchmarks' own arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sde.benchmarks import captions, lora

NAMES = ["red", "green", "blue", "white"]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in zip(NAMES, COLOURS, strict=True):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "captions": [name, f"{name} field"]} for name in NAMES]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


@pytest.mark.parametrize(("shift", "share"), [(0, "100 %"), (1, "0 %")])
def test_a_sample_is_right_if_it_is_nearest_to_a_picture_of_its_caption(
    folder: Path, shift: int, share: str, monkeypatch, capsys
) -> None:
    """With the pictures themselves as samples, in their places or each in the next one's."""
    pictures, words = captions.read(folder)
    assert words[0] == ["red", "red field"] and pictures[2, :, 5, 5].tolist() == [0, 0, 1]

    def drawn(pipe: object, prompts: list[str], scale: float, seed: int) -> torch.Tensor:
        return pictures[[(NAMES.index(prompt) + shift) % 4 for prompt in prompts]]

    monkeypatch.setattr(captions, "COUNT", 4)
    monkeypatch.setattr(captions, "samples", drawn)
    captions.measure(0, str(folder))
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("emoji"))
    assert row.split("  ")[-1].strip() == share


def test_features_are_mean_colours_of_fields() -> None:
    picture = torch.arange(32.0 * 32).reshape(1, 1, 32, 32).expand(1, 3, 32, 32)
    found = captions.features(picture)
    assert found.shape == (1, 768)
    assert found[0, 0] == pytest.approx((0 + 1 + 32 + 33) / 4) and found[0, 17] == pytest.approx(2 * 32 + 2 + 16.5)


def test_the_style_inverts_brightness_and_has_one_ink(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """White becomes the ink, black would become white; captions stay with their pictures."""
    monkeypatch.setattr(lora, "COUNT", 4)
    style = lora.make_style(folder, tmp_path / "style", seed=0)
    rows = [json.loads(line) for line in (tmp_path / "style/metadata.jsonl").read_text().splitlines()]
    white = next(i for i, row in enumerate(rows) if row["text"] == "white")
    np.testing.assert_allclose(style[white, :, 3, 3], lora.BLUE, atol=1e-6)
    red = next(i for i, row in enumerate(rows) if row["text"] == "red")
    np.testing.assert_allclose(style[red, :, 3, 3], 2 / 3 + np.array(lora.BLUE) / 3, atol=1e-6)
    assert lora.distance(style, style) == 0
    assert lora.distance(style + 0.5, style) == pytest.approx(0.5)
