"""The Python API refuses what it cannot draw, as diffusers does with a ValueError, and a request that failed spoils nothing."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hst_trt.errors import HstError, NumericsError, RequestError
from hst_trt.pipeline import HybridStitchPipeline
from hst_trt.plan import MaskRule

NAN, INF = math.nan, math.inf
SHAPE = (1, 16, 8, 8)  # latents of the tiny bundle's 64 x 64 pictures


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> HybridStitchPipeline:
    return HybridStitchPipeline.from_bundle(tiny_bundle, threads=1)


def draw(pipe: HybridStitchPipeline, **changes: Any) -> np.ndarray:
    return pipe(**(dict(prompt="a red apple", seed=3, output_type="np") | changes)).images


@pytest.fixture(scope="module")
def expected(pipe: HybridStitchPipeline) -> np.ndarray:
    return draw(pipe)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {  # what is asked, and what the message has to name
    "prompt-number": (dict(prompt=5), "`prompt` has to be a str or a list of str"),
    "prompt-none": (dict(prompt=None), "`prompt` has to be a str"),
    "prompt-bytes": (dict(prompt=b"a red apple"), "`prompt` has to be a str"),
    "prompt-list-of-numbers": (dict(prompt=["a", 5]), "`prompt` has to be a str"),
    "prompt-no-prompts": (dict(prompt=[]), "`prompt` has to be a str"),
    "prompt-half-a-character": (dict(prompt="a \udc80 apple"), "not valid Unicode"),
    "height-not-a-multiple": (dict(height=100), "height 100 is not a multiple of 16"),
    "width-not-a-multiple": (dict(width=65), "width 65 is not a multiple of 16"),
    "height-zero": (dict(height=0), "height 0"),
    "width-negative": (dict(width=-64), "width -64"),
    "height-too-large": (dict(height=208), "its longest side is 192"),
    "height-far-too-large": (dict(height=2**40), "its longest side is 192"),
    "height-fraction": (dict(height=64.5), "height 64.5"),
    "height-float": (dict(height=64.0), "height 64.0"),
    "height-text": (dict(height="64"), "height '64'"),
    "height-nan": (dict(height=NAN), "height nan"),
    "steps-zero": (dict(num_inference_steps=0), "num_inference_steps 0"),
    "steps-negative": (dict(num_inference_steps=-1), "num_inference_steps -1"),
    "steps-10000": (dict(num_inference_steps=10_000), "num_inference_steps 10000 is outside 1 .. 1000"),
    "steps-fraction": (dict(num_inference_steps=2.5), "num_inference_steps 2.5"),
    "steps-text": (dict(num_inference_steps="20"), "num_inference_steps '20'"),
    "guidance-nan": (dict(guidance_scale=NAN), "guidance_scale nan"),
    "guidance-infinite": (dict(guidance_scale=INF), "guidance_scale inf"),
    "guidance-negative": (dict(guidance_scale=-1.0), "guidance_scale -1.0"),
    "guidance-text": (dict(guidance_scale="7"), "guidance_scale '7'"),
    "mask-ratio-zero": (dict(mask_ratio=0), "mask ratio 0 is outside (0, 1]"),
    "mask-ratio-above-one": (dict(mask_ratio=1.5), "mask ratio 1.5 is outside (0, 1]"),
    "mask-ratio-nan": (dict(mask_ratio=NAN), "mask ratio nan"),
    "mask-ratio-negative": (dict(mask_ratio=-0.3), "mask ratio -0.3"),
    "mask-ratio-text": (dict(mask_ratio="0.3"), "mask ratio '0.3'"),
    "mask-and-mask-ratio": (dict(mask=MaskRule(0.2), mask_ratio=0.4), "mask_ratio"),
    "stages-do-not-add-up": (dict(num_inference_steps=4, stages=(1, 1, 1)), "add up to 3"),
    "stages-negative": (dict(num_inference_steps=4, stages=(-1, 2, 3)), "stages -1,2,3 do not make 4 steps"),
    "stages-two-numbers": (dict(num_inference_steps=4, stages=(2, 2)), "2 numbers"),
    "stages-four-numbers": (dict(num_inference_steps=4, stages=(1, 1, 1, 1)), "4 numbers"),
    "stages-fractions": (dict(num_inference_steps=4, stages=(1.5, 1.5, 1)), "stages"),
    "stages-no-sequence": (dict(num_inference_steps=4, stages=4), "stages"),
    "stages-of-another-schedule": (dict(num_inference_steps=4, schedule="large", stages=(2, 1, 1)), "no hybrid stage"),
    "schedule-unknown": (dict(schedule="fastest"), "choose one of hybrid, large, small"),
    "schedule-none": (dict(schedule=None), "unknown schedule None"),
    "refresh-negative": (dict(refresh_every=-1), "refresh_every -1"),
    "refresh-fraction": (dict(num_inference_steps=20, refresh_every=2.5), "refresh_every 2.5"),
    "correction-negative": (dict(correction=-0.1), "correction -0.1 is outside [0, 1]"),
    "correction-above-one": (dict(correction=1.1), "correction 1.1 is outside [0, 1]"),
    "correction-nan": (dict(correction=NAN), "correction nan"),
    "adaptive-large": (dict(schedule="large", adaptive=True), "adaptive"),
    "output-type-unknown": (dict(output_type="pt"), "use one of pil, np, latent"),
    "callback-tensor-unknown": (
        dict(callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]),
        "prompt_embeds",
    ),
    "negatives-too-few": (dict(prompt=["a", "b", "c"], negative_prompt=["x", "y"]), "2 negative prompts were given for 3"),
    "negatives-too-many": (dict(negative_prompt=["x", "y"]), "2 negative prompts were given for 1"),
    "negatives-wrong-type": (dict(negative_prompt=7), "`negative_prompt` has to be a str"),
    "negatives-list-of-numbers": (dict(negative_prompt=[7]), "`negative_prompt` has to be a str"),
    "negatives-wrong-though-unguided": (dict(negative_prompt=["x", "y"], guidance_scale=1.0), "2 negative prompts"),
    "images-zero": (dict(num_images_per_prompt=0), "num_images_per_prompt 0"),
    "images-negative": (dict(num_images_per_prompt=-2), "num_images_per_prompt -2"),
    "images-fraction": (dict(num_images_per_prompt=1.5), "num_images_per_prompt 1.5"),
    "images-too-many": (dict(num_images_per_prompt=5), "its limit is 4"),
    "images-too-many-by-prompts": (dict(prompt=["a"] * 3, num_images_per_prompt=2), "6 images at once"),
    "seed-negative": (dict(seed=-1), "seed -1 is outside 0 .. 2**64-1"),
    "seed-too-large": (dict(seed=2**64), "is outside 0 .. 2**64-1"),
    "seed-fraction": (dict(seed=1.5), "seed 1.5"),
    "seed-text": (dict(seed="7"), "seed '7'"),
    "seeds-too-few": (dict(num_images_per_prompt=3, seed=[1, 2]), "2 seeds were given for 3 images"),
    "seeds-none": (dict(seed=[]), "0 seeds were given for 1 images"),
    "seeds-one-bad": (dict(num_images_per_prompt=2, seed=[1, -1]), "seed -1"),
    "seeds-fractions": (dict(num_images_per_prompt=2, seed=[1, 2.5]), "seed 2.5"),
    "generators-too-few": (
        dict(num_images_per_prompt=2, seed=None, generator=[torch.Generator()]),
        "1 generators were given for 2 images",
    ),
    "latents-wrong-size": (dict(latents=np.zeros((1, 16, 8, 16), np.float32)), "this request needs (1, 16, 8, 8)"),
    "latents-wrong-channels": (dict(latents=np.zeros((1, 4, 8, 8), np.float32)), "(1, 4, 8, 8)"),
    "latents-too-few": (dict(num_images_per_prompt=2, latents=np.zeros(SHAPE, np.float32)), "needs (2, 16, 8, 8)"),
    "latents-flat": (dict(latents=np.zeros(1024, np.float32)), "(1024,)"),
    "text-length": (dict(max_sequence_length=256), "it was built for 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_drawn_is_a_value_error_that_names_it_and_spoils_nothing(
    pipe: HybridStitchPipeline, expected: np.ndarray, name: str
) -> None:
    arguments, fragment = REFUSED[name]
    with pytest.raises(ValueError) as caught:  # as diffusers raises
        draw(pipe, **arguments)
    assert isinstance(caught.value, RequestError)
    assert caught.value.exit_code == 2
    assert fragment in str(caught.value)
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize("size", [-5, 0, 1, 15, 17, 100, 191, 193, 2**31])
def test_every_size_that_an_error_proposes_can_be_drawn(pipe: HybridStitchPipeline, size: int) -> None:
    with pytest.raises(RequestError) as caught:
        draw(pipe, height=size, num_inference_steps=1)
    proposed = [int(number) for number in re.findall(r"\d+", caught.value.fix or "")]
    assert proposed
    for height in proposed:
        assert draw(pipe, height=height, num_inference_steps=1).shape == (1, height, 64, 3)


@pytest.mark.parametrize("rule", [dict(ratio=0.0), dict(threshold=0.0), dict(threshold=NAN), dict(decay=1.1), dict(decay=-0.1),
                                  dict(drift=-1.0), dict(drift=INF), dict(starvation=NAN)], ids=str)  # fmt: skip
def test_a_mask_rule_out_of_range_is_refused_when_it_is_made(rule: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(rule))):
        MaskRule(**rule)


def test_the_limits_themselves_are_allowed(pipe: HybridStitchPipeline) -> None:
    assert draw(pipe, height=192, width=16, num_inference_steps=1).shape == (1, 192, 16, 3)
    assert draw(pipe, num_images_per_prompt=4, num_inference_steps=1, seed=2**64 - 1).shape == (4, 64, 64, 3)
    assert draw(pipe, mask_ratio=1.0, correction=1.0, guidance_scale=0.0).shape == (1, 64, 64, 3)
    assert draw(pipe, max_sequence_length=16, num_inference_steps=1).shape == (1, 64, 64, 3)
    assert draw(pipe, seed=np.int64(3), height=np.int64(64), num_inference_steps=np.int32(2)).shape == (1, 64, 64, 3)


# -- prompts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", ["a red apple", ""]])
def test_an_empty_prompt_is_drawn_with_a_warning(
    pipe: HybridStitchPipeline, prompt: str | list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        images = draw(pipe, prompt=prompt)
    assert len(images) == (2 if isinstance(prompt, list) else 1)
    assert np.isfinite(images).all()
    assert [r.message for r in caplog.records if "empty" in r.message]


def test_an_ordinary_prompt_is_drawn_without_a_warning(pipe: HybridStitchPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        draw(pipe)
    assert not caplog.records


LONG = "a red apple and a blue house and a green tree and a yellow car under the night sky beside one lonely penguin"


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    "prompt",
    [LONG, "apple " * 500, "漢字かな" * 60, "🦊" * 40, "x" * 5000],
    ids=["words", "repeated", "kanji", "emoji", "word"],
)
def test_an_over_long_prompt_is_cut_where_transformers_cuts_it_and_the_log_names_what_was_cut(
    pipe: HybridStitchPipeline, tiny_pair: Path, number: int, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ("tokenizer", "tokenizer_2", "tokenizer_3")[number]
    reference, ours = AutoTokenizer.from_pretrained(tiny_pair / folder), pipe.tokenizers[number]
    with caplog.at_level(logging.WARNING):
        ids = ours([prompt])
    logged = [record.getMessage() for record in caplog.records]
    kept = reference(prompt, padding="max_length", max_length=ours.length, truncation=True).input_ids
    assert ids.tolist() == [kept]
    # The same words that diffusers' warning names: batch_decode(untruncated[:, length - 1 : -1]).
    whole = reference(prompt).input_ids
    cut = reference.decode(whole[ours.length - 1 : -1]).strip()
    message = f"the prompt is too long for the {ours.length} tokens of {ours.name}; this part was cut off: {cut!r}"
    assert logged == ([message] if len(whole) > ours.length else [])  # T5 takes many unknown characters for one
    assert logged or number == 2


def test_an_over_long_prompt_draws_the_picture_of_its_kept_part(
    pipe: HybridStitchPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        whole = draw(pipe, prompt=LONG)
        assert "penguin" in caplog.text
        assert np.array_equal(draw(pipe, prompt=LONG + " in the rain"), whole)
    assert not np.array_equal(draw(pipe, prompt="a blue apple and " + LONG), whole)


def test_an_over_long_negative_prompt_is_named_too(pipe: HybridStitchPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        draw(pipe, negative_prompt=LONG)
    assert "lonely penguin" in caplog.text


@pytest.mark.parametrize("prompt", ["\0", "\x1b[31m", "\u202e", "[bold]", "a" * 100_000, "%s {0} \\n", "<|endoftext|>", "</s>"])
def test_odd_prompts_are_drawn(pipe: HybridStitchPipeline, prompt: str) -> None:
    assert np.isfinite(draw(pipe, prompt=prompt, num_inference_steps=1)).all()


# -- a request that fails spoils nothing ----------------------------------------------------------------------------------
SCHEDULES: dict[str, dict[str, Any]] = {
    "hybrid": dict(num_inference_steps=8),
    "hybrid-first": dict(num_inference_steps=6, stages=(0, 4, 2)),
    "everything": dict(
        num_inference_steps=8,
        mask=MaskRule(0.2, drift=0.5, starvation=0.1),
        correction=0.9,
        adaptive=True,
        refresh_every=2,
    ),
    "threshold": dict(num_inference_steps=8, mask=MaskRule(threshold=1.2, drift=0.5)),
    "large": dict(schedule="large"),
    "small": dict(schedule="small"),
    "t-stitch": dict(schedule="t-stitch"),
    "t-stitch-corrected": dict(schedule="t-stitch", num_inference_steps=6, correction=0.9),  # reads D before it is known
    "srdiffusion": dict(schedule="srdiffusion", adaptive=True, num_inference_steps=10),
    "ras": dict(schedule="ras", num_inference_steps=6, mask=MaskRule(0.2, drift=0.5)),
    "unguided": dict(guidance_scale=1.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_picture_does_not_depend_on_what_was_drawn_before_even_if_that_was_not_finite(
    tiny_bundle: Path, pipe: HybridStitchPipeline, schedule: str
) -> None:
    arguments = SCHEDULES[schedule]
    alone = draw(HybridStitchPipeline.from_bundle(tiny_bundle, threads=1), **arguments)
    poison = np.full(SHAPE, NAN, np.float32)
    for before in ("everything", "large", "small", "ras", schedule):
        guidance = dict(guidance_scale=arguments.get("guidance_scale", 3.0))  # so that it uses the same buffers
        with pytest.raises(NumericsError):
            draw(pipe, latents=poison, **(SCHEDULES[before] | guidance))
        assert np.array_equal(draw(pipe, **arguments), alone), f"after NaNs in {before}"
    draw(pipe, **(SCHEDULES["everything"] | guidance), prompt="a castle", seed=9)
    assert np.array_equal(draw(pipe, **arguments), alone), "after another picture"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_latents_that_do_not_stay_finite_are_a_numerics_error_and_no_picture(pipe: HybridStitchPipeline, value: float) -> None:
    latents = np.zeros(SHAPE, np.float32)
    latents[0, 3, 2, 5] = value
    for output_type in ("pil", "np", "latent"):
        with pytest.raises(NumericsError, match="not finite") as caught:
            draw(pipe, latents=latents, output_type=output_type)
        assert caught.value.exit_code == 7
        assert "hst-trt verify" in str(caught.value)


def test_a_callback_that_raises_ends_the_request_with_its_own_error_and_spoils_nothing(
    pipe: HybridStitchPipeline, expected: np.ndarray
) -> None:
    class Mine(Exception):
        pass

    def callback(pipe: object, t: int, timestep: float, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["latents"][...] = NAN  # its own copy
        if t == 2:
            raise Mine
        return {}

    with pytest.raises(Mine):
        draw(pipe, callback_on_step_end=callback)
    assert np.array_equal(draw(pipe), expected)
    with pytest.raises(Mine):
        pipe("a red apple", seed=3, on_step=lambda t, record: (_ for _ in ()).throw(Mine))
    assert np.array_equal(draw(pipe), expected)


def test_an_interrupted_loop_returns_what_it_has_and_the_next_request_runs_to_its_end(
    pipe: HybridStitchPipeline, expected: np.ndarray
) -> None:
    def callback(pipe: HybridStitchPipeline, t: int, timestep: float, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pipe._interrupt = t == 1
        return {}

    stopped = pipe("a red apple", seed=3, output_type="np", callback_on_step_end=callback)
    assert len(stopped.stats.records) == 2
    assert not np.array_equal(stopped.images, expected)
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize(
    "returned",
    [np.zeros((1, 16, 8, 9)), np.zeros(3), np.zeros((2, *SHAPE[1:])), "latents"],
    ids=["wide", "flat", "two", "text"],
)
def test_a_callback_that_returns_latents_of_another_shape_is_refused(
    pipe: HybridStitchPipeline, expected: np.ndarray, returned: object
) -> None:
    with pytest.raises(RequestError, match="callback"):
        draw(pipe, callback_on_step_end=lambda *_: {"latents": returned})
    assert np.array_equal(draw(pipe), expected)


def test_a_callback_that_returns_latents_that_are_not_finite_is_a_numerics_error(
    pipe: HybridStitchPipeline, expected: np.ndarray
) -> None:
    with pytest.raises(NumericsError):
        draw(pipe, callback_on_step_end=lambda *_: {"latents": np.full(SHAPE, NAN)})
    assert np.array_equal(draw(pipe), expected)


def test_planning_refuses_what_drawing_refuses(pipe: HybridStitchPipeline) -> None:
    planned = 0
    for arguments, fragment in REFUSED.values():
        if arguments.keys() <= {
            "height",
            "width",
            "num_inference_steps",
            "schedule",
            "stages",
            "refresh_every",
            "correction",
            "adaptive",
        }:
            planned += 1
            with pytest.raises(RequestError) as caught:
                pipe.plan(**arguments)
            assert fragment in str(caught.value)
    assert planned > 15


def test_every_error_of_a_request_says_more_than_no() -> None:
    for problem, found, fix in (("p", None, None), ("p", "f", None), ("p", None, "d"), ("p", "f", "d")):
        text = str(HstError(problem, found=found, fix=fix))
        assert text.splitlines()[0] == "p"
        assert ("found: f" in text) == (found is not None)
        assert ("to do: d" in text) == (fix is not None)
