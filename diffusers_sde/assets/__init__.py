"""The models that ship with the package.  Knows where they lie; loads them with diffusers."""

from pathlib import Path

from diffusers import DDPMPipeline

DEFAULT_MODEL = Path(__file__).parent / "fashion_mnist"


def load_default_model() -> DDPMPipeline:
    """The embedded class-conditional Fashion-MNIST model (float32): labels 0..9, null label 10, 1x32x32 in [-1, 1]."""
    return DDPMPipeline.from_pretrained(DEFAULT_MODEL)
