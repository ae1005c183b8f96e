"""What is computed, taken over, and when, for a prompt that is partly cached elsewhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rksc_sglang.asks.content_index import Run
from rksc_sglang.asks.cost import CostModel
from rksc_sglang.asks.plan import Compute, Planner, Take


def run(start, length, donor_start=0):
    return Run(start, donor_start, np.arange(length))


def test_context_and_head_are_computed_before_a_run_is_taken():
    planner = Planner(head=4, tail=1, min_tokens=8, page_size=1)
    runs = [run(20, 100)]
    assert planner.next_step(runs, ready=0, limit=150) == Compute(24, 96)
    assert planner.next_step(runs, ready=24, limit=150) == Take([(runs[0], 120)])
    assert planner.next_step(runs, ready=120, limit=150) is None


def test_a_head_that_is_ready_already_is_not_computed_again():
    planner = Planner(head=4, tail=1, min_tokens=8, page_size=1)
    assert planner.search_from(24) == 20
    assert isinstance(planner.next_step([run(20, 50)], ready=24, limit=100), Take)


def test_pages_are_taken_whole():
    planner = Planner(head=4, tail=1, min_tokens=8, page_size=16)
    runs = [run(20, 100)]
    assert planner.next_step(runs, ready=16, limit=150) == Compute(32, 80)
    assert planner.next_step(runs, ready=32, limit=150) == Take([(runs[0], 112)])


def test_the_last_token_of_a_prompt_is_left_to_compute():
    planner = Planner(head=4, tail=1, min_tokens=8, page_size=1)
    step = planner.next_step([run(0, 100)], ready=4, limit=99)
    assert [stop for _, stop in step.options] == [99]


def test_the_end_of_a_prompt_is_always_computed():
    planner = Planner(head=4, tail=10, min_tokens=8, page_size=1)
    assert planner.limit(100) == 90
    assert planner.limit(6) == 0


def test_what_is_too_short_is_computed():
    planner = Planner(head=4, tail=1, min_tokens=8, page_size=1)
    assert planner.next_step([run(20, 11)], ready=0, limit=100) is None
    assert planner.next_step([run(20, 12)], ready=0, limit=100) == Compute(24, 8)


def test_donors_that_hold_nearly_as_much_may_be_chosen_and_others_not():
    planner = Planner(head=4, tail=1, min_tokens=8, page_size=1)
    long, close, short = run(0, 100), run(0, 95), run(0, 40)
    step = planner.next_step([short, close, long], ready=4, limit=200)
    assert step.options == [(long, 100), (close, 95)]


@st.composite
def cases(draw):
    planner = Planner(
        head=draw(st.integers(1, 6)),
        tail=1,
        min_tokens=draw(st.integers(1, 12)),
        page_size=draw(st.sampled_from([1, 4])),
    )
    runs = [
        run(draw(st.integers(0, 60)), draw(st.integers(1, 40)))
        for _ in range(draw(st.integers(0, 5)))
    ]
    return planner, runs, draw(st.integers(1, 90))


@given(cases())
def test_following_the_plan_ends_and_keeps_its_promises(case):
    planner, runs, limit = case
    ready = 0
    while True:
        step = planner.next_step([r for r in runs if r.stop > ready], ready, limit)
        if step is None:
            break
        if isinstance(step, Compute):
            assert ready < step.stop <= limit - step.gain
            ready = step.stop
            assert isinstance(planner.next_step(runs, ready, limit), Take)
            continue
        for taken, stop in step.options:
            assert ready >= taken.start + planner.head
            assert stop - ready >= planner.min_tokens
            assert stop <= min(taken.stop, limit)
            assert stop % planner.page_size == 0
        ready = step.options[0][1]
        assert ready % planner.page_size == 0


def test_a_splice_pays_when_it_saves_more_than_its_passes_cost():
    cost = CostModel.fit((16, 0.05 + 16 * 0.002), (256, 0.05 + 256 * 0.002), copy=0.0005)
    assert cost.pass_seconds == pytest.approx(0.05)
    assert cost.saved(100, passes=1) == pytest.approx(100 * 0.0015 - 0.05)
    assert cost.saved(20, passes=1) < 0 < cost.saved(20, passes=0)


def test_a_cost_model_needs_two_lengths():
    with pytest.raises(ValueError, match="16 and 16"):
        CostModel.fit((16, 1.0), (16, 1.0), 0.0)


def test_a_refused_run_is_looked_at_again_behind_longer_heads():
    planner = Planner(head=8, tail=1, min_tokens=16, page_size=1)
    runs = [run(20, 1000)]
    step = planner.next_step(runs, ready=28, limit=5000)
    assert [planner.again(step, 28, refusals) for refusals in (1, 2, 3)] == [52, 124, 1020]


def test_a_refused_run_is_left_when_too_little_of_it_remains():
    planner = Planner(head=8, tail=1, min_tokens=16, page_size=16)
    step = planner.next_step([run(20, 60)], ready=32, limit=5000)
    assert step.options[0][1] == 80
    assert planner.again(step, 32, 1) == 64
    assert planner.again(step, 64, 2) == 80


def test_the_least_that_pays_saves_what_it_costs():
    cost = CostModel(pass_seconds=0.1, token_seconds=0.002, copy_seconds=0.0005)
    tokens = cost.least(passes=2, seconds=0.3)
    assert cost.saved(tokens, passes=2) == pytest.approx(0.3)
    assert CostModel(0.1, 0.001, 0.001).least(passes=1) == float("inf")
