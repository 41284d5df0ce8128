"""``accelerate launch -m diffusers_sde.train``, also by path: the training script (:mod:`diffusers_sde.training`)."""

import sys

from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.launching import start_missing

if __name__ == "__main__":
    settings = read_settings()  # before the import below, which takes seconds
    start_missing()
    from diffusers_sde.training.command import run

    words = sys.argv[1:]
    sys.argv[1:] = map(settings.redacted, words)  # a tracker may send home how it was started
    sys.exit(run(settings, words))
