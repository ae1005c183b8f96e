"""rksc.fork, rksc.verify and rksc.gen_verdict in SGLang programs, on a real server."""

import time
import warnings

import pytest
import requests
import sglang as sgl

import rksc_sglang as rksc
from rksc_sglang.cgee.skip_gate import PaperGate, gather


@pytest.fixture(scope="module")
def backend(server):
    return sgl.RuntimeEndpoint(server, chat_template_name="chatml")


@sgl.function
def solve(s, question):
    s += sgl.system("You answer questions in a few words.")
    s += sgl.user(question)
    branches = rksc.fork(s, 3)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=12, temperature=0.7))
    verdict = rksc.verify(branches, "answer")
    s += sgl.assistant(branches[verdict.winner]["answer"])
    s += rksc.gen_verdict("ok", "Is that right? Reply with Yes or No.", labels=("Yes", "No"))
    branches.join()
    return branches, verdict


def check(state):
    branches, verdict = state.ret_value
    assert verdict.labels == ("Yes", "No")  # "YES" is two tokens of this model
    assert verdict.scores[verdict.winner] == max(verdict.scores)
    assert all(0 <= score <= 1 for score in verdict.scores)
    assert all(0 < confidence <= 1 for confidence in verdict.confidences)
    assert verdict.skipped == {}
    assert 0 < verdict.computed_tokens < verdict.prompt_tokens
    assert state["answer"][verdict.winner] in state.text()
    assert "Is that right" not in state.text()
    assert state["ok"] in ("Yes", "No")
    meta = state.get_meta_info("ok")
    assert sum(meta["probabilities"]) == pytest.approx(1)
    assert meta["labels"][meta["probabilities"].index(max(meta["probabilities"]))] == state["ok"]
    for branch in range(3):
        meta = branches[branch].get_meta_info("answer")
        info = meta["rksc"]
        assert info["share"] == "exact"
        assert info["exact_tokens"] == meta["cached_tokens"]
        assert info["exact_tokens"] + info["recomputed_tokens"] == meta["prompt_tokens"]


def test_a_program_forks_and_verifies(backend):
    check(solve.run(question="What is the capital of France?", backend=backend))


def test_run_batch(backend):
    questions = [{"question": q} for q in ("Name a color.", "Name a fruit.", "What is 1+1?")]
    for state in solve.run_batch(questions, num_threads=3, backend=backend):
        check(state)


def test_streaming(backend):
    state = solve.run(question="Name an animal.", stream=True, backend=backend)
    text = "".join(state.text_iter())
    assert text.startswith("<|im_start|>system\nYou answer")
    check(state)


def test_tracing_and_precaching(backend):
    trace = solve.trace(backend=backend)
    nodes = [repr(node) for child in trace.child_states for node in child.flatten_nodes()]
    assert sum(node.startswith("Verdict('answer_verdict'") for node in nodes) == 3
    assert any(repr(node).startswith("Verdict('ok'") for node in trace.flatten_nodes())


def test_branches_are_sent_together_and_no_prefix_before_them(server):
    class Endpoint(sgl.RuntimeEndpoint):
        def commit_lazy_operations(self, s):
            raise AssertionError("the prefix was sent by itself")

    @sgl.function
    def program(s):
        s += "Numbers: one, two, three"
        outer = rksc.fork(s, 2, confidence=False)
        outer += sgl.gen("first", max_tokens=2)
        groups = rksc.fork_all(outer.states, 3, confidence=False)
        for group in groups:
            group += sgl.gen("second", max_tokens=2)
        for group in groups:
            group.join()
        assert all(len(state["second"]) == 3 for state in outer)
        outer.join()

    def groups():
        status = requests.get(server + "/rksc/status", timeout=60).json()
        counters = status["ranks"][0]["counters"]
        return counters["gathered_groups"] + counters["scattered_groups"]

    before = groups()
    program.run(backend=Endpoint(server)).sync()
    assert groups() == before + 2


def test_verification_costs_its_own_few_tokens(backend):
    """Behind a branch of a hundred tokens and more, only the question is computed."""

    @sgl.function
    def program(s):
        s += "Facts about the sea: " + "the tide rises and falls twice a day, " * 12
        branches = rksc.fork(s, 4)
        branches += sgl.gen("x", max_tokens=8, ignore_eos=True)
        return rksc.verify(branches, "x", question="True?", labels=("Yes", "No"))

    verdict = program.run(backend=backend).ret_value
    assert verdict.prompt_tokens > 4 * 100
    assert verdict.computed_tokens <= 4 * 16


def test_a_verdict_equals_the_models_own_probabilities(backend):
    """Against transformers' view through the server's plain logprobs of the same prompt."""
    import math

    from rksc_sglang.lang.server import server_of

    @sgl.function
    def program(s):
        s += "Q: Is water wet?\n"
        s += rksc.gen_verdict("v", "Well?", labels=("Yes", "No"))

    meta = program.run(backend=backend).get_meta_info("v")
    server = server_of(backend)
    prompt = "Q: Is water wet?\n\nWell?\nAnswer:"
    answer = server.post(
        "/generate",
        {
            "text": [prompt + " Yes", prompt + " No"],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
    )
    logprobs = [one["meta_info"]["input_token_logprobs"][-1][0] for one in answer]
    assert meta["logprobs"] == pytest.approx(logprobs, abs=1e-4)
    weights = [math.exp(logprob) for logprob in logprobs]
    assert meta["probabilities"] == pytest.approx(
        [weight / sum(weights) for weight in weights], abs=1e-4
    )


def test_each_branch_may_be_asked_a_question_of_its_own(backend):
    labels = ("Yes", "No")

    def ask(branch):
        return f"Does {branch['x']!r} follow?"

    @sgl.function
    def program(s):
        s += "The tide rises and "
        branches = rksc.fork(s, 2, hints=["falls", "sings"])
        branches += sgl.gen("x", max_tokens=2, ignore_eos=True, temperature=0)
        verdict = rksc.verify(branches, "x", question=ask, labels=labels)
        for branch in branches:
            branch += rksc.gen_verdict("v", ask(branch), labels=labels)
        alone = [branch.get_meta_info("v")["probabilities"][0] for branch in branches]
        with pytest.raises(rksc.VerifyError, match="question: expected some text, got ' '"):
            rksc.verify(branches, "x", question=lambda branch: " ", labels=labels)
        branches.join()
        return verdict.scores, alone

    scores, alone = program.run(backend=backend).ret_value
    assert scores == pytest.approx(alone, abs=1e-4)
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (("YES", "NO"), "'YES': it is 2 tokens"),
        (("Yes", "Absolutely not"), "'Absolutely not': it is 2 tokens"),
        (("Yes", " Yes"), "Yes"),
    ],
)
def test_labels_that_do_not_fit_are_an_error_naming_them(backend, labels, named):
    @sgl.function
    def program(s):
        s += "2 + 2 = "
        branches = rksc.fork(s, 2)
        branches += sgl.gen("x", max_tokens=2)
        rksc.verify(branches, "x", labels=labels)

    with pytest.raises(rksc.VerifyError, match=named):
        program.run(backend=backend)


def test_stop_ends_what_branches_generate(backend):
    @sgl.function
    def program(s):
        s += "Once upon a time"
        branches = rksc.fork(s, 3)
        branches += sgl.gen("x", max_tokens=120, ignore_eos=True)
        aborted = []
        deadline = time.monotonic() + 60
        while not aborted and time.monotonic() < deadline:
            aborted = branches.stop([1])
        verdict = rksc.verify(branches, "x")
        branches.join()
        return branches, aborted, verdict

    branches, aborted, verdict = program.run(backend=backend).ret_value
    assert aborted == [1]
    finish = [branch.get_meta_info("x")["finish_reason"]["type"] for branch in branches]
    # The others may sample the chat template's own stop string.
    assert [reason == "abort" for reason in finish] == [False, True, False]
    assert verdict.skipped == {1: "stopped"}
    assert verdict.winner in (0, 2)


def test_against_plain_sglang_all_works_and_it_says_so_once(stock_tiny):
    backend = sgl.RuntimeEndpoint(stock_tiny, chat_template_name="chatml")

    @sgl.function
    def program(s):
        s += sgl.user("Hello")
        branches = rksc.fork(s, 2, share="similar")
        branches += sgl.assistant(sgl.gen("x", max_tokens=4))
        verdict = rksc.verify(branches, "x")
        branches.stop([1 - verdict.winner])
        branches.join()
        return verdict

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            verdict = program.run(backend=backend).ret_value
            assert verdict.winner in (0, 1)
            assert verdict.skipped == {}
    said = [w for w in caught if "without RKSC" in str(w.message)]
    assert len(said) == 1


def test_the_papers_gate_skips_what_its_rules_say(backend):
    @sgl.function
    def program(s, question):
        s += sgl.system("You answer questions in a few words.")
        s += sgl.user(question)
        branches = rksc.fork(s, 3)
        branches += sgl.assistant(sgl.gen("answer", max_tokens=12, temperature=0.7))
        in_full = rksc.verify(branches, "answer")
        return branches, in_full, rksc.verify(branches, "answer", skip="paper")

    skipped = 0
    for question in ("What is the capital of France?", "Name a color.", "Name a river.", "1+1?"):
        branches, in_full, verdict = program.run(question, backend=backend).ret_value
        answers = [branch["answer"].strip() for branch in branches]
        expected = PaperGate().winner(gather(answers, in_full.confidences))
        if expected is None:
            assert verdict.gate is None
            # Answers that are the same tie but for rounding.
            best = in_full.scores[in_full.winner]
            assert verdict.scores[verdict.winner] == pytest.approx(best, abs=1e-4)
            continue
        skipped += 1
        assert (verdict.winner, verdict.gate) == (expected, "the paper gate")
        assert verdict.prompt_tokens == 0
        assert "won without verification" in verdict.explain()
    print(f"{skipped} of 4 groups were skipped")


def test_a_gate_that_is_not_there_is_an_error(backend):
    @sgl.function
    def program(s):
        s += "One, two,"
        branches = rksc.fork(s, 2)
        branches += sgl.gen("answer", max_tokens=2)
        return branches

    branches = program.run(backend=backend).ret_value
    with pytest.raises(rksc.VerifyError, match="no calibrated gate"):
        rksc.verify(branches, "answer", skip="calibrated")
    with pytest.raises(rksc.VerifyError, match="skip: expected one of"):
        rksc.verify(branches, "answer", skip="always")
    with pytest.raises(rksc.VerifyError, match="exit: expected one of"):
        rksc.verify(branches, "answer", exit="never")
