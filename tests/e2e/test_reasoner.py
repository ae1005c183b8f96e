"""``--rksc-model reasoner``."""

import pytest
import requests
import sglang as sgl

import rksc_sglang as rksc
from rksc_sglang.models.problems import extract_answer
from rksc_sglang.server_process import ServerProcess

PROBLEM = "State the final answer to the following arithmetic problem: 5 + 3 - 2 = "
RIGHT = "5 + 3 = 8\n8 - 2 = 6\nAnswer: 6"
WRONG = "5 + 3 = 8\n8 - 2 = 5\nAnswer: 5"


@pytest.fixture(scope="module")
def reasoner(logs):
    flags = ["--rksc-model", "reasoner", "--dtype", "float32", "--rksc-mode", "balanced"]
    with ServerProcess(flags, log=logs / "reasoner.log") as server:
        server.wait_ready()
        yield server.url


def test_it_is_served_by_its_name(reasoner):
    status = requests.get(f"{reasoner}/rksc/status").json()
    assert status["ranks"][0]["num_layers"] == 12
    assert requests.get(f"{reasoner}/v1/models").json()["data"][0]["id"] == "reasoner"


def test_it_answers_in_its_chat_format(reasoner):
    body = {
        "model": "reasoner",
        "messages": [{"role": "user", "content": PROBLEM}],
        "temperature": 0,
        "max_tokens": 60,
    }
    answer = requests.post(f"{reasoner}/v1/chat/completions", json=body).json()["choices"][0]
    assert answer["finish_reason"] == "stop"
    assert "Answer:" in answer["message"]["content"]


@sgl.function
def judge(s, candidate):
    s += sgl.user(PROBLEM) + sgl.assistant(candidate)
    s += rksc.gen_verdict("right")


def test_it_tells_a_right_solution_from_a_wrong_one(reasoner):
    """How often is measured by benchmarks.reasoner."""
    backend = sgl.RuntimeEndpoint(reasoner, chat_template_name="chatml")
    verdicts = [judge.run(s, backend=backend).get_meta_info("right") for s in (RIGHT, WRONG)]
    assert all(verdict["labels"] == ("YES", "NO") for verdict in verdicts)
    right, wrong = (verdict["probabilities"][0] for verdict in verdicts)
    assert wrong < 0.5 < right


@sgl.function
def solve(s, skip):
    s += sgl.user(PROBLEM)
    branches = rksc.fork(s, 4)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=60, temperature=0))
    verdict = rksc.verify(branches, "answer", skip=skip, extract=extract_answer)
    branches.join()
    return verdict


def test_its_profile_lets_verifications_stop_early(reasoner):
    backend = sgl.RuntimeEndpoint(reasoner, chat_template_name="chatml")
    verdict = solve.run(None, backend=backend).ret_value
    assert all(layer in (3, 6, 9) for layer in verdict.exit_layers), "all say the same"
    assert verdict.verdicts == ["YES"] * 4
    assert verdict.computed_layers < verdict.all_layers == 4 * 12


def test_its_profile_lets_groups_go_unverified(reasoner):
    backend = sgl.RuntimeEndpoint(reasoner, chat_template_name="chatml")
    verdict = solve.run("calibrated", backend=backend).ret_value
    assert verdict.gate == "the calibrated gate"
    assert verdict.prompt_tokens == 0
