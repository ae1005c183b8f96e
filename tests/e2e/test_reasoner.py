"""``--rksc-model reasoner``: it solves and judges through the frontend."""

import requests
import sglang as sgl

import rksc_sglang as rksc

PROBLEM = "State the final answer to the following arithmetic problem: 5 + 3 ="
RIGHT, WRONG = "5 + 3 = 8\nAnswer: 8", "5 + 3 = 2\nAnswer: 2"


@sgl.function
def judge(s, candidates):
    s += sgl.user(PROBLEM)
    branches = rksc.fork(s, len(candidates))
    for state, candidate in zip(branches, candidates):
        state.set_var("answer", candidate)
        state += sgl.assistant(candidate)
    return rksc.verify(branches, "answer")


def test_it_is_served_by_its_name(reasoner):
    status = requests.get(f"{reasoner}/rksc/status").json()
    assert status["mode"] == "exact"
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


def test_it_tells_a_right_solution_from_a_wrong_one(reasoner):
    backend = sgl.RuntimeEndpoint(reasoner, chat_template_name="chatml")
    verdict = judge.run([WRONG, RIGHT], backend=backend).ret_value
    assert verdict.labels == ("YES", "NO")
    assert verdict.winner == 1
