"""Brownian noise that does not depend on the number of steps, the batch size or the device.

Knows a Brownian path on the log-SNR axis, drawn by dyadic bisection (Levy's construction) of fixed cells, and a
counter-based normal generator.  The increment of each step is a linear combination of standard normals attached to
tree nodes; its coefficients are host floats known before sampling, so a path has no state: any step can be started
from, and nothing is stored between steps.  Knows no network or scheduler.

Refining the grid refines the same path: of grids with one tau and steps of ``ALONE`` (1/4) of log-SNR or more, the
increments are the sums of those of their refinements.  A path that is known everywhere has infinitely many normals, so
that shorter steps keep it less closely: an increment and the sum of its halves correlate at 0.8 or more, 0.92 on
average, at any length.

The noise of a step of constant tau from s to t is ``r_t^(1+tau^2) (W(C_t) - W(C_s))`` with ``C = r^(-2 tau^2)``,
``r^2 = data_std^2 + (sigma/alpha)^2``: a Brownian motion in the clock C.  Where tau changes from step to step the
clocks are joined with continuous slope.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

# The tree spans this interval of half log-SNR; beyond it exp(-2 * 16) is below float32 rounding.
LOG_SNR_SPAN = 16.0
# Its cells have independent increments and are bisected: long ones where no grid has more than an end.
_EDGES = np.array([-LOG_SNR_SPAN, *np.arange(-8.0, 8.25, 0.25), LOG_SNR_SPAN])
CELLS = len(_EDGES) - 1
ALONE = 1 / 4  # a node is bridged in an interval no longer than this, in which it is the only one
_NARROWEST = 1e-12  # interval; nearer nodes are one


def brownian_weights(
    log_snr: Sequence[float] | np.ndarray, *, tau: float | Sequence[float] = 1.0, data_std: float = 0.0
) -> list[tuple[tuple[int, float], ...]]:
    """For each step of the grid, ``((node, weight), ...)`` with ``z = sum weight xi_node`` its unit-variance noise.

    Args:
        log_snr: the n + 1 half log-SNRs of a grid, non-decreasing; infinite ends allowed.
        tau: the noise level, or one per step.
        data_std: the data scale of the table.

    Returns:
        One tuple of pairs a step, empty where a step has no length.  ``xi_node`` are independent standard normals:
        nodes below CELLS are the increments of the cells, CELLS + j bisects cell j, k has the halves 2k and 2k + 1.
        Squared weights of a step sum to 1 and those of different steps are orthogonal: in law exactly a Brownian motion
        at the grid nodes.
    """
    lam = np.clip(np.asarray(log_snr, np.float64), -LOG_SNR_SPAN, LOG_SNR_SPAN)
    steps = len(lam) - 1
    taus = np.broadcast_to(np.asarray(tau, np.float64), steps) if np.ndim(tau) == 0 else np.asarray(tau, float)[:steps]
    clock = _joined_clock(lam, taus, data_std)
    values = _bisect(lam, clock)
    out = []
    for i in range(steps):
        weights = {k: values[i + 1].get(k, 0.0) - values[i].get(k, 0.0) for k in {**values[i], **values[i + 1]}}
        norm = math.sqrt(sum(w * w for w in weights.values()))
        out.append(tuple((k, w / norm) for k, w in sorted(weights.items()) if w) if norm > 0 else ())
    return out


def _joined_clock(lam: np.ndarray, taus: np.ndarray, data_std: float) -> Callable[[np.ndarray], np.ndarray]:
    """``K(lambda)``: on each step an affine image of ``C = r^(-2 tau^2)``, continuous with continuous slope."""

    def log_r(x: np.ndarray) -> np.ndarray:
        return 0.5 * np.logaddexp(2 * math.log(data_std), -2 * x) if 0 < data_std < math.inf else -x

    def local(x: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
        """C and dC/dlambda up to a factor; tau = 0 draws no noise and gets the plain clock lambda."""
        if math.isinf(data_std):  # variance tau^2 (s_s^2 - s_t^2): the clock is -s^2
            return -np.exp(-2 * x), 2 * np.exp(-2 * x)
        if tau == 0:
            return x, np.ones_like(x)
        c = np.exp(-2 * tau**2 * log_r(x))
        return c, 2 * tau**2 * c * np.exp(-2 * x - 2 * log_r(x))

    pieces = []  # (slope factor, offset) of each step's clock
    factor, offset = 1.0, 0.0
    for i, tau in enumerate(taus):
        if i and tau != taus[i - 1]:
            c_old, d_old = (float(v) for v in local(lam[i], taus[i - 1]))
            c_new, d_new = (float(v) for v in local(lam[i], tau))
            value = factor * c_old + offset
            factor = factor * d_old / d_new if d_new > 0 else factor
            offset = value - factor * c_new
        pieces.append((factor, offset))

    def clock(x: np.ndarray) -> np.ndarray:
        step = np.clip(np.searchsorted(lam, x, side="right") - 1, 0, len(taus) - 1)
        out = np.empty_like(x)
        for i in np.unique(step):
            chosen = step == i
            out[chosen] = pieces[i][0] * local(x[chosen], taus[i])[0] + pieces[i][1]
        return out

    return clock


def _widths(lam: np.ndarray) -> np.ndarray:
    """How narrow an interval of the tree must be for each node of a grid to be bridged in it: ``ALONE``, or less where
    its neighbours are nearer, so that it is alone there."""
    gaps = np.diff(lam, prepend=-math.inf, append=math.inf)
    gaps[gaps == 0] = math.inf  # of a step of no length, which has one place at both of its ends
    return np.clip(np.minimum(gaps[:-1], gaps[1:]), _NARROWEST, ALONE)


def _bisect(lam: np.ndarray, clock: Callable[[np.ndarray], np.ndarray]) -> list[dict[int, float]]:
    """The Brownian value at each grid node as ``{normal: coefficient}``, up to a constant common to all."""
    at_edges = clock(_EDGES)
    steps = np.sqrt(np.maximum(np.diff(at_edges), 0.0))
    cells = np.clip(np.searchsorted(_EDGES, lam, side="right") - 1, 0, CELLS - 1).tolist()
    ways = [_way(*node) for node in zip(lam.tolist(), cells, _widths(lam).tolist(), strict=True)]
    places = np.array(sorted({place for way in ways for _, place in way}))
    clocks = dict(zip(places.tolist(), clock(places).tolist(), strict=True))
    known: dict[int, tuple[float, dict[int, float]]] = {}  # clock and value where a node of the tree is bridged
    out = []
    for at, j, way in zip(lam.tolist(), cells, ways, strict=True):
        value = {k: float(steps[k]) for k in range(cells[0], j)}
        left = float(at_edges[j]), value
        right = float(at_edges[j + 1]), {**value, j: float(steps[j])}
        if at == _EDGES[j + 1]:
            value = right[1]
        for k, place in way:
            if k not in known:
                known[k] = _bridged(k, clocks[place], left, right)
            value = known[k][1]
            left, right = (left, known[k]) if at < place else (known[k], right)
        out.append(value)
    return out


def _way(at: float, cell: int, width: float) -> list[tuple[int, float]]:
    """The nodes of the tree from a cell down to ``at``, and where each is bridged: in the middle of its interval, and
    the last one, whose interval is no longer than ``width``, at ``at`` itself."""
    low, high, k = float(_EDGES[cell]), float(_EDGES[cell + 1]), CELLS + cell
    way = []
    while low < at < high:
        place = at if high - low <= width else 0.5 * (low + high)
        way.append((k, place))
        if at == place:
            break
        low, high, k = (low, place, 2 * k) if at < place else (place, high, 2 * k + 1)
    return way


def _bridged(
    k: int, c: float, left: tuple[float, dict[int, float]], right: tuple[float, dict[int, float]]
) -> tuple[float, dict[int, float]]:
    """Clock and value of a Brownian bridge at clock c between two values, with the normal k."""
    u = (c - left[0]) / (right[0] - left[0]) if right[0] > left[0] else 0.5
    # as a difference, so that what both ends share is shared to the last bit and leaves the increments
    value = {n: (a := left[1].get(n, 0.0)) + u * (right[1].get(n, 0.0) - a) for n in {**left[1], **right[1]}}
    value[k] = math.sqrt(max((c - left[0]) * (1 - u), 0.0))
    return c, value


# -- counter-based normals --


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Avalanche of int64: splitmix64's finaliser (Steele et al. 2014) with arithmetic instead of logical shifts."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift)).mul_(factor)
    return x.bitwise_xor_(x >> 31)


_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as int64


def seeds_from_latents(sample: torch.Tensor) -> torch.Tensor:
    """One seed per sample, a hash of its values: same latents, same seed; no synchronisation.

    Args:
        sample: (batch, ...), any floating dtype.

    Returns:
        (batch,) int64, on sample's device.
    """
    bits = sample.detach().float().contiguous().view(torch.int32).reshape(len(sample), -1).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    return _mix(_mix(bits + place * _GOLDEN).sum(1))


def seeds_from_generator(generator, batch: int, device: torch.device) -> torch.Tensor:
    """One seed per sample from the caller's generators.

    Args:
        generator: a ``torch.Generator``, or a list with one for each sample.
        batch: number of samples.
        device: of the seeds.

    Returns:
        (batch,) int64.

    Raises:
        ValueError: for another number of generators.
    """
    generators = generator if isinstance(generator, list | tuple) else [generator]
    if len(generators) not in (1, batch):
        raise ValueError(f"{len(generators)} generators for a batch of {batch}: pass one, or one for each sample.")
    each = batch if len(generators) == 1 else 1
    seeds = [torch.randint(-(2**62), 2**62, (each,), generator=g, device=g.device) for g in generators]
    return _mix(torch.cat([s.to(device) for s in seeds]))


def seeds_from_int(seed: int, batch: int, device: torch.device) -> torch.Tensor:
    """Seeds ``hash(seed, k)`` for the samples k of a batch.

    Args:
        seed: any int64.
        batch: number of samples.
        device: of the seeds.

    Returns:
        (batch,) int64.
    """
    return _mix(_mix(torch.full((batch,), seed, dtype=torch.int64, device=device)) + torch.arange(batch, device=device))


def normals(seeds: torch.Tensor, node: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Standard normals: element e of sample k is a function of ``(seeds[k], node, e)`` and of the size of a sample.

    Args:
        seeds: (batch,) int64.
        node: of the tree.
        shape: (batch, ...).

    Returns:
        Float32 of ``shape``, on the seeds' device.
    """
    return combine([(node, 1.0)], seeds, shape)


def combine(
    weights: Sequence[tuple[int, float]], seeds: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """``z = sum weight xi_node``: the unit-variance noise of one step, float32.

    The ``xi`` of a node are hashed bytes under an orthogonal transform Q of 256 elements that lie apart.  Q is the same
    for all nodes, hence ``z = Q sum weight bytes``: a normal costs a quarter of a hash and no logarithm.  As a sum of
    256 uniforms its kurtosis is 3 - 1.2/256, and that of squares of different elements correlates as little.  All sums
    are of integers below 2^24, exact in float32: the same bits in any batch and on any device.

    Args:
        weights: pairs ``(node, weight)``, see :func:`brownian_weights`; they are rounded to 2^-14.
        seeds: (batch,) int64.
        shape: (batch, ...).

    Returns:
        Float32 of ``shape``, on the seeds' device.
    """
    count, device = math.prod(shape[1:]), seeds.device
    tiles = max(-(-count // TILE), 1)
    size = TILE if tiles > 1 else -(-count // MIXED) * MIXED
    if tiles > 1:
        seeds = _mix(seeds[:, None] + torch.arange(tiles, device=device) * _GOLDEN).flatten()
    row, places, rotations = _row(tuple(weights), size, device), _places(size // 4, device), _rotations(device)
    bytes_at_once = 1 << 19 if device.type == "cpu" else 1 << 25  # what the caches hold; what fills an accelerator
    tiles_at_once = max(bytes_at_once // (size * len(weights) or 1), 1)
    out = torch.empty((len(seeds), size), device=device)
    for part, target in zip(seeds.split(tiles_at_once), out.split(tiles_at_once), strict=True):
        _tile_noise_on(device.type)(target, part, *row, places, *rotations)
    return out.view(shape[0], tiles * size)[:, :count].reshape(shape)


TILE = 1 << 14  # elements; larger samples are cut into tiles
MIXED = 256  # elements of a tile that are transformed together
_BYTE_STD = math.sqrt((256**2 - 1) / 12)

Allocate = Callable[[Sequence[int], torch.dtype, torch.device], torch.Tensor]


class _Kept(threading.local):
    """Memory of a thread that each call uses again: fresh pages cost more than what is done to them."""

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        count = math.prod(shape)
        if dtype not in self.kept or len(self.kept[dtype]) < count:
            with torch.inference_mode(False):
                self.kept[dtype] = torch.empty(count, dtype=dtype, device=device)
        return self.kept[dtype][:count].view(shape)


def _new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _tile_noise(
    allocate: Allocate,
    out: torch.Tensor,
    seeds: torch.Tensor,
    factor: torch.Tensor,
    summand: torch.Tensor,
    whole: torch.Tensor,
    spread: torch.Tensor,
    lift: torch.Tensor,
    places: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
) -> None:
    """Write into ``out`` (tiles, 4 * words) the noise of the tiles with these seeds (tiles,) int64: see :func:`_row`,
    :func:`_places` (words,) and :func:`_rotations`."""
    tiles, nodes, size, device = len(seeds), len(whole), 4 * len(places), seeds.device
    keys = torch.addcmul(summand, factor, seeds[:, None])[:, :, None].view(torch.int32)
    times, plus = keys.split(1, 2)
    words, spare = allocate((2, tiles, nodes, len(places)), torch.int32, device).unbind()
    torch.mul(places, times, out=words).add_(plus)
    words.bitwise_xor_(torch.bitwise_right_shift(words, 15, out=spare)).mul_(0x2C1B3C6D)
    memory = allocate((nodes + 1, tiles, size), torch.float32, device)
    sums, half = memory[nodes], memory[0].view(tiles, 16, -1)
    uniforms = memory[:nodes].view(tiles, nodes, size).copy_(words.view(torch.int8))
    weights = torch.addcmul(whole, spread, times[:, :, 0]).round_()
    torch.bmm(weights[:, None], uniforms, out=sums[:, None])
    torch.add(lift, sums, alpha=2.0**-7, out=sums).round_()  # of standard deviation 2^13
    torch.bmm(first.expand(tiles, 16, 16), sums.view(tiles, 16, -1), out=half)
    rows = 16 * tiles
    torch.bmm(second.expand(rows, 16, 16), half.view(rows, 16, -1), out=out.view(rows, 16, -1))


@functools.cache
def _tile_noise_on(device_type: str) -> Callable[..., None]:
    """:func:`_tile_noise` on such a device: compiled on a GPU with a compiler; on a processor that takes a minute."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return functools.partial(_tile_noise, _Kept() if device_type == "cpu" else _new)
    plain = functools.partial(_tile_noise, _new)
    chosen = torch.compile(plain, dynamic=True)

    def guarded(*arguments: torch.Tensor) -> None:
        nonlocal chosen
        try:
            chosen(*arguments)
        except Exception:  # compilers fail in many ways: there is none for the host, the GPU is unknown to it, ...
            chosen = plain
            plain(*arguments)

    return guarded


@functools.lru_cache(maxsize=1024)
def _row(weights: tuple[tuple[int, float], ...], size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A row's K nodes on the device: factor (even) and summand (odd) of their keys, (K,) int64; the weights as integers
    (K,), with which the sum of the bytes has standard deviation 2^20, and how far a random factor spreads them; half
    the sum of all weights, since the mean byte is -1/2, times 2^-7 ().

    Squares of uniforms vary by 0.8 and not by 2: what the norm of a tile lacks of that, the factor gives it.
    """
    factor, summand = _mix(torch.tensor([[2 * node, 2 * node + 1] for node, _ in weights]) * _GOLDEN).unbind(1)
    whole = torch.tensor([w for _, w in weights], dtype=torch.float64).mul_(2**20 / _BYTE_STD).round_().float()
    spread, lift = whole * (2.0**-31 * math.sqrt(0.9 / max(size, 1))), whole.sum() * 2.0**-8
    return tuple(x.to(device, non_blocking=True) for x in ((factor | 1) * 2, summand | 1, whole, spread, lift))


@functools.lru_cache(maxsize=64)
def _places(words: int, device: torch.device) -> torch.Tensor:
    """A number for each word of a tile, all different and without pattern: (words,) int32."""
    return _mix(torch.arange(1, words + 1, device=device) * _GOLDEN).to(torch.int32)


@functools.cache
def _rotations(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (16, 16) of 2^-17 Q: Hadamard matrices with the signs of a bent function, by which what is constant
    over a tile is the sum of all its bytes."""
    k = np.arange(16)
    bent = 1 - 2 * (((k & k >> 1) ^ (k >> 2 & k >> 3)) & 1)
    hadamard = np.array([[1]])
    for _ in range(4):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rotation = torch.from_numpy(bent[:, None] * hadamard).float().to(device)
    return rotation, rotation * 2.0**-17
