"""Plans: what each schedule does at each step, what is refused, and what it costs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hst_trt.cost import ModelledCosts, call_flops, call_weights
from hst_trt.errors import RequestError
from hst_trt.models.sd3 import TokenTransformer
from hst_trt.plan import (
    AdaptiveSwitch,
    MaskRule,
    PlanRequest,
    Stage,
    StitchPlan,
    bucket_for,
    make_plan,
    token_buckets,
)
from hst_trt.spec import TransformerSpec

N = 256
SD35 = {
    "large": dict(num_layers=38, num_attention_heads=38, pos_embed_max_size=192),
    "small": dict(num_layers=24, num_attention_heads=24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
}
COMMON = dict(
    sample_size=128, patch_size=2, in_channels=16, attention_head_dim=64, joint_attention_dim=4096, pooled_projection_dim=2048,
    out_channels=16, qk_norm="rms_norm",
)  # fmt: skip


def plan(schedule: str = "hybrid", steps: int = 28, **settings: object) -> StitchPlan:
    return make_plan(PlanRequest(schedule, steps, N, token_buckets(N), **settings))


def sd35_costs(num_tokens: int = 4096) -> ModelledCosts:
    specs = {name: TransformerSpec.from_config(COMMON | config) for name, config in SD35.items()}
    return ModelledCosts(specs["large"], specs["small"], num_tokens, 333)


def test_a_hybrid_plan_has_three_stages_and_draws_the_first_mask_at_the_last_large_step() -> None:
    steps = plan(stages=(3, 9, 16), refresh_every=0).steps
    assert [step.stage for step in steps] == [Stage.LARGE] * 3 + [Stage.HYBRID] * 9 + [Stage.SMALL] * 16
    assert [step.large_tokens for step in steps] == [N] * 3 + [80] * 9 + [0] * 16
    assert [step.small for step in steps] == [False, False, True] + [True] * 25
    assert [step.redraw for step in steps] == [False, False] + [True] * 9 + [False] * 17


def test_without_large_steps_the_first_hybrid_step_is_a_full_call() -> None:
    steps = plan(stages=(0, 4, 24)).steps
    assert [step.large_tokens for step in steps[:4]] == [N, 80, 80, 80]
    assert steps[0].small
    assert steps[0].redraw


def test_a_refresh_is_a_full_call_that_no_mask_is_drawn_for() -> None:
    steps = plan(stages=(2, 9, 17), refresh_every=3).steps
    assert [step.large_tokens for step in steps[2:11]] == [80, 80, N, 80, 80, N, 80, 80, N]
    assert [step.redraw for step in steps[2:11]] == [True, False, True, True, False, True, True, False, False]


def test_by_default_more_than_eight_hybrid_steps_get_one_refresh_in_the_middle() -> None:
    full = lambda hybrid: [s.large_tokens for s in plan(stages=(2, hybrid, 26 - hybrid)).steps[2 : 2 + hybrid]].count(N)
    assert [full(8), full(9), full(20)] == [0, 1, 1]


def test_default_stages_are_a_tenth_large_and_a_third_hybrid() -> None:
    assert [plan(steps=n).stage_lengths[Stage.LARGE] for n in (1, 10, 20, 28, 50)] == [1, 1, 2, 3, 5]
    assert [tuple(plan(steps=n).stage_lengths.values()) for n in (28, 50)] == [(3, 9, 16), (5, 16, 29)]


def test_ras_keeps_large_alone_and_masks_after_two_full_steps() -> None:
    steps = plan("ras", steps=10, refresh_every=0).steps
    assert [step.large_tokens for step in steps] == [N] * 2 + [80] * 8
    assert not any(step.small for step in steps)
    with pytest.raises(RequestError, match="two full steps"):
        plan("ras", stages=(1, 27, 0))


def test_ras_refreshes_every_third_masked_step() -> None:
    steps = plan("ras", steps=9).steps
    assert [step.large_tokens for step in steps] == [N] * 3 + [80, 80, N, 80, 80, N]
    assert [step.redraw for step in steps] == [False, False, True, True, False, True, True, False, False]


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7])
def test_ras_ends_with_a_full_step_unless_it_never_refreshes_or_stages_say_so(every: int) -> None:
    for steps in range(1, 30):
        made = plan("ras", steps=steps, refresh_every=every).steps
        assert len(made) == steps
        assert made[-1].large_tokens == N
    assert plan("ras", steps=9, stages=(2, 7, 0)).steps[-1].large_tokens == 80


def test_a_correction_makes_the_last_large_step_compare_both_models() -> None:
    assert not plan("srdiffusion", stages=(5, 0, 23)).steps[4].small
    assert plan("srdiffusion", stages=(5, 0, 23), correction=0.9).steps[4].small
    assert plan("large", correction=0.9).correction == 0.0, "there is nothing to correct"


def test_an_adaptive_switch_ends_the_large_stage_where_it_fires() -> None:
    made = plan(steps=20, stages=(12, 5, 3), switch=AdaptiveSwitch())
    switched = made.switched_at(4)
    assert switched == plan(steps=20, stages=(4, 5, 11))
    assert made.switch.bounds(20) == (2, 12)
    assert [t for t in range(21) if made.may_switch_after(t)] == list(range(2, 12)), "not too early, and before its planned end"
    assert plan(steps=20, stages=(18, 2, 0), switch=AdaptiveSwitch()).switched_at(19) == plan(steps=20, stages=(19, 1, 0))


@pytest.mark.parametrize(
    ("changes", "fires"),
    [([0.5], False), ([0.5, 0.45], False), ([0.5, 0.495], True), ([0.5, 0.5], False), ([0.495, 0.5], False)],
)
def test_the_switch_fires_when_the_change_shrinks_by_less_than_the_tolerance(changes: list[float], fires: bool) -> None:
    assert AdaptiveSwitch().fires(changes) is fires


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(schedule="sideways"), "unknown schedule"),
        (dict(stages=(1, 2, 3)), "do not make 28 steps"),
        (dict(stages=(-1, 28, 1)), "do not make 28 steps"),
        (dict(stages=(28, 0)), "do not make 28 steps"),
        (dict(schedule="large", stages=(20, 0, 8)), "no small stage"),
        (dict(schedule="srdiffusion", stages=(10, 8, 10)), "no hybrid stage"),
        (dict(steps=0), "not positive"),
        (dict(correction=1.5), "outside"),
        (dict(correction=math.nan), "outside"),
        (dict(refresh_every=-1), "negative"),
        (dict(schedule="t-stitch", switch=AdaptiveSwitch()), "no switch"),
    ],
)
def test_requests_that_make_no_plan_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        plan(**arguments)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_mask_ratios_outside_zero_to_one_are_refused(ratio: float) -> None:
    with pytest.raises(RequestError, match="mask ratio"):
        MaskRule(ratio=ratio)


def test_a_random_mask_changes_neither_the_steps_nor_their_cost() -> None:
    drawn, scored = plan(mask=MaskRule(random_seed=4)), plan(mask=MaskRule())
    assert drawn.steps == scored.steps
    assert drawn != scored
    assert drawn.cost(sd35_costs(N)) == scored.cost(sd35_costs(N))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (dict(random_seed=-1), "negative"),
        (dict(random_seed=1.5), "not a whole number"),
        (dict(random_seed=1, threshold=2.0), "threshold"),
    ],
)
def test_a_random_mask_without_a_usable_seed_or_with_a_threshold_is_refused(rule: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        MaskRule(**rule)


def test_buckets_are_rounded_up_and_end_with_all_tokens() -> None:
    assert token_buckets(4096) == (448, 832, 1280, 1664, 2048, 3072, 4096)
    assert token_buckets(256) == (32, 56, 80, 104, 128, 192, 256)
    assert token_buckets(4) == (4,)
    assert bucket_for(0.3 * 256, token_buckets(256)) == 80
    assert bucket_for(9999, token_buckets(256)) == 256


@given(
    schedule=st.sampled_from(["hybrid", "large", "small", "t-stitch", "srdiffusion", "ras"]),
    steps=st.integers(1, 60),
    tokens=st.integers(1, 5000),
    ratio=st.floats(0.01, 1.0),
    refresh=st.none() | st.integers(0, 12),
    correction=st.sampled_from([0.0, 0.9]),
    threshold=st.none() | st.just(2.0),
)
@settings(max_examples=300, deadline=None)
def test_every_plan_can_be_carried_out(schedule, steps, tokens, ratio, refresh, correction, threshold) -> None:
    """No step asks for a mask that was not drawn, for a cache that was not written, or for a velocity nobody computed."""
    buckets = token_buckets(tokens)
    mask = MaskRule(ratio=ratio, threshold=threshold)
    made = make_plan(PlanRequest(schedule, steps, tokens, buckets, mask=mask, refresh_every=refresh, correction=correction))
    assert len(made.steps) == steps
    cache = False
    for t, step in enumerate(made.steps):
        masked = step.large_tokens is None or 0 < step.large_tokens < tokens
        assert step.large_tokens is None or step.large_tokens in (0, *buckets)
        if masked:
            assert cache
            assert made.steps[t - 1].redraw
            assert step.small or schedule == "ras"
        if step.redraw:
            following = made.steps[t + 1].large_tokens
            assert following is None or following < tokens
        assert step.small or step.large_tokens != 0
        cache = cache or step.large_tokens == tokens
    assert made == make_plan(dataclasses.replace(made.request))


# -- the cost model ----------------------------------------------------------------------------------------------------
def test_the_published_figures_of_sd35_come_out() -> None:
    """Parameters and one guided step are stated in docs/method.md."""
    costs = sd35_costs()
    assert 2 * call_flops(costs.large_spec, 4096, 4096, 333) == pytest.approx(62.2e12, rel=2e-3)
    assert 2 * call_flops(costs.small_spec, 4096, 4096, 333) == pytest.approx(22.5e12, rel=2e-3)
    assert costs.small() == pytest.approx(0.3615, abs=5e-4)
    shares = [costs.large(round(r * 4096)) for r in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert shares == pytest.approx([0.167, 0.260, 0.352, 0.445, 0.537], abs=1e-3)


def test_the_stage_splits_of_the_method_cost_what_it_says() -> None:
    """1.83x at r = 0.3 without overhead; buckets round r = 0.3 of 4096 tokens up to 1280, and a refresh adds 0.65."""
    costs = sd35_costs()
    for steps, stages in ((50, (5, 17, 28)), (50, (10, 8, 32)), (28, (3, 9, 16))):
        n1, n2, n3 = stages
        assert steps / (n1 + n2 * (costs.small() + costs.large(1229)) + n3 * costs.small()) == pytest.approx(1.83, abs=0.02)
        made = make_plan(PlanRequest("hybrid", steps, 4096, token_buckets(4096), stages=stages, refresh_every=0))
        expected = n1 + n2 * (costs.small() + costs.large(1280)) + (n3 + 1) * costs.small()  # one more: the first mask
        assert made.cost(costs) == pytest.approx(expected)


def test_steps_that_use_a_mask_or_draw_one_cost_their_glue_too_and_others_do_not() -> None:
    costs = sd35_costs(N)
    glue = dataclasses.replace(costs, glue_flops=1e9)
    assert glue.glue() == pytest.approx(1e9 / (2 * call_flops(costs.large_spec, N, N, 333)))
    for made, steps in (
        (plan(stages=(3, 9, 16), refresh_every=0), 10),  # the last large step draws the first mask
        (plan("ras", 12, stages=(4, 8, 0), refresh_every=2), 8),  # a full call in between draws the next one
        (plan("srdiffusion", stages=(14, 0, 14)), 0),
        (plan("large"), 0),
    ):
        assert made.cost(glue) - made.cost(costs) == pytest.approx(steps * glue.glue()), made.stage_lengths


@pytest.mark.parametrize("name", list(SD35))
@pytest.mark.parametrize("share", [1.0, 0.3, 0.1])
def test_the_cost_model_counts_what_torchs_flop_counter_counts(name: str, share: float) -> None:
    """On the real module classes at SD3.5's true shapes, full and masked, without memory (meta tensors)."""
    config = COMMON | SD35[name] | {"caption_projection_dim": SD35[name]["num_attention_heads"] * 64}
    n, text = 4096, 333
    m = round(share * n)
    with torch.device("meta"), torch.no_grad():
        model = SD3Transformer2DModel(**config)
        module = TokenTransformer(model, cached=True)
        heads, layers = config["num_attention_heads"], config["num_layers"]
        past = {
            cache: torch.empty(1, heads, n + (text if i < 2 * layers else 0), 64) for i, cache in enumerate(module.cache_names)
        }
        counter = FlopCounterMode(display=False)
        with counter:
            module(
                torch.empty(1, m, 64), torch.zeros(1, m, dtype=torch.long), torch.empty(1), torch.empty(1, text, 4096),
                torch.empty(1, 2048), **past,
            )  # fmt: skip
    spec = TransformerSpec.from_config(config)
    # The reference module has text queries in the last block too, where the graph leaves them out: projection, attention.
    extra = 2 * spec.width**2 * text + 4 * spec.width * text * (n + text)
    assert counter.get_total_flops() - extra == pytest.approx(call_flops(spec, m, n, text), rel=1e-3)


@pytest.mark.parametrize("name", list(SD35))
def test_the_cost_model_counts_the_weights_that_a_call_reads(name: str) -> None:
    config = COMMON | SD35[name] | {"caption_projection_dim": SD35[name]["num_attention_heads"] * 64}
    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    spec = TransformerSpec.from_config(config)
    read = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d))
    read -= spec.width**2  # the last block's text queries, which the graph leaves out
    assert call_weights(spec) == read


def test_reading_weights_weighs_most_in_short_calls_and_is_shared_by_a_batch() -> None:
    flops = sd35_costs(256)
    one, four = (dataclasses.replace(flops, rows=rows, flops_per_weight=48.0) for rows in (1, 4))
    for tokens in (32, 128):
        assert flops.large(tokens) < four.large(tokens) < one.large(tokens) < 1
    assert one.large(32) / flops.large(32) > one.large(128) / flops.large(128)
    assert one.large(256) == four.large(256) == 1
    assert dataclasses.replace(one, flops_per_weight=1e12).large(32) == pytest.approx(1), "all that a call does is read"
