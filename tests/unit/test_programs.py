"""The programs' decisions, against a backend whose answers are known."""

import math
import random
import re
import threading

import pytest
import sglang as sgl
from hypothesis import given
from hypothesis import strategies as st
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import get_chat_template

from benchmarks.programs import (
    PROGRAMS,
    Settings,
    beam_search,
    best_of_n,
    debate,
    document_qa,
    prompts,
    self_consistency,
    tree_of_thought,
)
from benchmarks.programs.ballot import Ballot
from benchmarks.programs.states import judge, probability_of_yes
from rksc_sglang.models import dialogues
from rksc_sglang.models.problems import problems


class Scripted(BaseBackend):
    """Generates what ``reply(text, tokens)`` says, and verdicts of the chance ``yes(text)``."""

    def __init__(self, reply, yes=lambda text: 0.5):
        super().__init__()
        self.chat_template = get_chat_template("chatml")
        self.reply, self.yes = reply, yes
        self.asked = []

    def get_chat_template(self):
        return self.chat_template

    def generate(self, s, sampling_params):
        self.asked.append(s.text_)
        if sampling_params.temperature > 0:
            return self.reply(s.text_, sampling_params.max_new_tokens), {}
        chance = self.yes(s.text_)
        top = [(logprob(chance), 1, "YES"), (logprob(1 - chance), 2, "NO")]
        return "YES" if chance > 0.5 else "NO", {"output_top_logprobs": [top]}


def logprob(chance):
    return math.log(max(chance, 1e-9))


BOTH_FORMS = pytest.mark.parametrize("form", ["solve", "solve_plain"])


def run(program, form, backend, settings, **kwargs):
    return getattr(program, form).run("Why?", settings, backend=backend, **kwargs).ret_value


# Votes


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9), st.randoms())
def test_a_decided_ballot_has_its_final_winner(answers, rng):
    order = rng.sample(range(len(answers)), len(answers))
    ballot, decided = Ballot(len(answers)), None
    for voter in order:
        ballot.cast(voter, answers[voter])
        if decided is None and ballot.decided:
            decided = answers[ballot.winner]
    assert not ballot.missing
    if decided is not None:
        assert answers[ballot.winner] == decided
    assert ballot.winner == Ballot.of(answers).winner


def test_a_ballot_is_decided_as_soon_as_nobody_can_catch_up():
    ballot = Ballot(5)
    for voter, answer in enumerate(["a", "a"]):
        ballot.cast(voter, answer)
    assert not ballot.decided  # three votes are out
    ballot.cast(4, None)
    assert not ballot.decided  # two others could draw level
    ballot.cast(2, "b")
    assert not ballot.decided
    ballot.cast(3, "a")
    assert ballot.decided
    assert ballot.winner == 0


def test_of_equally_frequent_answers_the_first_voters_wins():
    assert Ballot.of(["b", "a", "a", "b"]).winner == 0
    assert Ballot.of([None, None]).winner is None


# Programs


def test_best_of_n_takes_the_most_probable_solution():
    backend = Scripted(
        lambda text, tokens: f"Answer: {tokens}",
        lambda text: 0.9 if "Answer: 3<|im_end|>" in text else 0.2,
    )
    settings = Settings(lengths=(1, 2, 3, 4))
    outcome = run(best_of_n, "solve_plain", backend, settings, branches=4)
    assert outcome.answer == "3"
    assert outcome.candidates == [f"Answer: {n}" for n in (1, 2, 3, 4)]
    asked = [text for text in backend.asked if "Answer:" in text]
    assert len(asked) == 4
    for text in asked:  # a further turn of the branch, in the verifier's words
        assert text.endswith(
            f"<|im_start|>user\n{prompts.VERIFIER} {prompts.ASK}<|im_end|>\n<|im_start|>assistant\n"
        )


@BOTH_FORMS
def test_self_consistency_answers_before_a_sample_that_cannot_matter(form):
    slow = threading.Event()

    def reply(text, tokens):
        if tokens == 99:
            assert slow.wait(60)
        return "Answer: 5" if tokens == 1 else "Answer: 6"

    settings = Settings(lengths=(1, 1, 2, 1, 99))
    outcome = run(self_consistency, form, Scripted(reply), settings, branches=5)
    slow.set()
    assert outcome.answer == "5"
    assert outcome.votes["5"] == 3
    assert len(outcome.candidates) < 5


def test_a_tree_of_thought_follows_its_best_thoughts():
    def yes(text):
        steps = text.rsplit("<|im_start|>user", 1)[0]
        return sum(map(int, re.findall(r"step (\d)", steps))) / 20

    backend = Scripted(lambda text, tokens: f"step {tokens}", yes)
    settings = Settings(lengths=(1, 2, 3, 4))
    outcome = run(tree_of_thought, "solve_plain", backend, settings, depth=3)
    assert outcome.text == "step 4\nstep 4\nstep 4"
    assert len(outcome.candidates) == 2
    thoughts = [text for text in backend.asked if not text.endswith("assistant\n")]
    assert len([t for t in thoughts if t.endswith("\n")]) == 8 + 8  # of two nodes, four each


def test_a_search_ends_with_the_answer():
    backend = Scripted(lambda text, tokens: "Answer: 7")
    outcome = run(tree_of_thought, "solve_plain", backend, Settings(), depth=3, breadth=2)
    assert outcome.answer == "7"
    assert len(backend.asked) == 2 + 2  # one level, and its verdicts


def test_a_beam_is_as_good_as_all_of_its_steps():
    # The second step of the beam that began better is always doubtful.
    chances = {"step 1": 0.5, "step 2": 0.9, "step 1\nstep 3": 0.9, "step 2\nstep 3": 0.3}

    def yes(text):
        path = re.search(r"assistant\n(.*?)<\|im_end\|>", text, re.DOTALL)[1]
        step = re.search(r"Step: (.*)\nIs this step right\?", text)[1]
        assert path.endswith(step)
        return chances[path]

    def reply(text, tokens):
        begun = text.rsplit("assistant\n", 1)[1]
        return "step 3" if begun else f"step {tokens}"

    settings = Settings(lengths=(1, 2))
    outcome = run(beam_search, "solve_plain", Scripted(reply, yes), settings, depth=2, expansions=2)
    assert outcome.text == "step 1\nstep 3"


@BOTH_FORMS
def test_agents_read_what_all_have_said_and_vote(form):
    def reply(text, tokens):
        number = next(i for i, who in enumerate(debate.AGENTS) if who in text)
        return f"Answer: {'ab'[number > 0]}{text.count('says:')}"

    backend = Scripted(reply)
    outcome = run(debate, form, backend, Settings(), rounds=2)
    assert outcome.answer == "b3"
    assert outcome.votes == {"a3": 1, "b3": 2}
    assert len(backend.asked) == 6
    second = "Agent 1 says:\nAnswer: a0\n\nAgent 2 says:\nAnswer: b0\n\nAgent 3 says:\nAnswer: b0"
    assert (
        sum(f"Why?\n\n{second}\n\nGive your own solution." in text for text in backend.asked) == 3
    )


def reader(answers, accepted):
    """Replies of personas that give ``answers``, and of a verifier that accepts some of them."""

    def reply(text, tokens):
        if prompts.THINK not in text:
            number = next(i for i, who in enumerate(prompts.PERSONAS) if who in text)
            return f"Answer: {answers[number]}"
        proposed = re.findall(r"Answer: (\w)", text)[-1]
        return f"Proposed: {proposed}\nVerdict: {'YES' if proposed in accepted else 'NO'}"

    return Scripted(reply)


@BOTH_FORMS
@pytest.mark.parametrize(("accepted", "answer"), [("y", "y"), ("xy", "x"), ("", "x")])
def test_accepted_answers_are_voted_on(form, accepted, answer):
    outcome = run(document_qa, form, reader("xxxy", accepted), Settings())
    assert outcome.answer == answer
    assert outcome.votes == {"x": 3, "y": 1}


@BOTH_FORMS
def test_readers_who_agree_need_no_verifier(form):
    backend = reader("zzzz", "")
    assert run(document_qa, form, backend, Settings()).answer == "z"
    assert len(backend.asked) == 4
    backend = reader("zzzz", "")  # unless the work is to be the same in every run
    run(document_qa, form, backend, Settings(lengths=(4,)))
    assert len(backend.asked) == 8


def test_a_verifier_of_its_own_prompt_is_quoted_the_problem():
    backend = reader("xxxy", "y")
    run(document_qa, "solve", backend, Settings())
    asked = [text for text in backend.asked if prompts.THINK in text]
    assert len(asked) == 4
    for text in asked:
        assert text.startswith(f"<|im_start|>system\n{prompts.VERIFIER}<|im_end|>\n")
        assert "Problem:\nWhy?\n\nProposed solution:\nAnswer: " in text


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_what_fails_is_raised():
    def reply(text, tokens):
        raise ConnectionError("the server is gone")

    for program in PROGRAMS.values():
        with pytest.raises(KeyError):
            run(program, "solve_plain", Scripted(reply), Settings())


# What is asked and sampled


def test_given_lengths_take_turns_and_nothing_else_ends_a_generation():
    params = Settings(lengths=(5, 9)).generate("x", 3, "\n").sampling_params
    assert (params.max_new_tokens, params.min_new_tokens, params.ignore_eos) == (9, 9, True)
    assert params.stop is None
    params = Settings(max_tokens=7).generate("x", 3, "\n").sampling_params
    assert (params.max_new_tokens, params.min_new_tokens, params.stop) == (7, None, "\n")


@pytest.mark.parametrize(
    ("top", "chance"),
    [
        ([(0.75, "YES"), (0.25, "NO")], 0.75),
        ([(0.3, "Y"), (0.3, " yes"), (0.2, "No")], 0.75),
        ([(0.9, "Maybe"), (0.1, "\n")], 0.5),
    ],
)
def test_yes_is_told_from_no_however_it_is_spelled(top, chance):
    meta = {"output_top_logprobs": [[(logprob(p), 0, text) for p, text in top]]}
    assert probability_of_yes(meta) == pytest.approx(chance)


def test_the_words_are_those_that_the_reasoner_is_trained_on():
    rng = random.Random(0)
    steps = debates = 0
    for problem, _ in zip(problems("train", 0), range(400)):
        wrong = problem.slip(rng).text
        assert prompts.quote(problem.question, wrong) == dialogues.quote(problem, wrong)
        assert prompts.is_accepted(dialogues.thought_verdict(problem, problem.solution))
        assert not prompts.is_accepted(dialogues.thought_verdict(problem, wrong))
        for turn in dialogues.make_dialogue(problem, rng):
            step = re.search(r"Step: (.*)\n", turn.text)
            if step:
                steps += 1
                assert turn.text.endswith(prompts.ask_step(step[1]))
            said = re.split(r"\n\nAgent \d says:\n", turn.text.partition("\n\nGive your")[0])[1:]
            if said:
                debates += 1
                assert turn.text == prompts.quote_agents(problem.question, said)
    assert steps > 10
    assert debates > 10
    assert prompts.ASK in dialogues._ASK
    assert prompts.THINK in dialogues._THINK
    assert {prompts.SOLVER, *prompts.PERSONAS} <= {
        f"{who} {how} {end}"
        for who in dialogues._WHO
        for how in dialogues._HOW
        for end in dialogues._END
    }
    assert prompts.VERIFIER in {f"{a} {b}" for a in dialogues._VERIFIERS for b in dialogues._HOW}


def test_verified_states_stay_as_they_are():
    @sgl.function
    def program(s):
        s += prompts.opening("Why?", [("2+2?", "Answer: 4")]) + sgl.gen("x")
        return s.text(), judge([s]), s.text()

    before, scores, after = program.run(backend=Scripted(lambda *_: "so", lambda _: 0.8)).ret_value
    assert scores == [pytest.approx(0.8)]
    assert before == after
    assert before.endswith(
        "<|im_start|>assistant\nAnswer: 4<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nso"
    )
