"""The benchmark's programs in both of their forms, and the examples, on real servers."""

import runpy
import sys
import warnings

import pytest
import requests
import sglang as sgl

from benchmarks.programs import PROGRAMS, Mechanisms, Settings, paper_setting, self_consistency
from benchmarks.programs.states import fork

TOY = Settings(max_tokens=6, examples=(("1 + 1?", "1 + 1 = 2\nAnswer: 2"),))
QUESTION = "Facts: Ada lives in Oslo. Ben keeps a cat.\nWhere does Ada live?"
#: How the conditions of benchmarks.throughput run a program: with RKSC or not, form, mechanisms.
WAYS = {
    "rksc": (True, "solve", {"mechanisms": Mechanisms()}),
    "best": (False, "solve_plain", {}),
    "stock": (False, "solve", {"mechanisms": Mechanisms("exact", "off", None, False)}),
}


def backend_at(url):
    return sgl.RuntimeEndpoint(url, chat_template_name="chatml")


@pytest.mark.filterwarnings("ignore:.*runs SGLang without RKSC")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", [*PROGRAMS.values(), paper_setting.PROGRAM], ids=lambda p: p[0])
def test_every_program_runs(program, way, rksc_tiny, stock_tiny):
    with_rksc, form, kwargs = WAYS[way]
    backend = backend_at(rksc_tiny if with_rksc else stock_tiny)
    outcome = getattr(program, form).run(QUESTION, TOY, backend=backend, **kwargs).ret_value
    assert outcome.text in outcome.candidates
    assert len(outcome.candidates) >= 2
    assert outcome.answer == TOY.extract(outcome.text)
    assert sum(outcome.votes.values()) <= len(outcome.candidates)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_example_runs(name, rksc_tiny, monkeypatch, capsys):
    command = [name, "--url", rksc_tiny, "--question", "What is 3 + 4?", "--max-tokens", "4"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_module(f"examples.{name}", run_name="__main__")
    printed = capsys.readouterr().out
    assert "--- candidate 1\n" in printed
    assert "--- votes: {" in printed


def test_an_example_needs_no_rksc(stock_tiny, monkeypatch, capsys):
    command = ["debate", "--plain", "--url", stock_tiny, "--max-tokens", "4"]
    monkeypatch.setattr(sys, "argv", command)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing asks whether RKSC is there
        runpy.run_module("examples.debate", run_name="__main__")
    assert "--- candidate 2\n" in capsys.readouterr().out


def test_generations_have_the_lengths_that_were_given(stock_tiny):
    settings = Settings(lengths=(3, 40, 17), temperature=2.0)

    @sgl.function
    def program(s):
        s += sgl.user("Hello")
        branches = s.fork(12)
        branches += lambda i: sgl.assistant(settings.generate("x", i))
        return [branch.get_meta_info("x")["completion_tokens"] for branch in branches.states]

    assert program.run(backend=backend_at(stock_tiny)).ret_value == [3, 40, 17] * 4


def test_plain_branches_find_their_prefix_computed(stock_tiny):
    @sgl.function
    def program(s):
        s += sgl.user("A prompt that no other test has: seven geese, twelve swans and a heron.")
        branches = fork(s, 4)
        for branch in branches:
            branch += sgl.assistant(sgl.gen("x", max_tokens=2))
        return [branch.get_meta_info("x") for branch in branches]

    for meta in program.run(backend=backend_at(stock_tiny)).ret_value:
        assert meta["cached_tokens"] >= meta["prompt_tokens"] - 5  # the assistant's opening


def test_samples_that_cannot_matter_are_stopped_and_the_others_are_not(rksc_tiny):
    def aborted():
        status = requests.get(rksc_tiny + "/rksc/status", timeout=60).json()
        return status["frontend_counters"]["aborted_branches"]

    agreeing = Settings(lengths=(2, 2, 2, 120), extract=lambda text: "the same")
    run = self_consistency.solve.run
    before = aborted()
    outcome = run(QUESTION, agreeing, branches=4, backend=backend_at(rksc_tiny)).ret_value
    assert aborted() == before + 1
    assert outcome.votes == {"the same": 3}
    assert outcome.answer == "the same"
    without = Mechanisms(stop=False)
    outcome = run(QUESTION, agreeing, without, branches=4, backend=backend_at(rksc_tiny)).ret_value
    assert aborted() == before + 1
    assert outcome.votes == {"the same": 3}
