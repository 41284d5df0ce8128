r"""Sampling from ``p(x_0 | y)`` for ``y = A x_0 + noise_std n`` with A linear: guidance by the likelihood of y.

By Bayes' rule ``score(x_t | y) = score(x_t) + grad log p(y | x_t)``, in terms of ``D = E[x_0|x_t]``:

    E[x_0 | x_t, y] = D + (sigma^2/alpha) grad log p(y | x_t),
    grad log p(y | x_t) ~ (dD/dx)' A' S^-1 (y - A D),          S = A C A' + noise_std^2 I,

exact where ``p(x_0 | x_t)`` is Gaussian with covariance C.  What is taken for C:

* ``mmps``: ``C = Cov[x_0|x_t] = (sigma^2/alpha) dD/dx`` (Rozet et al. 2024, arXiv:2405.13712, eq. 16), by conjugate
  gradients on products with the Jacobian; exact for Gaussian data;
* ``pigdm``: ``C = r^2 I``, ``r^2 = c^2 sigma^2/(c^2 alpha^2 + sigma^2)`` (Song et al. 2023, PiGDM, section 3.2);
* ``dps``: no covariance: after each step ``x <- x - scale grad ||y - A D||`` (Chung et al. 2023, arXiv:2209.14687,
  algorithm 1).

The operator is any linear function of pixels, its adjoint is found by automatic differentiation; after a decoder it is
linearised at D.  Knows fields; knows nothing of pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_sde.methods.fields import Field
from diffusers_sde.weights import Point

METHODS = ("mmps", "pigdm", "dps")
Operator = Callable[[torch.Tensor], torch.Tensor]


# -- operators: pixels (N, C, H, W) to measurements (N, ...) --


def inpainting(mask: torch.Tensor) -> Operator:
    """``x[mask]``, (N, number of known values); the boolean ``mask`` (H, W) or (C, H, W) is True where x is known.

    Raises ``ValueError`` for a mask that is not boolean, or True nowhere; applying it, for pixels it does not fit.
    """
    if mask.dtype != torch.bool or mask.ndim not in (2, 3) or not bool(mask.any()):
        raise ValueError("The mask must be boolean, (H, W) or (C, H, W), and True where pixels are known.")

    def known(x: torch.Tensor) -> torch.Tensor:
        if mask.shape not in (x.shape[-2:], x.shape[1:]):
            raise ValueError(
                f"The mask has shape {tuple(mask.shape)}, the pixels {tuple(x.shape[1:])}: they must agree."
            )
        return x[:, mask.expand(x.shape[1:]).to(x.device)]

    return known


def super_resolution(factor: int) -> Operator:
    """The mean of each ``factor`` x ``factor`` block of pixels; raises ``ValueError`` for sizes it does not divide."""
    if factor < 2:
        raise ValueError(f"factor must be at least 2, not {factor}.")

    def pooled(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} pixels are not divisible by {factor}: use another factor.")
        return F.avg_pool2d(x, factor)

    return pooled


def gaussian_blur(std: float) -> Operator:
    """Convolution with a Gaussian of standard deviation ``std`` pixels (cut at 3 std), mirrored at the border."""
    if not std > 0:
        raise ValueError(f"std must be positive, not {std}.")
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
    """``matrix`` (m, C H W) on flattened pixels: compressed sensing."""
    if matrix.ndim != 2:
        raise ValueError(f"The matrix must have shape (m, C H W), not {tuple(matrix.shape)}.")

    def product(x: torch.Tensor) -> torch.Tensor:
        if x[0].numel() != matrix.shape[1]:
            raise ValueError(f"The matrix has {matrix.shape[1]} columns for {x[0].numel()} values: they must agree.")
        return x.flatten(1) @ matrix.to(x).mT

    return product


def adjoint(operator: Operator, y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``A' y`` on pixels shaped like ``like`` (N, C, H, W), by automatic differentiation."""
    with torch.enable_grad():
        x = torch.zeros_like(like).requires_grad_()
        return torch.autograd.grad(operator(x), x, y)[0]


def check_observation(operator: Operator, y: torch.Tensor, noise_std: float, pixels: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``operator`` is linear on tensors like ``pixels``, differentiable, and its output has
    y's shape, y is finite and ``noise_std`` positive."""
    if not noise_std > 0:
        raise ValueError(f"noise_std must be positive, not {noise_std}: use a small one where there is no noise.")
    with torch.enable_grad():
        one, two = (torch.randn_like(pixels).requires_grad_() for _ in range(2))
        outputs = [operator(v) for v in (one, two, one - 2 * two)]
    if not isinstance(outputs[0], torch.Tensor) or outputs[0].shape != y.shape:
        shape = getattr(outputs[0], "shape", type(outputs[0]).__name__)
        raise ValueError(f"The operator makes {shape} of these pixels, the observation is {y.shape}: they must agree.")
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
    """What is known: ``y`` (N, ...) = ``operator(decode(x_0)) + noise_std n``; ``decode`` is None in pixel space."""

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(E[x_0 | x_t, y], gradient)`` by ``mmps`` or ``pigdm``, gradient zero; for ``dps`` ``(E[x_0 | x_t],
    grad_x ||y - A D||)``.  Both of x's shape and dtype.

    ``data_std`` is c, ``iterations`` those of conjugate gradients: each costs one backward pass (pigdm: none through
    the network).  Above the noise level ``sigma/alpha = max_noise`` the network's Jacobian is not asked,
    ``(sigma^2/alpha) dD/dx`` is ``r^2 I`` there: a network's error enters it times ``(sigma/alpha)^2`` (sigma/alpha for
    v prediction); on the embedded network it was not positive from about 25 on, on an epsilon network from about 12 on.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        state = x.detach().requires_grad_()
        mean = field(state, point)
        leaf = mean.detach().requires_grad_()
        seen = measurement(leaf)
        residual = (measurement.y - seen).detach()

        def transposed(v: torch.Tensor) -> torch.Tensor:  # A' v
            return torch.autograd.grad(seen, leaf, v, retain_graph=True)[0]

        def forward(u: torch.Tensor) -> torch.Tensor:  # A u: the derivative of v -> A' v, which is linear, along u
            if measurement.decode is None:
                return measurement.operator(u)
            v = torch.zeros_like(seen, requires_grad=True)
            (pulled,) = torch.autograd.grad(seen, leaf, v, create_graph=True)
            return torch.autograd.grad(pulled, v, u)[0]

        c2 = data_std**2
        r2 = c2 * point.sigma**2 / (c2 * point.alpha**2 + point.sigma**2)
        isotropic = point.sigma > max_noise * point.alpha

        def smooth(u: torch.Tensor) -> torch.Tensor:  # (sigma^2/alpha) (dD/dx)' u
            if isotropic:
                return r2 * u
            return torch.autograd.grad(mean, state, u, retain_graph=True)[0] * (point.sigma**2 / point.alpha)

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


def conjugate_gradients(
    system: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    iterations: int,
    *,
    floor: float = 0.0,
    tolerance: float = 1e-5,
) -> torch.Tensor:
    """Solve ``system(v) = right`` for each sample of a batch (N, ...); ``system`` is linear, symmetric and at least
    ``floor`` times the identity (Hestenes & Stiefel 1952).

    A sample stops at a residual of ``tolerance`` relative to ``right``, and where the curvature along its search
    direction is below half the floor: a network's Jacobian is only nearly symmetric and positive.
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
    """Raise ``ValueError`` for a method that does not exist or numbers that do not fit."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    if iterations < 1:
        raise ValueError(f"solver_iterations must be at least 1, not {iterations}.")
    for name, value in (("data_std", data_std), ("max_noise", max_noise), ("dps_scale", dps_scale)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}.")
