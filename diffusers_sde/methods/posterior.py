r"""Sampling from ``p(x_0 | y)`` for ``y = A x_0 + noise_std n`` with A linear: guidance by the likelihood of y.

By Bayes' rule ``score(x_t | y) = score(x_t) + grad log p(y | x_t)``, in terms of ``D = E[x_0|x_t]``:

    E[x_0 | x_t, y] = D + (sigma^2/alpha) grad log p(y | x_t),
    grad log p(y | x_t) ~ (dD/dx)' A' S^-1 (y - A D),          S = A C A' + noise_std^2 I,

exact where ``p(x_0 | x_t)`` is Gaussian with covariance C.  What is taken for C:

* ``mmps``: ``C = Cov[x_0|x_t] = (sigma^2/alpha) dD/dx`` (Rozet et al. 2024, arXiv:2405.13712, eq. 16), by conjugate
  gradients on products with the Jacobian; exact for Gaussian data;
* ``pigdm``: ``C = r^2 I``, ``r^2 = c^2 sigma^2/(c^2 alpha^2 + sigma^2)`` (Song et al. 2023, PiGDM, section 3.2);
* ``dps``: no covariance: after each step ``x <- x - scale grad ||y - A D||`` (Chung et al. 2023, arXiv:2209.14687,
  algorithm 1);
* ``projection``: no likelihood: after each step the part of the state that A sees is replaced by that of a noised
  observation, ``x <- x + A^+ (alpha y + sigma A z - A x)``, which takes y to be exact.  With a mask for A it is the
  imputation of Song et al. 2021 (arXiv:2011.13456, appendix I.2; for any A arXiv:2111.08005), with
  :func:`super_resolution` it is ILVR (Choi et al. 2021, arXiv:2108.02938, algorithm 1), whose low-pass filter is
  ``A^+ A``.  The posterior only where what A sees and the rest are independent: fast, less faithful than the others.

At alpha = 0, where ``dD/dx`` is 0 and x says nothing, C is the covariance of the data: its limit is taken from the
network just below (``LIMIT_LOG_SNR``).  The operator is any linear function of pixels, its adjoint is found by
automatic differentiation; after a decoder it is linearised at D.  Knows fields; knows nothing of pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_sde.errors import check_whole, is_real
from diffusers_sde.methods.fields import Field
from diffusers_sde.weights import Point

METHODS = ("mmps", "pigdm", "dps", "projection")
LIMIT_LOG_SNR = -7.0  # alpha is 1e-3 of sigma: small for the limit, large for the rounding of float32 networks
Operator = Callable[[torch.Tensor], torch.Tensor]


# -- operators: pixels (N, C, H, W) to measurements (N, ...) --


def inpainting(mask: torch.Tensor) -> Operator:
    """What is left of pixels where some are missing: ``x[mask]``.

    Args:
        mask: boolean, (H, W) or (C, H, W), True where x is known.

    Returns:
        Operator from (N, C, H, W) to (N, number of known values); it raises ``ValueError`` for pixels of another size.

    Raises:
        ValueError: for a mask that is not boolean, or True nowhere.
    """
    if mask.dtype != torch.bool or mask.ndim not in (2, 3) or not bool(mask.any()):
        raise ValueError("The mask must be boolean, (H, W) or (C, H, W), and True where pixels are known.")

    def masked(x: torch.Tensor) -> torch.Tensor:
        if mask.shape not in (x.shape[-2:], x.shape[1:]):
            raise ValueError(
                f"The mask has shape {tuple(mask.shape)}, the pixels {tuple(x.shape[1:])}: they must agree."
            )
        return x[:, mask.expand(x.shape[1:]).to(x.device)]

    return masked


def super_resolution(factor: int) -> Operator:
    """The mean of each ``factor`` x ``factor`` block of pixels.

    Args:
        factor: 2 or more.

    Returns:
        Operator from (N, C, H, W) to (N, C, H/factor, W/factor); it raises ``ValueError`` for sizes that the factor
        does not divide.

    Raises:
        ValueError: for a factor below 2.
    """
    check_whole("factor", factor, 2)

    def pooled(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} pixels are not divisible by {factor}: use another factor.")
        return F.avg_pool2d(x, factor)

    return pooled


def gaussian_blur(std: float) -> Operator:
    """Convolution with a Gaussian, cut at three standard deviations, mirrored at the border.

    Args:
        std: standard deviation in pixels, positive.

    Returns:
        Operator from (N, C, H, W) to (N, C, H, W); it raises ``ValueError`` for pictures smaller than the Gaussian.

    Raises:
        ValueError: for a std that is not positive.
    """
    if not (is_real(std) and 0 < std < math.inf):
        raise ValueError(f"std must be positive and finite, not {std!r}.")
    radius = max(math.ceil(3 * std), 1)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / std) ** 2)
    weights /= weights.sum()

    def blurred(x: torch.Tensor) -> torch.Tensor:
        if min(x.shape[-2:]) <= radius:
            raise ValueError(f"A blur of std {std:g} needs more than {radius} pixels a side: use a smaller one.")
        kernel = weights.to(x).expand(x.shape[1], 1, 1, -1)
        rows = F.conv2d(F.pad(x, (radius, radius, 0, 0), "reflect"), kernel, groups=x.shape[1])
        return F.conv2d(F.pad(rows, (0, 0, radius, radius), "reflect"), kernel.mT, groups=x.shape[1])

    return blurred


def linear_map(matrix: torch.Tensor) -> Operator:
    """A matrix on flattened pixels: compressed sensing.

    Args:
        matrix: (m, C H W).

    Returns:
        Operator from (N, C, H, W) to (N, m); it raises ``ValueError`` for pixels of another number.

    Raises:
        ValueError: for what is no matrix.
    """
    if matrix.ndim != 2:
        raise ValueError(f"The matrix must have shape (m, C H W), not {tuple(matrix.shape)}.")

    def product(x: torch.Tensor) -> torch.Tensor:
        if x[0].numel() != matrix.shape[1]:
            raise ValueError(f"The matrix has {matrix.shape[1]} columns for {x[0].numel()} values: they must agree.")
        return x.flatten(1) @ matrix.to(x).mT

    return product


def adjoint(operator: Operator, y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``A' y`` by automatic differentiation.

    Args:
        operator: A.
        y: (N, ...).
        like: pixels (N, C, H, W), for their shape, dtype and device.

    Returns:
        (N, C, H, W).
    """
    with torch.enable_grad():
        x = torch.zeros_like(like).requires_grad_()
        return torch.autograd.grad(operator(x), x, y)[0]


def check_observation(operator: Operator, y: torch.Tensor, noise_std: float, pixels: torch.Tensor) -> None:
    """Refuse what cannot be solved, before any work is done.

    Args:
        operator: tried on random pixels.
        y: the observations (N, ...), all of them.
        noise_std: of its noise.
        pixels: (N, C, H, W), of any N, for their shape, dtype and device.

    Raises:
        ValueError: unless the operator is linear, differentiable and makes tensors of y's shape, y is finite and
            noise_std positive.
    """
    if not (is_real(noise_std) and noise_std > 0):
        raise ValueError(f"noise_std must be positive, not {noise_std!r}: use a small one where there is no noise.")
    generator = torch.Generator().manual_seed(0)  # the caller's own stream of random numbers is not touched
    one, two = torch.randn(2, *pixels.shape, generator=generator).to(pixels)
    with torch.enable_grad():
        outputs = [operator(v.requires_grad_()) for v in (one, two, one - 2 * two)]
    expected_shape = torch.Size((len(pixels), *y.shape[1:]))
    if not isinstance(outputs[0], torch.Tensor) or outputs[0].shape != expected_shape:
        shape = getattr(outputs[0], "shape", type(outputs[0]).__name__)
        raise ValueError(f"The operator makes {shape} of these pixels, y is {expected_shape}: they must agree.")
    if not outputs[0].requires_grad:
        raise ValueError("The operator is not differentiable: write it in torch functions, without detach or numpy.")
    first, second, both = (output.detach() for output in outputs)
    expected = first - 2 * second
    if float((both - expected).norm()) > 1e-3 * float(expected.norm()):
        raise ValueError("The operator is not linear (an offset counts too): subtract the offset from y, or linearise.")
    if not bool(y.isfinite().all()):
        raise ValueError("The observation is not finite: leave unknown values out with a mask.")


# -- guidance --


@dataclass(frozen=True)
class Measurement:
    """What was observed: ``y = operator(decode(x_0)) + noise_std n``.

    Args:
        operator: A, from pixels (N, C, H, W) to (N, ...).
        y: (N, ...).
        noise_std: standard deviation of the noise, positive.
        decode: from latents to pixels; None in pixel space.
    """

    operator: Operator
    y: torch.Tensor
    noise_std: float
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x0: torch.Tensor) -> torch.Tensor:
        return self.operator(x0 if self.decode is None else self.decode(x0).to(x0.dtype))


def conditional_mean(
    field: Field,
    x: torch.Tensor,
    point: Point,
    measurement: Measurement,
    *,
    method: str = "mmps",
    data_std: float = 1.0,
    iterations: int = 5,
    max_noise: float = 5.0,
    time: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The data prediction given the observation, by the formula of the module docstring.

    Above ``max_noise`` the network's Jacobian is not used, ``(sigma^2/alpha) dD/dx`` is ``r^2 I`` there: a network's
    error enters it times ``(sigma/alpha)^2`` (sigma/alpha for v prediction); on the embedded network it was not
    positive from about 25 on, on an epsilon network from about 12 on.

    Args:
        field: the network.
        x: the state (N, C, H, W).
        point: its noise level.
        measurement: y and how it came about.
        method: mmps, pigdm or dps, or projection, which leaves the data prediction as it is (see :func:`project`).
        data_std: c, the scale of the data.
        iterations: steps of conjugate gradients; each costs one backward pass (pigdm: none through the network).
        max_noise: noise level sigma/alpha above which the network's Jacobian is not used; inf for an exact oracle.
        time: what the network is given for ``point``, as in :meth:`diffusers_sde.methods.fields.Field.output`.

    Returns:
        ``(E[x_0 | x_t, y], 0)`` by mmps and pigdm, ``(E[x_0 | x_t], grad_x ||y - A D||)`` by dps, ``(E[x_0 | x_t], 0)``
        by projection, of x's shape and dtype.
    """
    if method == "projection":
        with torch.no_grad():
            return field(x, point, time=time), torch.zeros_like(x)
    isotropic = point.sigma > max_noise * point.alpha if point.alpha else not math.isinf(max_noise) or method == "dps"
    c2 = data_std**2
    r2 = c2 * point.sigma**2 / (c2 * point.alpha**2 + point.sigma**2)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        state = x.detach().requires_grad_()
        mean = field(state, point, time=time)
        sloped, slope_at = mean, point  # what C is read from, and where
        if point.alpha == 0 and not isotropic:
            slope_at = Point(*(float(v) for v in field.path.alpha_sigma_of(LIMIT_LOG_SNR)))
            sloped = field(state, slope_at)
        leaf = mean.detach().requires_grad_()
        predicted = measurement(leaf)
        residual = (measurement.y - predicted).detach()

        def transposed(v: torch.Tensor) -> torch.Tensor:  # A' v
            return torch.autograd.grad(predicted, leaf, v, retain_graph=True)[0]

        def forward(u: torch.Tensor) -> torch.Tensor:  # A u: the derivative of v -> A' v, which is linear, along u
            if measurement.decode is None:
                return measurement.operator(u)
            v = torch.zeros_like(predicted, requires_grad=True)
            (pulled,) = torch.autograd.grad(predicted, leaf, v, create_graph=True)
            return torch.autograd.grad(pulled, v, u)[0]

        def smooth(u: torch.Tensor) -> torch.Tensor:  # (sigma^2/alpha) (dD/dx)' u
            if isotropic:
                return r2 * u
            return torch.autograd.grad(sloped, state, u, retain_graph=True)[0] * (slope_at.sigma**2 / slope_at.alpha)

        if method == "dps":
            misfit = transposed(residual / _norm(residual).clamp(min=1e-12))
            return mean.detach(), -smooth(misfit) * (point.alpha / point.sigma**2)

        def covariance(u: torch.Tensor) -> torch.Tensor:
            return smooth(u) if method == "mmps" else r2 * u

        def system(v: torch.Tensor) -> torch.Tensor:
            return (forward(covariance(transposed(v))) + measurement.noise_std**2 * v).detach()

        weights = conjugate_gradients(system, residual, iterations, floor=measurement.noise_std**2)
        guided = mean.detach() + smooth(transposed(weights))
    return guided.detach(), torch.zeros_like(x)


def project(
    x: torch.Tensor, point: Point, measurement: Measurement, z: torch.Tensor, iterations: int = 5
) -> torch.Tensor:
    """The state nearest to x that agrees with the observation at its noise level, ``x + A^+ (alpha y + sigma A z -
    A x)``, ``A^+ = A' (A A')^-1`` (Song et al. 2021, arXiv:2011.13456, appendix I.2; Choi et al. 2021,
    arXiv:2108.02938, eq. 8).

    Args:
        x: the state (N, C, H, W).
        point: its noise level.
        measurement: y and how it came about, of pixels; its noise is not used.
        z: unit normals (N, C, H, W).
        iterations: steps of conjugate gradients; one is exact for masks and block means.

    Returns:
        The projected state (N, C, H, W).
    """
    operator = measurement.operator

    def system(v: torch.Tensor) -> torch.Tensor:  # A A' v
        return operator(adjoint(operator, v, x))

    missing = point.alpha * measurement.y + operator(point.sigma * z - x)
    return x + adjoint(operator, conjugate_gradients(system, missing, iterations), x)


def conjugate_gradients(
    system: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    iterations: int,
    *,
    floor: float = 0.0,
    tolerance: float = 1e-5,
) -> torch.Tensor:
    """Solve ``system(v) = right`` for each sample of a batch (Hestenes & Stiefel 1952).

    A sample stops where its residual is small, and where the curvature along its search direction is below half the
    floor: a network's Jacobian is only nearly symmetric and positive.

    Args:
        system: (N, ...) to (N, ...), linear in each sample, symmetric and at least ``floor`` times the identity.
        right: (N, ...).
        iterations: at most so many products with ``system``.
        floor: smallest eigenvalue that is possible.
        tolerance: residual relative to ``right`` at which a sample stops.

    Returns:
        v (N, ...).
    """
    solution, residual = torch.zeros_like(right), right
    direction, square = residual, _dot(residual, residual)
    goal = tolerance**2 * square
    for _ in range(iterations):
        product = system(direction)
        curvature, length = _dot(direction, product), _dot(direction, direction)
        going = (square > goal) & (curvature > 0.5 * floor * length) & (curvature > 0)
        if not bool(going.any()):
            break
        step = torch.where(going, square / curvature.where(going, torch.ones_like(curvature)), 0.0)
        solution = solution + step * direction
        residual = residual - step * product
        new = torch.where(going, _dot(residual, residual), torch.zeros_like(square))
        direction = residual + new / square.clamp(min=1e-300 if square.dtype == torch.float64 else 1e-30) * direction
        square = new
    return solution


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _norm(a: torch.Tensor) -> torch.Tensor:
    return _dot(a, a).sqrt()


def check_method(method: str, data_std: float, iterations: int, max_noise: float, dps_scale: float) -> None:
    """Refuse settings that do not exist or do not fit, before any work is done.

    Args:
        method: of :func:`conditional_mean`, as are the next three.
        data_std: positive.
        iterations: at least 1.
        max_noise: positive.
        dps_scale: positive.

    Raises:
        ValueError: for any other.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    check_whole("solver_iterations", iterations)
    for name, value in (("data_std", data_std), ("max_noise", max_noise), ("dps_scale", dps_scale)):
        if not (is_real(value) and value > 0):
            raise ValueError(f"{name} must be positive, not {value!r}.")
