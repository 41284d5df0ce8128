"""``accelerate launch -m diffusers_sde.train``, also by path: the training script (:mod:`diffusers_sde.training`)."""

import sys

from diffusers_sde.training.script import main

if __name__ == "__main__":
    sys.exit(main())
