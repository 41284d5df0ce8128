"""What the pipelines do beyond a scheduler: guidance, control, correctors, likelihood, inversion, inverse problems."""
