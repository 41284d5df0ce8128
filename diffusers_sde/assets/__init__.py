"""The models that ship with the package.  Knows where they lie; loads them with diffusers."""

from pathlib import Path

from diffusers import DDPMPipeline, DiffusionPipeline

from diffusers_sde.models.classifier import NoisyClassifierModel

ASSETS = Path(__file__).parent
DEFAULT_MODEL = ASSETS / "fashion_mnist"
FLOW_MAP_MODEL = ASSETS / "flow_maps" / "fashion_mnist"


def embedded_models() -> dict[str, Path]:
    """The folder of each embedded pipeline by its name, the default one first."""
    folders = sorted(file.parent for file in ASSETS.glob("*/model_index.json"))
    return {folder.name: folder for folder in sorted(folders, key=lambda folder: folder != DEFAULT_MODEL)}


def load_default_model() -> DDPMPipeline:
    """The embedded class-conditional Fashion-MNIST model (float32): labels 0..9, null label 10, 1x32x32 in [-1, 1]."""
    return DDPMPipeline.from_pretrained(DEFAULT_MODEL)


def load_default_classifier() -> NoisyClassifierModel:
    """``log p(label | x_t, t)`` up to a constant for noisy pictures of the default model's process, for classifier
    guidance (float32)."""
    return NoisyClassifierModel.from_pretrained(DEFAULT_MODEL / "classifier")


def load_default_flow_map() -> DiffusionPipeline:
    """The few-step form of the embedded model: a ``FlowMapUNet2DModel`` with guidance 2 built in (float32) and its
    :class:`FlowMapScheduler`, distilled from it."""
    return DiffusionPipeline.from_pretrained(FLOW_MAP_MODEL)
