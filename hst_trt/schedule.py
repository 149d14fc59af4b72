"""Sigmas, timesteps and solver steps of a request: diffusers' FlowMatchEulerDiscreteScheduler without torch, and more solvers.

Only the settings of SD3-family models are taken; a scheduler that injects fresh noise is refused, because keys, values and
scores cached at one step would not hold at the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .errors import IncompatibleError, RequestError

__all__ = ["MAX_STEPS", "SOLVERS", "FlowMatchEuler", "Solver", "StepTable"]

Solver = Literal["euler", "ab2", "dpmpp-2m"]

MAX_STEPS = 1000
"""The length of a request's step table on the device, and so the most steps: as many as SD3 models were trained with."""

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
        """
        name = config.get("_class_name")
        refused = [key for key in _REFUSED if config.get(key)]
        if name != "FlowMatchEulerDiscreteScheduler" or refused:
            raise IncompatibleError(
                "the scheduler is not one HybridStitch can run on: it needs deterministic Euler steps of a rectified flow",
                found=f"{name}" + (f" with {', '.join(refused)}" if refused else ""),
                fix="use FlowMatchEulerDiscreteScheduler with plain `shift`; SDE and ancestral samplers would make the "
                "cached keys and values invalid",
            )
        return cls(float(config.get("shift", 1.0)), int(config.get("num_train_timesteps", 1000)))

    def table(self, num_inference_steps: int, solver: Solver = "euler") -> StepTable:
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
        # diffusers shifts the training sigmas once to find the ends, and the linear ramp between them once more.
        ends = self._shifted(np.array([self.num_train_timesteps, 1], np.float32) / np.float32(self.num_train_timesteps))
        start, stop = (float(end) * self.num_train_timesteps for end in ends)
        ramp = np.linspace(start, stop, num_inference_steps)
        sigmas = self._shifted(ramp / self.num_train_timesteps).astype(np.float32)
        ends_at_zero = np.append(sigmas, np.float32(0.0))
        coefficients = SOLVERS[solver](ends_at_zero.astype(np.float64)).astype(np.float32)
        return StepTable(sigmas * np.float32(self.num_train_timesteps), ends_at_zero, coefficients)

    def _shifted(self, sigmas: np.ndarray) -> np.ndarray:
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)


# -- solvers ---------------------------------------------------------------------------------------------------------
def _euler(sigmas: np.ndarray) -> np.ndarray:
    """x' = x + dsigma v."""
    table = np.zeros((len(sigmas) - 1, 5))
    table[:, 0], table[:, 1] = 1, np.diff(sigmas)
    return table


def _adams_bashforth(sigmas: np.ndarray) -> np.ndarray:
    """Two steps, of unequal length: x' = x + dsigma ((1 + w) v - w v_last) with w = dsigma / (2 dsigma_last). Hairer, Norsett
    and Wanner, Solving Ordinary Differential Equations I, III.5."""
    table = _euler(sigmas)
    steps = np.diff(sigmas)
    share = steps[1:] / (2 * steps[:-1])
    table[1:, 1], table[1:, 2] = steps[1:] * (1 + share), -steps[1:] * share
    table[:, 4] = 1  # h = v
    return table


def _dpm_solver(sigmas: np.ndarray) -> np.ndarray:
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


SOLVERS: Mapping[Solver, Callable[[np.ndarray], np.ndarray]] = {
    "euler": _euler,
    "ab2": _adams_bashforth,
    "dpmpp-2m": _dpm_solver,
}
"""Linear solvers of one velocity a step. From sigmas [N+1] to rows (a, b, c, d, e): from latents x, velocity v and memory h,
which is 0 at first, the next latents are ``a x + b v + c h`` and the next memory is ``d x + e v``."""
