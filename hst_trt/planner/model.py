"""A model of the distance that a schedule ends up with, fitted to schedules that were measured.

Two things part a picture from the converged large model's: steps of finite length, and velocities that are not the large
model's. Taken as independent,

    distance^2 = steps(N, solver, shift)^2 + alone^2
    alone = sum over steps of |dsigma| g(sigma) f(step)  +  sum over held steps of |dsigma|^p h(sigma, ratio)

where ``steps`` is the measured distance of the large model alone, ``g`` says what the small model's velocity does to the
picture at that noise level, and ``f`` is 0 for a full large call, 1 for the small model alone, and less where a mask or the
correction helps; ``h`` is for tokens that keep their last velocity. The 22 numbers in ``p``, ``g``, ``f`` and ``h`` are fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import MissingError
from ..schedule import Solver
from .space import CORRECTIONS, SOLVERS, Point

__all__ = ["DistanceModel", "fitter"]

KNOTS = np.linspace(0, 1, 6)
"""Sigmas at which the logarithm of g is fitted; straight lines between them."""

_G = len(KNOTS)
_MASK = slice(_G, _G + 3)  # logarithm of f under a mask: a constant, and by ratio and its square
_MASKED = slice(_MASK.stop, _MASK.stop + len(CORRECTIONS) - 1)  # added by each correction but 0, under a mask
_SMALL = slice(_MASKED.stop, _MASKED.stop + len(CORRECTIONS) - 1)  # and where the small model is alone
_SOLVER = slice(_SMALL.stop, _SMALL.stop + len(SOLVERS) - 1)  # added to the logarithm of `alone` by each solver but the first
_OWN = slice(_SOLVER.stop, _SOLVER.stop + 5)  # logarithm of h: a constant, by sigma, by ratio and its square; and p
_START = np.concatenate([np.full(_G, -1.0), [-0.5, -2.0, 0.0], np.zeros(_SOLVER.stop - _MASK.stop), [1.0, 0.0, -3.0, 0.0, 2.0]])

_LOOSE = 0.05
"""How strongly parameters are held where nothing that was measured says what they are."""


class DistanceModel:
    """The fitted model.

    Args:
        measured: distances by point; the large model alone must be among them with every solver and shift that is ever asked
            for. Step counts between those that were measured are interpolated.
        sigmas: of a point, [N+1].
    """

    def __init__(self, measured: Mapping[Point, float], sigmas: Callable[[Point], np.ndarray]) -> None:
        least_squares = fitter()
        self._sigmas = sigmas
        self._alone: dict[tuple[Solver, float | None], list[tuple[float, float]]] = {}
        for point, distance in sorted(measured.items(), key=lambda item: item[0].steps):
            if point.large_only:
                self._alone.setdefault((point.solver, point.shift), []).append((np.log(point.steps), np.log(distance)))
        points = [point for point in measured if not point.large_only]
        table, wanted = self._table(points), np.log([measured[point] for point in points])

        def residuals(parameters: np.ndarray) -> np.ndarray:
            return np.concatenate([_log_distance(parameters, *table) - wanted, _LOOSE * (parameters - _START)])

        self._parameters = least_squares(residuals, _START, loss="soft_l1", f_scale=0.1).x
        self.error = float(np.sqrt(np.mean(np.square(_log_distance(self._parameters, *table) - wanted))))

    def __call__(self, points: Sequence[Point]) -> np.ndarray:
        """Logarithms of the expected distances, [points]."""
        return _log_distance(self._parameters, *self._table(points))

    def _large_only(self, point: Point) -> float:
        """The distance of the large model alone with a point's steps."""
        steps, distances = zip(*self._alone[point.solver, point.shift], strict=True)
        return float(np.exp(np.interp(np.log(point.steps), steps, distances)))

    def _table(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of points: |dsigma| by step and kind [points, 3, steps] (masked, small alone, held), sigma in the middle of
        each step, the distance of the large model alone [points], and ratio, correction and solver as numbers [points, 3]."""
        most = max(point.steps for point in points)
        ways, middles = np.zeros((len(points), 3, most)), np.zeros((len(points), most))
        for i, point in enumerate(points):
            sigmas, (large, hybrid, _) = self._sigmas(point), point.stages
            way, masked = -np.diff(sigmas), 2 if point.ras else 0
            middles[i, : point.steps] = (sigmas[1:] + sigmas[:-1]) / 2
            ways[i, masked, large : large + hybrid] = way[large : large + hybrid]
            ways[i, 1, large + hybrid : point.steps] = way[large + hybrid :]
            if point.refresh:
                ways[i, masked, large + point.refresh - 1 : large + hybrid : point.refresh] = 0
            if not large and hybrid:
                ways[i, masked, 0] = 0
        alone = np.array([self._large_only(point) for point in points])
        rest = [(point.ratio, CORRECTIONS.index(point.correction), SOLVERS.index(point.solver)) for point in points]
        return ways, middles, alone, np.array(rest, float)


def fitter() -> Callable[..., Any]:
    """SciPy's least squares; to be asked for before anything is measured.

    Raises:
        MissingError: SciPy is not installed.
    """
    try:
        from scipy.optimize import least_squares
    except ModuleNotFoundError as exc:
        raise MissingError(f"calibrating needs {exc.name}, which is not installed", fix='pip install "hst_trt[eval]"') from None
    found: Callable[..., Any] = least_squares
    return found


def _log_distance(
    parameters: np.ndarray, ways: np.ndarray, middles: np.ndarray, steps: np.ndarray, rest: np.ndarray
) -> np.ndarray:
    g = np.exp(np.interp(middles, KNOTS, parameters[:_G]))
    ratio, correction, solver = rest[:, 0], rest[:, 1].astype(int), rest[:, 2].astype(int)
    base, by_ratio, by_square = parameters[_MASK]
    masked = base + by_ratio * ratio + by_square * ratio**2 + np.append(0, parameters[_MASKED])[correction]
    small = np.append(0, parameters[_SMALL])[correction]
    weights = np.exp(np.stack([masked, small], 1))
    alone = (weights * (ways[:, :2] * g[:, None]).sum(2)).sum(1) * np.exp(np.append(0, parameters[_SOLVER])[solver])
    base, by_sigma, by_ratio, by_square, power = parameters[_OWN]
    own = np.exp(base + by_sigma * middles + (by_ratio * ratio + by_square * ratio**2)[:, None])
    alone += (own * np.power(ways[:, 2], power, where=ways[:, 2] > 0, out=np.zeros_like(middles))).sum(1)
    logarithm: np.ndarray = 0.5 * np.log(steps**2 + alone**2)
    return logarithm
