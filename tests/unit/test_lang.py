"""The frontend without a server: arguments, texts, tracing. With one: tests/e2e."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.chat_template import get_chat_template
from sglang.lang.interpreter import ProgramState, StreamExecutor
from sglang.lang.ir import SglSamplingParams

import rksc_sglang as rksc
from rksc_sglang.contract import KEY, RequestContract
from rksc_sglang.lang.executor import contract_of_executor
from rksc_sglang.lang.sampling import BranchSamplingParams
from rksc_sglang.lang.scoring import make_question, question_text


class Canned(BaseBackend):
    """A backend that answers every generation with the same text, and remembers the requests."""

    def __init__(self, template: str = "chatml") -> None:
        super().__init__()
        self.chat_template = get_chat_template(template)
        self.requests: list[dict] = []

    def generate(self, s, sampling_params):
        self.requests.append(sampling_params.to_srt_kwargs())
        return "out", {"output_top_logprobs": [[[-0.5, 1, None]], [[-0.1, 2, None]]]}


@pytest.fixture
def state():
    executor = StreamExecutor(Canned(), {}, SglSamplingParams(), None, stream=False)
    yield ProgramState(executor)
    executor.end()


def test_branches_carry_the_contract_with_every_request(state):
    state += "prefix"
    branches = rksc.fork(state, 3, share="similar")
    branches += sgl.gen("x", max_tokens=4)
    branches.join()
    sent = [request["custom_params"][KEY] for request in state.stream_executor.backend.requests]
    assert sorted(contract["branch"] for contract in sent) == [0, 1, 2]
    assert {contract["group"] for contract in sent} == {branches.group}
    assert {(contract["depth"], contract["share"]) for contract in sent} == {(0, "similar")}
    assert state["x"] == ["out"] * 3


def test_a_nested_fork_is_one_deeper_and_another_group(state):
    outer = rksc.fork(state, 2)
    inner = rksc.fork(outer[1], 2)
    assert (outer.depth, inner.depth) == (0, 1)
    assert outer.group != inner.group
    assert inner.ids == [(inner.group, 0), (inner.group, 1)]
    assert contract_of_executor(inner[1].stream_executor).depth == 1
    inner.join()
    outer.join()


def test_the_garbage_collector_never_waits_for_a_lock(state):
    branch = state.fork(1)[0]
    executor = branch.stream_executor
    branch.itself = branch  # left to the garbage collector
    del branch
    # As when it runs in the middle of a call of the queue, in the thread that makes that call.
    with executor.queue.mutex:
        collector = threading.Thread(target=gc.collect, daemon=True)
        collector.start()
        collector.join(60)
        assert not collector.is_alive()
    executor.worker.join(60)
    assert not executor.worker.is_alive()


def test_states_that_are_garbage_do_not_keep_a_process_from_its_exit():
    code = (
        "from tests.unit.test_lang import *\n"
        "executor = StreamExecutor(Canned(), {}, SglSamplingParams(), None, stream=False)\n"
        "state = ProgramState(executor)\n"
        "state.itself = state\n"
        "del state, executor\n"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=300).returncode == 0


def test_hints_go_one_to_a_branch(state):
    state += "q"
    branches = rksc.fork(state, 2, hints=[" a", " b"])
    assert [branch.text() for branch in branches] == ["q a", "q b"]
    assert len(branches) == 2
    branches.join()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n": 0}, "n: "),
        ({"n": "2"}, "n: "),
        ({"n": True}, "n: "),
        ({"n": 2, "hints": ["a"]}, "hints: "),
        ({"n": 2, "hints": "ab"}, "hints: "),
        ({"n": 2, "share": "some"}, "share: "),
    ],
)
def test_fork_names_a_wrong_argument(state, arguments, named):
    with pytest.raises(ValueError, match=named):
        rksc.fork(state, **arguments)


def test_stop_names_a_branch_that_is_not_there(state):
    branches = rksc.fork(state, 2)
    with pytest.raises(IndexError, match="no branch 2 in a group of 2"):
        branches.stop([2])
    assert branches.stop([1]) == []
    assert branches.stopped == {1}
    branches.join()


def test_confidence_asks_for_one_top_logprob_unless_the_program_has_its_own_way():
    contract = RequestContract(group="g")
    plain = BranchSamplingParams.of_branch(SglSamplingParams(), contract, confidence=True)
    assert (plain.return_logprob, plain.top_logprobs_num) == (True, 1)
    off = BranchSamplingParams.of_branch(SglSamplingParams(), contract, confidence=False)
    assert off.return_logprob is None
    own = BranchSamplingParams.of_branch(
        SglSamplingParams(return_logprob=False), contract, confidence=True
    )
    assert own.return_logprob is False


def test_the_question_is_a_user_turn_in_a_chat(state):
    state += sgl.user("2+2?")
    state += sgl.assistant("4")
    state.sync()
    assert question_text(state.stream_executor, "Right?") == (
        "<|im_start|>user\nRight?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_question_closes_a_turn_that_is_open(state):
    with state.assistant():
        state += "4"
        state.sync()
        assert question_text(state.stream_executor, "Right?") == (
            "<|im_end|>\n<|im_start|>user\nRight?<|im_end|>\n<|im_start|>assistant\n"
        )


def test_the_question_is_a_line_in_plain_text(state):
    state += "2+2=4"
    state.sync()
    assert question_text(state.stream_executor, "Right?") == "\nRight?\nAnswer:"


@pytest.mark.parametrize(
    ("text", "labels", "named"),
    [
        (" ", None, "question: "),
        (3, None, "question: "),
        (None, "YES", "labels: "),
        (None, ["YES"], "labels: "),
        (None, ["YES", "YES"], "labels: "),
        (None, ["YES", ""], "labels: "),
        (None, ["YES", 0], "labels: "),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_by_name(text, labels, named):
    with pytest.raises(rksc.VerifyError, match=named):
        make_question(text, labels)


def test_verify_skips_what_has_no_answer_and_says_why(state):
    branches = rksc.fork(state, 2)
    branches.stop([0])
    verdict = rksc.verify(branches, "x")
    assert verdict.winner is None
    assert verdict.skipped == {0: "stopped", 1: "no variable 'x'"}
    branches.join()


class Failing(Canned):
    def generate(self, s, sampling_params):
        raise ConnectionError("the server is gone")


@pytest.mark.filterwarnings("ignore:Error in stream_executor")
def test_a_failed_branch_is_reported_and_nothing_waits_for_it():
    executor = StreamExecutor(Failing(), {}, SglSamplingParams(), None, stream=False)
    state = ProgramState(executor)
    branches = rksc.fork(state, 2)
    branches += sgl.gen("x")
    for _ in range(2):  # Also when more is appended to a branch that has failed already.
        verdict = rksc.verify(branches, "x")
        assert verdict.skipped == dict.fromkeys([0, 1], "failed: the server is gone")
        branches += "more"
    with pytest.raises(RuntimeError, match="branch 0 failed: the server is gone"):
        branches.join()
    with pytest.raises(RuntimeError, match="failed before the fork: the server is gone"):
        rksc.fork(branches[0], 2)
    executor.end()


def test_verify_needs_branches():
    with pytest.raises(rksc.VerifyError, match="branches"):
        rksc.verify([], "x")


def test_verify_needs_an_sglang_server(state):
    branches = rksc.fork(state, 1)
    branches += sgl.gen("x")
    with pytest.raises(rksc.VerifyError, match="Canned"):
        rksc.verify(branches, "x")
    branches.join()


def test_programs_can_be_traced():
    @sgl.function
    def program(s, question):
        s += sgl.user(question)
        branches = rksc.fork(s, 2, hints=["a", "b"])
        branches += sgl.gen("x")
        verdict = rksc.verify(branches, "x", labels=("right", "wrong"))
        branches.join()
        s += branches[verdict.winner]["x"]
        s += rksc.gen_verdict("ok", "Right?")

    trace = program.trace(backend=Canned())
    assert "Verdict('ok'" in trace.last_node.print_graph_dfs()
    nodes = [repr(node) for child in trace.child_states for node in child.flatten_nodes()]
    assert sum("Verdict('x_verdict'" in node for node in nodes) == 2


def test_the_package_exports_what_it_names():
    for name in rksc.__all__:
        assert getattr(rksc, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        rksc.no_such_name  # noqa: B018
