"""All buffers and prepared calls of one request shape, and the verbs that the denoising loop is written in.

A workspace is made once for (images, guided or not, h x w tokens) and serves any number of requests of that shape: seeds,
prompts, step counts, schedules and mask sizes only change what is written into its buffers and which calls are executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .buffers import Binding, NamedBuffers, verb
from .plan import MaskRule
from .runtime.engine import Backend, TensorInfo
from .schedule import MAX_STEPS, StepTable
from .spec import PairSpec, TransformerSpec
from .tensor_names import LARGE, SMALL, cache_names, past_to_present

__all__ = ["RequestShape", "Workspace"]


@dataclass(frozen=True)
class RequestShape:
    """What decides the size of every buffer."""

    images: int
    guided: bool
    h: int  # token rows
    w: int  # token columns

    @property
    def rows(self) -> int:
        """Transformer rows: with guidance every image has a negative and a positive one, negatives first."""
        return self.images * (2 if self.guided else 1)

    @property
    def tokens(self) -> int:
        return self.h * self.w


class Workspace(NamedBuffers):
    """Owns the loop's state. Not for use by two threads at once.

    State is in token order except the large model's cache, whose slots have the order of the buffer ``order``; see
    `hst_trt.models.glue` for the formula behind each verb.

    Args:
        backend: makes the buffers and runs the engines.
        spec: the pair.
        shape: the request shape.
        record: see `hst_trt.buffers.NamedBuffers`.
    """

    def __init__(self, backend: Backend, spec: PairSpec, shape: RequestShape, *, record: bool = True) -> None:
        self.spec, self.shape = spec, shape
        b, n, c, r = shape.images, shape.tokens, spec.large.token_channels, shape.rows
        text, grid = spec.text_length, (b, shape.h, shape.w)
        layout: dict[str, tuple[tuple[int, ...], str]] = {
            "latents": ((b, n, c), "float32"),
            "next_latents": ((b, n, c), "float32"),
            "history": ((b, n, c), "float32"),  # what the solver remembers of the step before
            "next_history": ((b, n, c), "float32"),
            "held": ((b, n), "float32"),  # steps since a token's velocity was new
            "next_held": ((b, n), "float32"),
            "velocity": ((b, n, c), "float32"),
            "last_velocity": ((b, n, c), "float32"),
            "sketch": ((b, n, c), "float32"),  # v_S, or the last velocity where there is no small model
            "last_sketch": ((b, n, c), "float32"),
            "refined": ((b, n, c), "float32"),  # v_L of the active tokens
            "difference": ((b, n, c), "float32"),  # D, the last known v_L - v_S
            "next_difference": ((b, n, c), "float32"),
            "all_tokens": ((r, n, c), "float32"),
            "hidden_tokens": ((r, n, c), "float32"),
            "pos_ids": ((r, n), "int64"),
            "large_pos_ids": ((r, n), "int64"),
            "small_pos_ids": ((r, n), "int64"),
            "row_velocity": ((r, n, c), "float32"),
            "timesteps": ((MAX_STEPS,), "float32"),
            "coefficients": ((MAX_STEPS, 5), "float32"),
            "weights": ((5,), "float32"),
            "step": ((1,), "int64"),
            "next_step": ((1,), "int64"),
            "timestep": ((r,), "float32"),
            "encoder_hidden_states": ((r, text, spec.large.text_width), "float32"),
            "pooled_projections": ((r, spec.large.pooled_width), "float32"),
            "row_index": ((r,), "int64"),
            "identity": ((b, n), "int64"),
            "order": ((b, n), "int64"),
            "next_order": ((b, n), "int64"),
            "partner": ((b, n), "int64"),
            "active": ((b, n), "int64"),
            "slots": ((n,), "int64"),
            "scores": (grid, "float32"),
            "next_scores": (grid, "float32"),
            "age": (grid, "float32"),
            "next_age": (grid, "float32"),
            "priority": (grid, "float32"),
            "ranks": ((b, n), "int64"),
            "counts": ((b,), "int64"),
            "change": ((1,), "float32"),
            "finite": ((1,), "int32"),
            "large_pos_table": ((n,), "int64"),
            **{name: ((1,), "float32") for name in _NUMBERS},
        }
        super().__init__(backend, layout, record=record)
        self._caches: list[str] = []
        self._write("row_index", np.arange(r, dtype=np.int64) % b)
        self._write("identity", np.broadcast_to(np.arange(n, dtype=np.int64), (b, n)))
        self._write("slots", np.arange(n, dtype=np.int64))
        self._write("large_pos_table", spec.large.position_ids(shape.h, shape.w))
        self._write("large_pos_ids", spec.large.position_ids(shape.h, shape.w))
        self._write("small_pos_ids", spec.small.position_ids(shape.h, shape.w))
        self._buffers["all_tokens_by_image"] = backend.view(self._buffers["all_tokens"], (r // b, b, n, c))

    # -- a request ---------------------------------------------------------------------------------------------------
    def begin(
        self,
        latents: np.ndarray,
        text: Mapping[str, np.ndarray],
        table: StepTable,
        guidance_scale: float,
        mask: MaskRule | None,
        correction: float,
    ) -> None:
        """Writes a request into the buffers.

        Args:
            latents: start noise as tokens [images, N, C].
            text: encoder_hidden_states [rows, T, J] and pooled_projections [rows, P].
            table: the steps.
            guidance_scale: w.
            mask: the mask rule, None if no step is masked.
            correction: factor a step on D; 0 for none.
        """
        self.table = table
        self._start_anew()
        self._write("latents", latents)
        unused = MAX_STEPS - len(table.timesteps)
        self._write("timesteps", np.pad(table.timesteps, (0, unused)))
        self._write("coefficients", np.pad(table.coefficients, ((0, unused), (0, 0))))
        self._write("step", np.int64(0))
        for name, values in text.items():
            self._write(name, values)
        for name in ("history", "held", "difference", "scores", "age", "last_velocity", "last_sketch"):
            self._write(name, np.float32(0.0))
        mask = mask or MaskRule()
        self._write("guidance_scale", np.float32(guidance_scale))
        self._write("correction", np.float32(correction))
        self._write("score_decay", np.float32(mask.decay))
        self._write("drift", np.float32(mask.drift))
        self._write("starvation", np.float32(mask.starvation))
        self._write("threshold", np.float32(mask.threshold or 0.0))

    # -- the verbs of the loop ---------------------------------------------------------------------------------------
    @verb
    def advance(self) -> None:
        """Timestep and solver weights become those of the table's next step, after `begin` those of its first."""
        self._call(
            "advance",
            timesteps="timesteps",
            coefficients="coefficients",
            step="step",
            row_index="row_index",
            timestep="timestep",
            weights="weights",
            next_step="next_step",
        )
        self._copy("next_step", "step")

    @verb
    def small(self) -> None:
        """sketch = v_S(x), all tokens."""
        self._velocity(SMALL, self.spec.small, self.shape.tokens, "sketch")

    @verb
    def small_alone(self) -> None:
        """velocity = v_S(x), all tokens, where nothing is compared with it."""
        self._velocity(SMALL, self.spec.small, self.shape.tokens, "velocity")

    @verb
    def large(self) -> None:
        """velocity = v_L(x), all tokens; the whole cache is rewritten, in token order."""
        self._copy("identity", "order")
        self._velocity(LARGE, self.spec.large, self.shape.tokens, "velocity")

    @verb
    def large_masked(self, tokens: int) -> None:
        """refined = v_L(x) of the `tokens` active tokens; their rows of the cache are rewritten."""
        self._velocity(LARGE, self.spec.large, tokens, "refined")

    @verb
    def blend(self, tokens: int) -> None:
        """velocity = sketch + D outside the mask, refined inside it; D is renewed inside it."""
        self._call(
            "blend",
            sketch="sketch",
            refined=("refined", (self.shape.images, tokens, self.spec.large.token_channels)),
            active=("active", (self.shape.images, tokens)),
            difference="difference",
            decay="correction",
            velocity="velocity",
            next_difference="next_difference",
        )
        self._copy("next_difference", "difference")

    @verb
    def compare_all(self) -> None:
        """D = velocity - sketch on all tokens: after a full large call everything counts as active."""
        self._copy("velocity", "refined")
        self._copy("identity", "active")
        self.blend(self.shape.tokens)

    @verb
    def correct(self) -> None:
        """velocity = sketch + D, where the small model is alone."""
        self._call(
            "correct",
            sketch="sketch",
            difference="difference",
            decay="correction",
            velocity="velocity",
            next_difference="next_difference",
        )
        self._copy("next_difference", "difference")

    @verb
    def keep_last(self) -> None:
        """sketch = the last step's velocity: what unmasked tokens go on with where there is no small model."""
        self._copy("last_velocity", "sketch")

    @verb
    def score(self, tokens: int) -> None:
        """Scores, ages, priority and ranks of all tokens, `tokens` of them fresh."""
        self._call(
            "score",
            difference="difference",
            active=("active", (self.shape.images, tokens)),
            sketch="sketch",
            last_sketch="last_sketch",
            scores="scores",
            age="age",
            decay="score_decay",
            drift="drift",
            starvation="starvation",
            next_scores="next_scores",
            next_age="next_age",
            priority="priority",
            ranks="ranks",
        )
        self._copy("next_scores", "scores")
        self._copy("next_age", "age")

    def count(self) -> int:
        """The most tokens of any image whose priority exceeds the threshold. Waits for the device."""
        self._count()
        return int(self._read("counts").max())

    @verb
    def _count(self) -> None:
        self._call("count", priority="priority", ranks="ranks", threshold="threshold", counts="counts")

    @verb
    def select(self, tokens: int) -> None:
        """The `tokens` best-ranked tokens of each image become active; cache rows of those that leave are kept."""
        images = self.shape.images
        self._call(
            "select",
            ranks="ranks",
            order="order",
            slots=("slots", (tokens,)),
            next_order="next_order",
            partner="partner",
            active=("active", (images, tokens)),
        )
        self._copy("next_order", "order")
        text = self.spec.text_length
        joint = 2 * self.spec.large.layers
        self.backend.move_rows(
            [self._buffers[name] for name in self._caches],
            self._buffers["partner"],
            tokens,
            [text if i < joint else 0 for i in range(len(self._caches))],
        )

    def change(self) -> float:
        """How much the velocity moved since the last step. Waits for the device."""
        self._change()
        return float(self._read("change")[0])

    @verb
    def _change(self) -> None:
        self._call("change", velocity="velocity", last_velocity="last_velocity", change="change")

    @verb
    def integrate(self) -> None:
        """The solver's step, for Euler x += dsigma * v."""
        self._call(
            "integrate",
            latents="latents",
            velocity="velocity",
            last_velocity="last_velocity",
            history="history",
            held="held",
            weights="weights",
            next_latents="next_latents",
            next_history="next_history",
            next_held="next_held",
        )
        self._copy("next_latents", "latents")
        self._copy("next_history", "history")
        self._copy("next_held", "held")

    @verb
    def remember(self) -> None:
        """This step's velocity and sketch become the last ones."""
        self._copy("velocity", "last_velocity")
        self._copy("sketch", "last_sketch")

    # -- what comes out ----------------------------------------------------------------------------------------------
    @property
    def latents(self) -> np.ndarray:
        """Latents as tokens [images, N, C], a copy. Waits for the device."""
        return self._read("latents")

    @latents.setter
    def latents(self, values: np.ndarray) -> None:
        self._write("latents", values)

    def is_finite(self) -> bool:
        """Whether all latents are. Waits for the device."""
        self._finite()
        return bool(self._read("finite")[0])

    @verb
    def _finite(self) -> None:
        self._call("finite", latents="latents", finite="finite")

    def active_mask(self, tokens: int) -> np.ndarray:
        """The mask in force, [images, h, w] bool. Waits for the device."""
        active = self._read("active").reshape(-1)[: self.shape.images * tokens].reshape(self.shape.images, tokens)
        mask = np.zeros((self.shape.images, self.shape.tokens), bool)
        np.put_along_axis(mask, active, True, axis=1)
        return mask.reshape(self.shape.images, self.shape.h, self.shape.w)

    def impose(self, mask: np.ndarray) -> None:
        """Makes the next `select` choose the tokens of `mask` [images, h, w] bool, whatever their scores."""
        flat = mask.reshape(self.shape.images, self.shape.tokens)
        self._write("ranks", np.argsort(np.argsort(~flat, axis=1, kind="stable"), axis=1))

    # -- inside ------------------------------------------------------------------------------------------------------
    def _velocity(self, name: str, spec: TransformerSpec, tokens: int, result: str) -> None:
        """One guided transformer call on all tokens or on the active ones, its velocity going to `result`.

        A full call takes its tokens in token order, so its input is the latents themselves, once for each half of a guided
        batch, and its positions never change.
        """
        images, rows, channels = self.shape.images, self.shape.rows, spec.token_channels
        hidden: Binding = "all_tokens"
        positions: Binding = f"{name}_pos_ids"
        if tokens == self.shape.tokens:
            self._copy("latents", "all_tokens_by_image")
        else:
            hidden, positions = ("hidden_tokens", (rows, tokens, channels)), ("pos_ids", (rows, tokens))
            self._call(
                "pack",
                latents="latents",
                token_ids=("active", (images, tokens)),
                row_index="row_index",
                pos_table="large_pos_table",
                hidden_tokens=hidden,
                pos_ids=positions,
            )
        guided = self.shape.guided
        velocity = ("row_velocity", (rows, tokens, channels)) if guided else (result, (images, tokens, channels))
        caches = self._cache_of(name)
        slots: dict[str, Binding] = {"token_slots": "slots"} if "token_slots" in self.backend.engine(name).input_names else {}
        self._call(
            name,
            hidden_tokens=hidden,
            pos_ids=positions,
            timestep="timestep",
            encoder_hidden_states="encoder_hidden_states",
            pooled_projections="pooled_projections",
            velocity=velocity,
            **slots,
            **{cache: cache for cache in caches},
            **{past_to_present(cache): cache for cache in caches},
        )
        if guided:
            target = (result, (images, tokens, channels))
            self._call("guide", row_velocity=velocity, guidance_scale="guidance_scale", velocity=target)

    def _cache_of(self, name: str) -> list[str]:
        """The large model's cache buffers, made on first use: requests without the large model need none.

        Its dtype, and where the engine has a static one its length, are the engine's.
        """
        if name == LARGE and not self._caches:
            spec, rows, tensors = self.spec.large, self.shape.rows, self.backend.engine(LARGE).tensors
            layout: dict[str, tuple[tuple[int, ...], str]] = {}
            for index, cache in enumerate(cache_names(spec.layers, spec.dual_layers)):
                length = self.shape.tokens + (self.spec.text_length if index < 2 * spec.layers else 0)
                info = tensors.get(cache, TensorInfo("float32", ("B", spec.heads, "T+N", spec.head_dim)))
                static = info.shape[2]
                layout[cache] = ((rows, spec.heads, static if isinstance(static, int) else length, spec.head_dim), info.dtype)
            self._make(layout)
            self._caches = list(layout)
        return self._caches if name == LARGE else []


_NUMBERS = ("guidance_scale", "correction", "score_decay", "drift", "starvation", "threshold")
