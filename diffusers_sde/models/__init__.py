"""The networks of this package: diffusers models whose output a scheduler here knows how to use."""
