"""Problems, their splits and their slips; the conversations that are made of them."""

import random
from collections import Counter
from itertools import islice, pairwise

import pytest

from rksc_sglang.models.dialogues import NO, YES, graded, make_dialogue, quote, thought_verdict
from rksc_sglang.models.problems import (
    DIFFICULTIES,
    FAMILIES,
    check,
    extract_answer,
    follow_up,
    problems,
    split_of,
)


def draw(count, split="train", seed=0, **kinds):
    return list(islice(problems(split, seed, **kinds), count))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slip_gives_another_answer_by_steps_of_its_own(family):
    rng = random.Random(0)
    for problem in draw(60, families=(family,)):
        assert check(problem, problem.solution)
        wrong = problem.slip(rng)
        assert not check(problem, wrong.text)
        assert len(wrong.steps) == len(problem.work.steps)
        assert any(step not in problem.work.steps for step in wrong.steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_another_order_give_the_same_answer(family):
    orders = set()
    for problem in draw(60, families=(family,)):
        first, *others = problem.works()
        assert first == problem.work
        for other in others:
            assert other.answer == problem.answer
            assert len(other.steps) == len(problem.work.steps)
        orders.add(len({first, *others}))
    assert max(orders) == {"facts": 1, "chain": 5, "order": 2, "legs": 5}[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_slip_leaves_the_solution(family):
    rng = random.Random(0)
    for problem in draw(60, families=(family,)):
        right, wrong = problem.slip_beside(rng)
        assert right.answer == problem.answer != wrong.answer
        assert right.steps != wrong.steps


def test_chains_are_worked_out_right():
    for problem in draw(60, families=("chain",)):
        for step in problem.work.steps:
            left, _, right = step.partition(" = ")
            assert eval(left) == int(right)
        assert int(problem.answer) == eval(problem.data)


def test_reasoning_gym_agrees_with_the_answers():
    import reasoning_gym

    scorer = reasoning_gym.create_dataset("leg_counting", size=1, seed=0)
    for problem in draw(40, families=("legs",)):
        entry = {"answer": problem.answer, "metadata": {"animals": dict(problem.data)}}
        assert scorer.score_answer(problem.answer, entry) == 1.0


def stated(step, question):
    name, _, fact = step.removeprefix("- ").removesuffix(".").partition(" ")
    sentences = question.removeprefix("Facts: ").split(". ")
    return fact in next(text for text in sentences if text.startswith(f"{name} "))


def test_facts_are_found_in_the_sheet():
    for problem in draw(40, families=("facts",)):
        assert all(stated(step, problem.question) for step in problem.work.steps)
        assert 80 <= len(problem.question.split()) <= 160  # 100 to 200 tokens


def test_another_question_about_the_same_facts():
    rng = random.Random(0)
    for problem in draw(20, families=("facts",)):
        more = follow_up(problem, rng)
        assert all(stated(step, problem.question) for step in more.work.steps)
    assert follow_up(draw(1, families=("chain",))[0], rng) is None


def test_harder_problems_take_more():
    length = Counter()
    for problem in draw(300):
        length[problem.difficulty] += len(problem.question) + len(problem.solution)
    assert sorted(length, key=length.get) == list(DIFFICULTIES)


def test_splits_are_disjoint_and_repeatable():
    splits = {split: draw(300, split) for split in ("train", "calibration", "test")}
    for split, drawn in splits.items():
        assert all(split_of(problem.question) == split for problem in drawn)
        assert drawn == draw(300, split)
        assert drawn != draw(300, split, seed=1)


def test_what_there_is_not_is_refused():
    with pytest.raises(ValueError, match="families"):
        next(problems("train", 0, families=("geometry",)))
    with pytest.raises(ValueError, match="difficulties"):
        next(problems("train", 0, difficulties=(6,)))
    assert DIFFICULTIES == (1, 2, 3, 4, 5)


def test_the_last_answer_counts():
    assert extract_answer("Answer: 3\nno, wait\nAnswer: 4 \n") == "4"
    assert extract_answer("four") is None


def test_nobody_learns_from_a_wrong_solution():
    rng = random.Random(0)
    verdicts = Counter()
    for problem in draw(600):
        turns = make_dialogue(problem, rng)
        assert turns[-1].role == "assistant"
        assert turns[-1].learn
        for turn in turns:
            if turn.role == "assistant" and turn.text in (YES, NO):
                verdicts[turn.text] += 1
            elif turn.learn and "Verdict:" not in turn.text and problem.family != "facts":
                assert check(problem, turn.text)
    assert 0.4 < verdicts[YES] / verdicts.total() < 0.6


def test_a_solution_is_graded_up_to_its_first_wrong_line():
    rng = random.Random(3)
    for problem in draw(150):
        right, wrong = problem.slip_beside(rng)
        lines = [f"{line} {YES}" for line in right.text.splitlines()]
        assert graded(problem, right.text) == "\n".join([*lines, f"Verdict: {YES}"])
        *good, bad, verdict = graded(problem, wrong.text).splitlines()
        assert verdict == f"Verdict: {NO}"
        assert good == lines[: len(good)]
        assert bad == f"{wrong.text.splitlines()[len(good)]} {NO}"
        assert bad.removesuffix(f" {NO}") != lines[len(good)].removesuffix(f" {YES}")


def test_verdicts_are_true():
    rng = random.Random(1)
    seen = set()
    for problem in draw(300):
        wrong = problem.slip(rng).text
        assert thought_verdict(problem, wrong).endswith(f"Verdict: {NO}")
        assert thought_verdict(problem, problem.solution).endswith(f"Verdict: {YES}")
        turns = make_dialogue(problem, rng, lambda problem: [])
        for before, turn in pairwise(turns):
            if turn.text in (YES, NO) and quote(problem, problem.solution) in before.text:
                seen.add(turn.text)
                assert turn.text == YES
    assert seen


def test_the_models_own_attempts_are_judged():
    rng = random.Random(2)
    right = wrong = 0
    for problem in draw(200):
        own = [f"Hm.\n{problem.solution}", "Hm.\nAnswer: nobody knows"]
        for turn in make_dialogue(problem, rng, lambda problem, own=own: own):
            right += own[0] in turn.text
            wrong += own[1] in turn.text
            assert not (turn.learn and own[1] in turn.text)
    assert right > 50
    assert wrong > 50
