"""What the bench of text measures: distances that are right, of every sampler."""

import pytest
import torch

from diffusers_sde.benchmarks import text
from diffusers_sde.discrete.oracles import JointTable


def test_the_distance_is_the_total_variation_and_the_entropy_that_of_the_samples():
    law = JointTable([[0.5, 0.0], [0.25, 0.25]])
    x = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 1]])
    distance, entropy = text.compare(x, law)
    assert distance == pytest.approx(0.25) and entropy == pytest.approx(1.0397, abs=1e-4)


def test_every_sampler_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(text, "SAMPLES", 40)
    monkeypatch.setattr(text, "CALLS", (4,))
    text.measure()
    said = capsys.readouterr().out
    for name in ("diffusers BlockRefinement", "diffusers DiscreteDDIM", "diffusers EntropyBound", *text.ALGORITHMS):
        assert name in said
