"""Published samplers, verbatim: each a recipe, and its table on any grid of any process.

Knows the methods that people choose by name (:data:`RECIPES`), where their stages lie (:func:`with_stages`) and the
rows that their formulas are (:func:`build_published`).  Nothing is guarded or improved here, unlike the tables of
:mod:`diffusers_sde.tables`, except that integrals which a paper approximates without need are exact (rule ``exact``).
Floats on the host only; knows no scheduler and no spelling of a name.
"""

from diffusers_sde.published._build import build_published, noise_levels
from diffusers_sde.published._recipes import RECIPES, Recipe, Stage
from diffusers_sde.published._stages import step_groups, with_stages

__all__ = ["RECIPES", "Recipe", "Stage", "build_published", "noise_levels", "step_groups", "with_stages"]
