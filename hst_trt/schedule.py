"""Sigmas, timesteps and solver steps of a request: diffusers' FlowMatchEulerDiscreteScheduler without torch, and what goes
further with few steps: another spacing, another shift, solvers of second order.

Only the settings of SD3-family models are taken; a scheduler that injects fresh noise is refused, because keys, values and
scores cached at one step would not hold at the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np

from .errors import IncompatibleError, RequestError
from .spec import MAX_COUNT

__all__ = ["AS_DIFFUSERS", "MAX_STEPS", "SOLVERS", "FlowMatchEuler", "Sampling", "Solver", "StepTable", "TimestepSpacing"]

Solver = Literal["euler", "ab2", "dpmpp-2m"]
TimestepSpacing = Literal["linspace", "trailing"]

MAX_STEPS = 1000
"""The length of a request's step table on the device, and so the most steps: as many as SD3 models were trained with."""

MAX_SHIFT = 100.0

_REFUSED = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
    "invert_sigmas",
    "shift_terminal",
)


@dataclass(frozen=True)
class Sampling:
    """How the way from noise to picture is cut into steps, and how a step is taken.

    Attributes:
        solver: how velocities become the next latents; see `SOLVERS`.
        timestep_spacing: "linspace" as diffusers runs SD3: evenly, down to the first training timestep, and from there to 0,
            so that the last call of any run moves next to nothing. "trailing": evenly down to 0 (Lin et al., Common
            Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891).
        shift: of sigmas, s -> shift s / (1 + (shift - 1) s); None for the pair's own. More puts more steps where
            noise is high.

    Raises:
        RequestError: an unknown solver or spacing, or a shift that is not positive.
    """

    solver: Solver = "euler"
    timestep_spacing: TimestepSpacing = "linspace"
    shift: float | None = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("solver", self.solver, get_args(Solver)),
            ("timestep spacing", self.timestep_spacing, get_args(TimestepSpacing)),
        ):
            if value not in known:
                raise RequestError(f"unknown {what} {value!r}", fix=f"choose one of {', '.join(known)}")
        if self.shift is not None and not (_is_number(self.shift) and 0 < self.shift <= MAX_SHIFT):
            raise RequestError(f"shift {self.shift!r} is outside (0, {MAX_SHIFT:g}]", fix="3 is SD3's; 2 to 6 are usual")


AS_DIFFUSERS = Sampling()
"""How diffusers' pipelines sample SD3."""


@dataclass(frozen=True)
class StepTable:
    """What the loop needs of every step.

    timesteps: float32 [N], what the transformers are fed. sigmas: float32 [N+1], from 1 to 0. coefficients: float32 [N, 5],
    a to e of the solver's steps, see `SOLVERS`.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    coefficients: np.ndarray


@dataclass(frozen=True)
class FlowMatchEuler:
    """The scheduler's two numbers: sigma shift and number of training timesteps."""

    shift: float = 1.0
    num_train_timesteps: int = 1000

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowMatchEuler:
        """Reads a ``scheduler_config.json``.

        Raises:
            IncompatibleError: another scheduler, or a setting that SD3 pipelines do not use.
            ValueError: it is no such config.
        """
        if not isinstance(config, Mapping):
            raise ValueError("the scheduler's config is not an object")
        name = config.get("_class_name")
        refused = [key for key in _REFUSED if config.get(key)]
        if name != "FlowMatchEulerDiscreteScheduler" or refused:
            raise IncompatibleError(
                "the scheduler is not one HybridStitch can run on: it needs deterministic Euler steps of a rectified flow",
                found=f"{name}" + (f" with {', '.join(refused)}" if refused else ""),
                fix="use FlowMatchEulerDiscreteScheduler with plain `shift`; SDE and ancestral samplers would make the "
                "cached keys and values invalid",
            )
        shift, steps = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
        if not (_is_number(shift) and 0 < shift <= MAX_SHIFT):
            raise ValueError(f"shift is {shift!r}, not a number above 0 and up to {MAX_SHIFT:g}")
        if not (isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= MAX_COUNT):
            raise ValueError(f"num_train_timesteps is {steps!r}, not a whole number from 1 to {MAX_COUNT}")
        return cls(float(shift), steps)

    def table(self, num_inference_steps: int, sampling: Sampling = AS_DIFFUSERS) -> StepTable:
        """The steps of a request.

        Raises:
            RequestError: not between 1 and `num_train_timesteps` steps.
        """
        most = min(self.num_train_timesteps, MAX_STEPS)
        if not 1 <= num_inference_steps <= most:
            raise RequestError(
                f"num_inference_steps {num_inference_steps} is outside 1 .. {most}",
                fix="20 to 50 steps are usual",
            )
        shift = self.shift if sampling.shift is None else float(sampling.shift)
        if sampling.timestep_spacing == "trailing":
            ramp = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        else:  # diffusers shifts the training sigmas once to find the ends, and the linear ramp between them once more.
            ends = _shifted(np.array([self.num_train_timesteps, 1], np.float32) / np.float32(self.num_train_timesteps), shift)
            start, stop = (float(end) * self.num_train_timesteps for end in ends)
            ramp = np.linspace(start, stop, num_inference_steps) / self.num_train_timesteps
        sigmas = _shifted(ramp, shift).astype(np.float32)
        ends_at_zero = np.append(sigmas, np.float32(0.0))
        coefficients = SOLVERS[sampling.solver](ends_at_zero.astype(np.float64), shift).astype(np.float32)
        return StepTable(sigmas * np.float32(self.num_train_timesteps), ends_at_zero, coefficients)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shifted(times: np.ndarray, shift: float) -> np.ndarray:
    """Sigmas from the times they were shifted from."""
    return shift * times / (1 + (shift - 1) * times)


def _unshifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return sigmas / (shift - (shift - 1) * sigmas)


# -- solvers ---------------------------------------------------------------------------------------------------------
def _euler(sigmas: np.ndarray, shift: float = 1.0) -> np.ndarray:
    """x' = x + dsigma v."""
    table = np.zeros((len(sigmas) - 1, 5))
    table[:, 0], table[:, 1] = 1, np.diff(sigmas)
    return table


def _adams_bashforth(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Two steps, of unequal length (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.5): the velocity
    goes on as the straight line through the last two, and x' = x + its integral over sigma.

    The line is straight in the time that sigmas were shifted from, which steps divide evenly: at the end, where steps are long
    in sigma, it is then trusted less. Without a shift this is the textbook's x' = x + dsigma ((1 + w) v - w v_last) with
    w = dsigma / (2 dsigma_last).
    """
    table = _euler(sigmas)
    times = _unshifted(sigmas, shift)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    for t in range(1, len(table)):
        half = (sigmas[t + 1] - sigmas[t]) / 2
        inside = _unshifted(sigmas[t] + half * (1 + nodes), shift)
        extra = half * (weights * (inside - times[t])).sum() / (times[t] - times[t - 1])
        table[t, 1:3] = 2 * half + extra, -extra
    table[:, 4] = 1  # h = v
    return table


def _dpm_solver(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """DPM-Solver++(2M) of Lu et al. (arXiv 2211.01095) for alpha = 1 - sigma. It extrapolates the predicted picture
    D = x - sigma v in lambda = log(alpha / sigma). The first step and the last, where lambda is not finite, are Euler's."""
    table = _euler(sigmas)
    for t in range(2, len(table) - 1):  # the step after the first is Euler's too: lambda came from minus infinity
        last, now, then = (np.log((1 - sigma) / sigma) for sigma in sigmas[t - 1 : t + 2])
        extra = (then - now) / (2 * (now - last))
        gain = (1 - sigmas[t + 1]) * -np.expm1(now - then)
        table[t, :3] = sigmas[t + 1] / sigmas[t] + gain * (1 + extra), -sigmas[t] * gain * (1 + extra), -gain * extra
    table[:, 3], table[:, 4] = 1, -sigmas[:-1]  # h = D
    return table


SOLVERS: Mapping[Solver, Callable[[np.ndarray, float], np.ndarray]] = {
    "euler": _euler,
    "ab2": _adams_bashforth,
    "dpmpp-2m": _dpm_solver,
}
"""Linear solvers of one velocity a step. From sigmas [N+1] and their shift to rows (a, b, c, d, e): from latents x, velocity v
and memory h, which is 0 at first, the next latents are ``a x + b v + c h`` and the next memory is ``d x + e v``."""
