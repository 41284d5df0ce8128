"""The keys of a scheduler config: ONE table of their defaults, families and meanings, and the path that they describe.

Knows diffusers' names for the parameters of a forward process, the further parameters that all schedulers here share,
and how a config that was changed in place is read.  A *process* is a forward process in this package, its *process
keys* are those of a config that describe it.  Knows nothing of diffusers' classes, of steps or of tables
(:mod:`diffusers_sde.stock_configs` knows the classes).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusers_sde.paths import FlowMatching, Path, VarianceExploding, VariancePreserving

VP, FLOW, EDM = VariancePreserving.family, FlowMatching.family, VarianceExploding.family
ANY, GRID, DATA = "any", "grid", "data prediction"


@dataclass(frozen=True)
class Key:
    """One config key.  ``family`` is the process it belongs to, or what else it sets; ``path`` says whether the
    path or what the network says of it depend on it; ``alias`` is another name that diffusers has for it."""

    name: str
    annotation: str
    default: Any
    family: str
    meaning: str
    path: bool = False
    alias: str | None = None


# fmt: off
TABLE = (
    Key("num_train_timesteps", "int", 1000, ANY, "number T of training times", path=True),
    Key("prediction_type", "str", "epsilon", ANY,
        "what the network says: epsilon, sample, v_prediction, flow_prediction or score", path=True),
    Key("use_flow_sigmas", "bool", False, ANY, "flow matching: alpha = 1 - sigma; with a sigma_data EDM, the network "
        "not preconditioned (Cosmos 2)", path=True),
    Key("beta_start", "float", 0.0001, VP, "first beta of the schedule", path=True),
    Key("beta_end", "float", 0.02, VP, "last beta of the schedule", path=True),
    Key("beta_schedule", "str", "linear", VP,
        "linear, scaled_linear, squaredcos_cap_v2, sigmoid, exp or laplace", path=True),
    Key("trained_betas", "Any", None, VP, "the betas themselves, in place of a schedule", path=True),
    Key("rescale_betas_zero_snr", "bool", False, VP, "end the training times at pure noise", path=True),
    Key("snr_shift_scale", "float", 1.0, VP, "divide the signal-to-noise ratio by this (CogVideoX)", path=True),
    Key("shift", "float", 1.0, FLOW, "static time shift of the grid", path=True, alias="flow_shift"),
    Key("use_dynamic_shifting", "bool", False, FLOW, "shift by the `mu` of set_timesteps instead", path=True),
    Key("base_shift", "float", 0.5, FLOW, "mu at base_image_seq_len; pipelines compute with it"),
    Key("max_shift", "float", 1.15, FLOW, "mu at max_image_seq_len; pipelines compute with it"),
    Key("base_image_seq_len", "int", 256, FLOW, "see base_shift"),
    Key("max_image_seq_len", "int", 4096, FLOW, "see max_shift"),
    Key("time_shift_type", "str", "exponential", FLOW, "exponential (factor e^mu) or linear (factor mu)", path=True),
    Key("shift_terminal", "float | None", None, FLOW, "stretch the shifted grid to end at this sigma", path=True),
    Key("invert_sigmas", "bool", False, FLOW, "the network sees T (1 - sigma) and says x_0 - eps (Mochi)", path=True),
    Key("sigma_data", "float | None", None, EDM, "data scale; a number means variance exploding", path=True),
    Key("sigma_min", "float | None", None, EDM, "smallest training noise (None: 0.002); on flow matching the smallest "
        "sigma/alpha of the karras, exponential and beta grids", path=True),
    Key("sigma_max", "float | None", None, EDM, "largest training noise (None: 80); on flow matching the largest "
        "sigma/alpha of those grids", path=True),
    Key("noise_conditioning", "str", "log", EDM, "the network's time: log (log(sigma)/4) or atan (2 atan(sigma)/pi)",
        path=True),
    Key("sigma_schedule", "str | None", None, EDM, "the law along which ramps of sigmas "
        "that pipelines pass are laid: karras or exponential"),
    Key("grid", "str | None", None, GRID, "balanced, power, noise_fraction, trailing, leading, linspace, log_snr, "
        "exponential, karras, beta or ays; None: the measured default"),
    Key("rho", "float | None", None, GRID, "exponent of balanced, power, noise_fraction and karras"),
    Key("steps_offset", "int", 0, GRID, "added to the timesteps of the leading grid"),
    Key("final_sigmas_type", "str", "zero", GRID, "where the last step ends: zero or sigma_min"),
    Key("round_timesteps", "bool", False, GRID, "for networks that only know integer timesteps"),
    Key("clip_sample", "bool", False, DATA, "limit the data prediction to +-clip_sample_range; the whole step follows "
        "it, as DDIM's does with use_clipped_model_output=True"),
    Key("clip_sample_range", "float", 1.0, DATA, "see clip_sample"),
    Key("thresholding", "bool", False, DATA, "limit it to its dynamic_thresholding_ratio quantile (Saharia et al.)"),
    Key("dynamic_thresholding_ratio", "float", 0.995, DATA, "see thresholding"),
    Key("sample_max_value", "float", 1.0, DATA, "upper limit of the quantile"),
    Key("variance_type", "str", "fixed_small", DATA, "learned and learned_range outputs are split; fixed_large, "
        "the posterior of unit normal data, is honoured by the first-order reverse SDE"),
)
# fmt: on
SHARED = {key.name: key for key in TABLE}
ALIASES = {key.alias: key.name for key in TABLE if key.alias}


def process_keys(family: str, *, path: bool = False) -> tuple[str, ...]:
    """The keys of a forward process of this family, those of any process first; with ``path`` only those on which
    the path or what the network says of it depend."""
    return tuple(k.name for of in (ANY, family) for k in TABLE if k.family == of and (k.path or not path))


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a config in this package's keys: a ``sigma_data`` means EDM, ``use_flow_sigmas`` flow matching,
    anything else variance preserving."""
    if config.get("sigma_data") is not None:
        return EDM
    return FLOW if config.get("use_flow_sigmas") else VP


def process_value(config: Mapping[str, Any], key: str) -> Any:
    """The value of a process key, its default where there is none; arrays as lists, switches as booleans."""
    value, default = config.get(key), SHARED[key].default
    if value is None:
        return {"sigma_min": 0.002, "sigma_max": 80.0}.get(key, default)
    if isinstance(value, list | tuple | np.ndarray):
        return [float(v) for v in value]
    return bool(value) if isinstance(default, bool) else value


def current(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config is now: a mapping to read from, not to keep.

    diffusers' ``FrozenDict`` keeps every key twice, as an item and as an attribute, and ``scheduler.config.shift = 3``
    sets the attribute alone: attributes are what counts, and a changed ``flow_shift`` counts as ``shift``.  Costs about
    a microsecond.
    """
    attributes = getattr(config, "__dict__", None)
    if not attributes:
        return config
    for alias, key in ALIASES.items():
        if _changed(config, alias) and not _changed(config, key):
            return {**attributes, key: attributes[alias]}
    return attributes


def _changed(config: Mapping[str, Any], key: str) -> bool:
    """Whether a key of a ``FrozenDict`` was set by attribute since the config was made."""
    attribute: Any = vars(config).get(key)
    item: Any = config.get(key)
    return key in config and attribute is not item and not np.array_equal(attribute, item)


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy of what a config is now; what was changed no longer stands in its ``_use_default_values``."""
    if not getattr(config, "__dict__", None):
        return dict(config)
    now = {**config, **current(config)}
    unset = now.get("_use_default_values") or ()
    now["_use_default_values"] = [key for key in unset if not _changed(config, key)]
    del now["_FrozenDict__frozen"]
    return now


# -- the signature of the schedulers --


def scheduler_init(init: Callable[..., None]) -> Callable[..., None]:
    """Make ``init``'s keyword parameters and those of :data:`TABLE` the signature of ``__init__``, document the latter
    and register all of them.

    Everything goes into the config, defaults too: other classes' defaults differ (``beta_start`` is 0.00085 in some),
    and a key that diffusers takes for unset would change the process on the way to them.  So only the solver's own keys
    are marked as unset (``_use_default_values``) where nobody passed them, and every name that diffusers has for a key
    gets its value.  The class is named too, so that a conversion to a stock class and back knows whose word counts.
    """
    parameters = list(inspect.signature(init).parameters.values())
    names = {p.name for p in parameters}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shared = [inspect.Parameter(k.name, kind, default=k.default, annotation=k.annotation) for k in TABLE]
    signature = inspect.Signature([*parameters, *(p for p in shared if p.name not in names)])

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **{k: v for k, v in kwargs.items() if not k.startswith("_")})
        unset = sorted(names - set(bound.arguments))
        bound.apply_defaults()
        values = {k: v for k, v in bound.arguments.items() if k != "self"}
        aliases = {alias: values[name] for alias, name in ALIASES.items()}
        marks = {"_class_name": type(self).__name__, **({"_use_default_values": unset} if unset else {})}
        self.register_to_config(**values, **aliases, **marks)
        init(self, **{k: v for k, v in values.items() if k in names})

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__doc__ = described(TABLE)
    return __init__


def described(keys: tuple[Key, ...]) -> str:
    """The keys as the ``Args`` of a docstring, one a line with family, default and meaning."""
    lines = (f"    {k.name} ({k.annotation}, default {k.default!r}; {k.family}): {k.meaning}." for k in keys)
    return "\n".join(["The parameters of the class, then those that every scheduler here shares.", "", "Args:", *lines])


# -- the path --


def betas_from_config(config: Mapping[str, Any]) -> np.ndarray:
    """``beta_k`` (float64, length T) of every ``beta_schedule`` of diffusers, or ``trained_betas``."""
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], np.float64)
    n, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    schedule = config["beta_schedule"]
    if schedule == "linear":
        return np.linspace(first, last, n)
    if schedule == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, n) ** 2
    if schedule == "sigmoid":
        return (last - first) / (1 + np.exp(-np.linspace(-6, 6, n))) + first
    u = np.arange(n + 1) / n
    if schedule in ("squaredcos_cap_v2", "cosine"):
        abar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    elif schedule == "exp":
        abar = np.exp(-12 * u)
    elif schedule == "laplace":
        lam = -0.5 * np.copysign(1, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
        abar = np.sqrt(1 / (1 + np.exp(-lam)))
    else:
        raise ValueError(
            f"beta_schedule {schedule!r} is unknown: use linear, scaled_linear, squaredcos_cap_v2, sigmoid, exp, "
            "laplace, or pass trained_betas."
        )
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> np.ndarray:
    """``alpha^2`` at integer times, with ``snr_shift_scale`` (CogVideoX) and zero terminal SNR (arXiv:2305.08891)."""
    abar = np.cumprod(1 - betas_from_config(config))
    k = config.get("snr_shift_scale") or 1.0
    abar = abar / (k + (1 - k) * abar)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


_PATH_KEYS = tuple(k.name for k in TABLE if k.path)


def path_from_config(config: Mapping[str, Any]) -> Path:
    """The forward process of a config in this package's keys, as it is now (:func:`current`).

    The training range of a flow network that says epsilon or the score begins at sigma = 1 - 1/T: at alpha = 0 its
    output carries no information about the data.  Raises ``ValueError`` for a process that does not exist.
    """
    now = current(config)
    values = (now.get(key) for key in _PATH_KEYS)
    return _build_path(tuple(tuple(v) if isinstance(v, list | np.ndarray) else v for v in values))


@functools.lru_cache(maxsize=32)
def _build_path(values: tuple) -> Path:
    written = dict(zip(_PATH_KEYS, values, strict=True))
    config = {key: process_value(written, key) for key in _PATH_KEYS}
    family = family_of(config)
    if family == EDM:
        return VarianceExploding(
            config["sigma_min"],
            config["sigma_max"],
            config["sigma_data"],
            config["noise_conditioning"],
            preconditioned=not config["use_flow_sigmas"],
        )
    if family == VP:
        return VariancePreserving(alphas_cumprod_from_config(config))
    steps, limits = config["num_train_timesteps"], (written["sigma_min"], written["sigma_max"])
    ratio = None not in limits
    low, high = (s / (1 + s) for s in limits) if ratio else (1 / steps, 1.0)
    silent = config["prediction_type"] in ("epsilon", "score")
    return FlowMatching(
        steps,
        config["shift"],
        config["use_dynamic_shifting"],
        config["time_shift_type"],
        config["shift_terminal"],
        config["invert_sigmas"],
        sigma_range=(low, min(high, 1 - 1 / steps) if silent else high),
        ramps_in_ratio=ratio,
    )
