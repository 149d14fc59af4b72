"""Pictures against diffusers' own StableDiffusion3Pipeline on the same directory, and the pieces that make them equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import AutoTokenizer

import hst_trt
from hst_trt.errors import RequestError
from hst_trt.noise import start_noise, torch_randn
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.schedule import SOLVERS, FlowMatchEuler, Sampling, Solver, StepTable
from hst_trt.tokenizer import PromptTokenizer

PAIR = Path(hst_trt.__file__).parent / "data" / "demo_pair"


@pytest.fixture(scope="module")
def reference() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(PAIR, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def transformers() -> dict[str, SD3Transformer2DModel]:
    return {
        name: SD3Transformer2DModel.from_pretrained(PAIR, subfolder=folder, dtype=torch.float32)
        for name, folder in (("large", "transformer"), ("small", "transformer_small"))
    }


@pytest.fixture(scope="module")
def pipeline(demo_bundle: Path) -> HybridStitchPipeline:
    return HybridStitchPipeline.from_bundle(demo_bundle)


@pytest.mark.parametrize("schedule", ["large", "small"])
@pytest.mark.parametrize(
    "request_",
    [
        dict(prompt="a red apple on a blue background", num_inference_steps=20, guidance_scale=3.0, seed=7),
        dict(prompt="a castle in the night sky", num_inference_steps=7, height=96, width=160, guidance_scale=4.5, seed=1),
        dict(prompt="two cats, zażółć 🦊", num_inference_steps=5, guidance_scale=1.0, seed=3),  # unguided, odd characters
        dict(
            prompt=["a dog", "a big pizza at sea"], negative_prompt="blue", num_inference_steps=9, height=128, width=80,
            guidance_scale=2.5, seed=11,
        ),
        dict(prompt="a penguin", negative_prompt="grass, sea", num_images_per_prompt=2, num_inference_steps=1, seed=[5, 6]),
        dict(prompt="a house " * 20, num_inference_steps=3, seed=2),  # truncated by both
    ],
    ids=["square", "wide", "unguided", "batch", "two-images", "too-long"],
)  # fmt: skip
def test_single_model_schedules_draw_diffusers_pictures(reference, transformers, pipeline, schedule, request_) -> None:
    arguments = dict(request_)
    seed = arguments.pop("seed")
    reference.transformer = transformers[schedule]
    generators = [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else None
    defaults = dict(height=256, width=256, guidance_scale=3.0, max_sequence_length=16)
    expected = reference(**(defaults | arguments), generator=generators or torch.Generator().manual_seed(seed)).images
    images = pipeline(**arguments, seed=seed, schedule=schedule).images
    assert len(images) == len(expected)
    for image, other in zip(images, expected, strict=True):
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int))
        assert image.size == other.size
        assert difference.max() <= 1, f"{difference.max()}/255"
        assert np.asarray(other).std() > 5, "a flat picture would prove nothing"


def test_a_torch_generator_and_given_latents_start_from_the_same_noise_as_a_seed(pipeline) -> None:
    draw = lambda **start: np.asarray(pipeline("a cat", num_inference_steps=2, **start).images[0]).astype(int)
    by_seed = draw(seed=4)
    assert np.abs(draw(generator=torch.Generator().manual_seed(4)) - by_seed).max() <= 1
    np.testing.assert_array_equal(draw(latents=start_noise(4, (1, 16, 32, 32))), by_seed)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1, 16, 16, 16), (2, 3, 5, 7), (1, 16, 40, 24), (17,)])
def test_start_noise_is_torchs(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    np.testing.assert_allclose(torch_randn(seed, shape), expected, rtol=0, atol=6e-7)


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 28, 50, 1000])
def test_steps_are_those_of_diffusers_scheduler(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    table = FlowMatchEuler(shift).table(steps)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(table.sigmas, scheduler.sigmas.numpy())
    assert (np.diff(table.sigmas) < 0).all()
    euler = np.zeros((steps, 5), np.float32)
    euler[:, 0], euler[:, 1] = 1, np.diff(table.sigmas)
    np.testing.assert_array_equal(table.coefficients, euler)


def test_trailing_steps_lie_evenly_down_to_zero_before_the_shift() -> None:
    for steps, shift in ((1, 1.0), (4, 3.0), (9, 5.0)):
        table = FlowMatchEuler(3.0).table(steps, Sampling(timestep_spacing="trailing", shift=shift))
        times = table.sigmas / (shift - (shift - 1) * table.sigmas)
        np.testing.assert_allclose(times, np.linspace(1, 0, steps + 1), atol=1e-6)
        np.testing.assert_allclose(table.timesteps, 1000 * table.sigmas[:-1], rtol=1e-6)
    moved = [
        -np.diff(FlowMatchEuler(3.0).table(7, Sampling(timestep_spacing=kind)).sigmas)[-1] for kind in ("linspace", "trailing")
    ]
    assert moved[0] < 0.01 < 0.3 < moved[1], "diffusers' last call moves next to nothing"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(solver="heun"), "unknown solver 'heun'"),
        (dict(timestep_spacing="leading"), "unknown timestep spacing 'leading'"),
        (dict(shift=0), "shift 0 is outside"),
        (dict(shift=math.nan), "shift nan is outside"),
        (dict(shift=True), "shift True is outside"),
        (dict(shift="3"), "shift '3' is outside"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Sampling(**settings)


def integrated(table: StepTable, velocity: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray) -> np.ndarray:
    """From sigma 1 to 0 by a step table, in float64."""
    memory = np.zeros_like(x)
    for sigma, (a, b, c, d, e) in zip(table.sigmas, table.coefficients.astype(np.float64), strict=False):
        v = velocity(x, float(sigma))
        x, memory = a * x + b * v + c * memory, d * x + e * v
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 28])
def test_dpmpp_2m_steps_are_those_of_diffusers_scheduler(steps: int) -> None:
    table = FlowMatchEuler(3.0).table(steps, Sampling("dpmpp-2m"))
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.from_numpy(table.sigmas)  # its own ramp differs from the Euler scheduler's
    scheduler.set_begin_index(0)
    x = noise = np.linspace(-2, 2, 9)

    def velocity(x: np.ndarray, sigma: float) -> np.ndarray:
        return np.sin(3 * x) + sigma * x

    for t, sigma in zip(scheduler.timesteps, table.sigmas, strict=False):
        v = torch.from_numpy(velocity(x, float(sigma)))
        x = scheduler.step(v, t, torch.from_numpy(x), return_dict=False)[0].numpy()
    np.testing.assert_allclose(integrated(table, velocity, noise), x, atol=2e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("dpmpp-2m", 2)])
def test_a_solver_has_its_order(solver: Solver, order: int) -> None:
    """The flow that takes N(0, 1) to N(m, s) in straight lines of conditional means has a closed form: halving the steps
    shrinks the error by 2 to the order."""
    m, s, noise = 0.7, 0.4, np.linspace(-2, 2, 9)

    def velocity(x: np.ndarray, sigma: float) -> np.ndarray:
        spread = ((1 - sigma) * s) ** 2 + sigma**2
        clean = m + (1 - sigma) * s**2 / spread * (x - (1 - sigma) * m)
        return (x - clean) / max(sigma, 1e-9)

    errors = [
        np.abs(integrated(FlowMatchEuler().table(n, Sampling(solver)), velocity, noise) - (m + s * noise)).max()
        for n in (40, 80)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_every_solver_is_exact_where_the_flow_is_straight() -> None:
    for solver in SOLVERS:
        for steps in (1, 2, 7):
            x = integrated(
                FlowMatchEuler(3.0).table(steps, Sampling(solver)), lambda x, sigma: np.full(3, 0.25), np.arange(3.0)
            )
            np.testing.assert_allclose(x, np.arange(3.0) - 0.25, atol=1e-6)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_token_ids_are_those_of_transformers(pipeline, name: str) -> None:
    entry = pipeline.bundle.manifest.tokenizers[int(name[-1]) - 1 if name[-1].isdigit() else 0]
    ours = PromptTokenizer(pipeline.bundle.read(entry.path), "tokenizer", entry.length, entry.pad_id)
    theirs = AutoTokenizer.from_pretrained(PAIR / name)
    rng = np.random.default_rng(0)
    alphabet = list("abc XYZ,.!?'\"-_0123 äßñçéñ 汉字 🦊🎉 \t\n<|>") + ["<|endoftext|>", "</s>", "castle", "apple"]
    prompts = ["", " ", "a red apple on a blue background", "A  CASTLE\n in\tthe night sky", "x" * 500]
    prompts += ["".join(rng.choice(alphabet, rng.integers(1, 40))) for _ in range(300)]
    expected = theirs(prompts, padding="max_length", max_length=entry.length, truncation=True).input_ids
    np.testing.assert_array_equal(ours(prompts), expected)


def test_np_and_latent_outputs_belong_to_the_same_picture(pipeline) -> None:
    pixels, array, latents = (
        pipeline("a fox", num_inference_steps=3, seed=1, height=80, width=112, output_type=kind).images
        for kind in ("pil", "np", "latent")
    )
    np.testing.assert_allclose(np.asarray(pixels[0]) / 255, array[0], atol=1e-6)
    assert latents.shape == (1, 16, 10, 14)
    assert np.isfinite(latents).all()


def test_callbacks_see_latents_and_may_replace_them_and_stop_the_loop(pipeline) -> None:
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep, tensors["latents"].shape))
        if step == 2:
            pipe._interrupt = True
        return {"latents": np.zeros_like(tensors["latents"])} if step == 2 else {}

    output = pipeline("a fox", num_inference_steps=6, seed=1, callback_on_step_end=callback, output_type="latent")
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == list(pipeline.scheduler.table(6).timesteps[:3])
    assert seen[0][2] == (1, 16, 32, 32)
    assert (output.images == 0).all()


def test_every_schedule_draws_and_reports_what_it_computed(pipeline) -> None:
    for schedule in ("hybrid", "large", "small", "t-stitch", "srdiffusion", "ras"):
        output = pipeline("a fox", num_inference_steps=10, seed=1, schedule=schedule, keep_masks=True)
        stats = output.stats
        assert stats.large_tokens == sum(output.plan.tokens_of(step) for step in output.plan.steps)
        assert sum(stage.steps for stage in stats.stages.values()) == 10
        assert bool(output.masks) == (schedule in ("hybrid", "ras"))
        for t, mask in output.masks.items():
            assert mask.sum() == output.plan.steps[t].large_tokens
