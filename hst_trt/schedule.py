"""Sigmas and timesteps of a request: diffusers' FlowMatchEulerDiscreteScheduler without torch.

Only the settings of SD3-family models are taken; a scheduler that injects fresh noise is refused, because keys, values and
scores cached at one step would not hold at the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import IncompatibleError, RequestError

__all__ = ["MAX_STEPS", "FlowMatchEuler", "StepTable"]

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

    timesteps: float32 [N], what the transformers are fed. sigmas: float32 [N+1], from 1 to 0. delta_sigmas: float32 [N],
    ``sigmas[t+1] - sigmas[t]``, negative.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray

    @property
    def delta_sigmas(self) -> np.ndarray:
        return self.sigmas[1:] - self.sigmas[:-1]


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

    def table(self, num_inference_steps: int) -> StepTable:
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
        return StepTable(sigmas * np.float32(self.num_train_timesteps), np.append(sigmas, np.float32(0.0)))

    def _shifted(self, sigmas: np.ndarray) -> np.ndarray:
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
