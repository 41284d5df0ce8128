"""``accelerate launch -m diffusers_sde.train``, also by path: the training script (:mod:`diffusers_sde.training`)."""

import sys

from diffusers_sde.training.processes import start_missing

if __name__ == "__main__":
    start_missing()
    from diffusers_sde.training.command import main

    sys.exit(main())
