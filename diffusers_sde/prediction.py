"""What the network says: every parameterisation is ``A x_0 + B eps``, so each converts to every other.

Knows the coefficients ``(A, B)`` of ``epsilon``, ``sample``, ``v_prediction``, ``flow_prediction`` and ``score``, the
2x2 linear algebra between them (Lai et al., arXiv:2510.21890, chapter 6), and which half of an output with learned
variances is the prediction.  Coefficients are floats; knows nothing of grids or solvers.
"""

from __future__ import annotations

from typing import Any

from diffusers_sde.paths import Path

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "score")
Coefficients = tuple[float, float]
DATA: Coefficients = (1.0, 0.0)  # the parameterisation A x_0 + B eps that is x_0 itself
NOISE: Coefficients = (0.0, 1.0)


def prediction_coefficients(prediction_type: str, alpha: float, sigma: float) -> Coefficients:
    """What a prediction type means: epsilon (0, 1); sample (1, 0); v_prediction (-sigma, alpha); flow_prediction
    (-1, 1); score (0, -1/sigma).

    Args:
        prediction_type: one of ``PREDICTION_TYPES``.
        alpha, sigma: of the state ``x = alpha x_0 + sigma eps``.

    Returns:
        ``(A, B)`` with ``prediction = A x_0 + B eps``.

    Raises:
        ValueError: for an unknown type and for the score at sigma = 0, where it does not exist.
    """
    if prediction_type == "epsilon":
        return NOISE
    if prediction_type == "sample":
        return DATA
    if prediction_type == "v_prediction":
        return -sigma, alpha
    if prediction_type == "flow_prediction":
        return -1.0, 1.0
    if prediction_type == "score":
        if sigma == 0:
            raise ValueError("The score does not exist at sigma = 0: stop at a positive noise level.")
        return 0.0, -1.0 / sigma
    raise ValueError(f"prediction_type {prediction_type!r} is unknown: use one of {', '.join(PREDICTION_TYPES)}.")


def model_coefficients(path: Path, prediction_type: str, alpha: float, sigma: float) -> Coefficients:
    """``(A, B)`` of what this path's network returns: :func:`prediction_coefficients`, unless the family gives the type
    a meaning of its own (:meth:`diffusers_sde.paths.Path.own_prediction`; EDM's preconditioning, inverted flow).

    Args:
        path: the forward process.
        prediction_type: the config's.
        alpha, sigma: of the state.

    Returns:
        ``(A, B)`` with ``output = A x_0 + B eps``.

    Raises:
        ValueError: as :func:`prediction_coefficients`.
    """
    special = path.own_prediction(prediction_type, sigma)
    return prediction_coefficients(prediction_type, alpha, sigma) if special is None else special


def convert(source: Coefficients, target: Coefficients, alpha: float, sigma: float) -> Coefficients:
    """One prediction from another: with ``m = A x_0 + B eps`` and ``det = alpha B - sigma A``,
    ``x_0 = (B x - sigma m)/det``, ``eps = (alpha m - A x)/det``.

    Args:
        source, target: ``(A, B)`` of the two predictions.
        alpha, sigma: of the state ``x = alpha x_0 + sigma eps``.

    Returns:
        ``(k_x, k_m)`` with ``target prediction = k_x x + k_m (source prediction)``.

    Raises:
        ValueError: where the source carries no information on the target: epsilon at alpha = 0, sample at sigma = 0.
    """
    if source == target:
        return 0.0, 1.0
    (a, b), (ta, tb) = source, target
    det = alpha * b - sigma * a
    if det == 0:
        raise ValueError(
            f"This prediction says nothing new at alpha = {alpha:g}, sigma = {sigma:g}: epsilon prediction needs a "
            "positive signal (use v_prediction, flow_prediction or sample with zero terminal SNR, or start below it), "
            "sample prediction a positive noise level."
        )
    return (ta * b - tb * a) / det, (tb * alpha - ta * sigma) / det


def from_model(
    path: Path, prediction_type: str, alpha: float, sigma: float, target: Coefficients = DATA
) -> Coefficients:
    """What a network's output m says of x_0, or of any other ``A x_0 + B eps``; the one place where a table, a field or
    a calibration reads a network.  (Its input is the state times :meth:`diffusers_sde.paths.Path.input_scale`.)

    Args:
        path, prediction_type: what the network returns.
        alpha, sigma: of the state x.
        target: ``(A, B)``, for example :func:`diffusers_sde.weights.evaluation_coefficients` for F.

    Returns:
        ``(k_x, k_m)`` with ``A x_0 + B eps = k_x x + k_m m``.

    Raises:
        ValueError: as :func:`convert` and :func:`prediction_coefficients`.
    """
    return convert(model_coefficients(path, prediction_type, alpha, sigma), target, alpha, sigma)


def to_model(path: Path, prediction_type: str, alpha: float, sigma: float, source: Coefficients = DATA) -> Coefficients:
    """The inverse of :func:`from_model`: what a network would say of a state whose x_0, or any other ``A x_0 + B eps``,
    is known.

    Args:
        path, prediction_type, alpha, sigma: as in :func:`from_model`.
        source: ``(A, B)`` of what is known.

    Returns:
        ``(k_x, k_d)`` with ``m = k_x x + k_d (A x_0 + B eps)``.

    Raises:
        ValueError: as :func:`convert` and :func:`prediction_coefficients`.
    """
    return convert(source, model_coefficients(path, prediction_type, alpha, sigma), alpha, sigma)


def split_variance(model_output: Any, sample: Any, variance_type: str) -> Any:
    """The prediction of a network that also says its variances: the first half of its channels (Nichol & Dhariwal 2021,
    arXiv:2102.09672, section 3.1).

    Args:
        model_output: tensor or array (N, 2C, ...), what the network returned.
        sample: the state (N, C, ...), for its shape.
        variance_type: the config's; ``learned`` and ``learned_range`` have variances.

    Returns:
        The first C channels, a view.

    Raises:
        ValueError: for outputs of any other shape, or of this one without learned variances.
    """
    shape, expected = tuple(model_output.shape), tuple(sample.shape)
    doubled = len(expected) > 1 and shape == (expected[0], 2 * expected[1], *expected[2:])
    if doubled and variance_type in ("learned", "learned_range"):
        return model_output[:, : expected[1]]
    raise ValueError(
        f"The model output has shape {shape}, the sample {expected}: they must agree"
        + (" (for learned variances set variance_type='learned_range')." if doubled else ".")
    )
