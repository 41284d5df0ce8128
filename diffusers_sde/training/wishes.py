"""What pictures a reward fine-tuning makes: prompts, classes or nothing, in an order that is a function of the seed.

Knows the prompts of a file and the classes of a network.  Reads no pictures and knows no rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusers_sde.conditioning import takes_prompts
from diffusers_sde.errors import UsageError
from diffusers_sde.sampling import class_names
from diffusers_sde.training.framing import Framing
from diffusers_sde.training.samples import Item, TrainingData, annotation, epoch_order, sample_seed


class Wishes(TrainingData):
    """Prompts or labels without pictures: ``group`` consecutive positions ask for the same, and the wishes of an epoch
    are permuted.

    Items are ``{"caption": str}``, ``{"class_labels": int}`` or, of a model that is asked for nothing, ``{}``.

    Args:
        framing: of the pictures that the model makes.
        group: positions of one wish.
        prompts: what a text-to-image model is asked for.
        classes: of a class-conditional model; 0: none.
        names: of the classes.
    """

    def __init__(
        self,
        framing: Framing,
        group: int,
        *,
        prompts: Sequence[str] | None = None,
        classes: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        self.framing, self.group, self.prompts = framing, group, None if prompts is None else list(prompts)
        self.class_names = list(names or map(str, range(classes))) if classes and prompts is None else None
        self.captions = prompts is not None

    def __len__(self) -> int:
        return len(self.prompts or self.class_names or [None])

    def item(self, index: int, seed: int) -> Item:
        """The wish of this number."""
        return annotation(
            None if self.class_names is None else index,
            None if self.prompts is None else self.prompts[index],
            seed,
        )

    def items(self, positions: Iterable[int], seed: int) -> Iterator[Item]:
        """Those at increasing positions of the endless sequence of groups."""
        for position in positions:
            epoch, within = divmod(position // self.group, len(self))
            yield self.item(int(epoch_order(len(self), seed, epoch)[within]), sample_seed(seed, position))


def read_prompts(file: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        UsageError: for a file without any.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt_file {file} is no text in UTF-8: pass one prompt a line.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompt_file {file} has no prompts: pass one a line.")
    return prompts


def make_wishes(
    pipe: Any, framing: Framing, group: int, prompt_file: str | None, captions: Sequence[str] | None
) -> Wishes:
    """What a pipeline is asked for.

    Args:
        framing: of its pictures.
        group: positions of one wish.
        prompt_file: of a text-to-image model.
        captions: in its place.

    Raises:
        UsageError: for a text-to-image model without prompts, and for prompts of another one.
    """
    if takes_prompts(pipe):
        if prompt_file is None and not captions:
            raise UsageError(f"{type(pipe).__name__} is asked for prompts: pass --prompt_file, one prompt a line.")
        prompts = list(captions or ()) if prompt_file is None else read_prompts(prompt_file)
        return Wishes(framing, group, prompts=list(dict.fromkeys(prompts)))
    if prompt_file is not None:
        raise UsageError(f"{type(pipe).__name__} takes no prompts: leave out --prompt_file.")
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    config = getattr(network, "config", {})
    classes = (config.get("num_class_embeds") or 1) - 1 or config.get("num_embeds_ada_norm") or 0
    return Wishes(framing, group, classes=classes, names=class_names(network) if classes else None)
