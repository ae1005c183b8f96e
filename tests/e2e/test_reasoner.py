"""``--rksc-model reasoner``: it solves and judges through the frontend."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import sglang as sgl
from transformers import AutoTokenizer

import rksc_sglang as rksc
from rksc_sglang.asks.profile import fingerprint
from rksc_sglang.cgee.exit_rule import CalibratedRule
from rksc_sglang.cgee.profile import ExitProfile, SkipProfile, update_profile
from rksc_sglang.cgee.record import Recorder
from rksc_sglang.cgee.skip_gate import CalibratedGate
from rksc_sglang.models import ensure_model
from rksc_sglang.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
PROBLEM = "State the final answer to the following arithmetic problem: 5 + 3 ="
RIGHT, WRONG = "5 + 3 = 8\nAnswer: 8", "5 + 3 = 2\nAnswer: 2"


@pytest.fixture(scope="module")
def reasoner(logs, tmp_path_factory):
    """A server in mode balanced whose profile lets all verifications stop after half of the layers,
    and skips groups that agree."""
    profile = tmp_path_factory.mktemp("profile") / "profile.json"
    path = ensure_model("reasoner")
    tokenizer = AutoTokenizer.from_pretrained(path)
    labels = tuple(tokenizer.convert_tokens_to_ids(label) for label in ("YES", "NO"))
    rule = CalibratedRule((4,), (1.0,), ((0.5, -0.5),), (0.0,), (0.0,))
    update_profile(profile, ExitProfile(fingerprint(path), labels, rule, 0.01, 0.05, {}))
    gate = CalibratedGate((10.0, 0.0, 0.0, -9.0), 0.5)  # a share of more than 0.9
    update_profile(profile, SkipProfile(fingerprint(path), gate, 0.01, 0.05, {}))
    flags = ["--rksc-model", "reasoner", "--rksc-mode", "balanced", "--dtype", "float32"]
    with ServerProcess([*flags, "--rksc-profile", str(profile)], log=logs / "own.log") as server:
        server.wait_ready()
        yield server.url


@sgl.function
def judge(s, candidates, exit):
    s += sgl.user(PROBLEM)
    branches = rksc.fork(s, len(candidates))
    for state, candidate in zip(branches, candidates):
        state.set_var("answer", candidate)
        state += sgl.assistant(candidate)
    return rksc.verify(branches, "answer", exit=exit)


def test_it_is_served_by_its_name(reasoner):
    status = requests.get(f"{reasoner}/rksc/status").json()
    assert status["mode"] == "balanced"
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
    verdict = judge.run([WRONG, RIGHT], "off", backend=backend).ret_value
    assert verdict.labels == ("YES", "NO")
    assert verdict.winner == 1
    assert verdict.exit_layers == [None, None]


def test_the_program_of_the_documentation(reasoner, tmp_path):
    (program,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/verification.md").read_text(), re.DOTALL
    )
    script = tmp_path / "program.py"
    script.write_text(program.replace("http://localhost:30000", reasoner))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "won" in done.stdout


def test_a_profile_lets_verifications_stop_early(reasoner):
    backend = sgl.RuntimeEndpoint(reasoner, chat_template_name="chatml")
    early = judge.run([WRONG, RIGHT], None, backend=backend).ret_value
    assert early.exit_layers == [4, 4]
    assert "stopped after layer 4" in early.explain()
    observed = Recorder(reasoner).verify(PROBLEM, RIGHT, "observe")
    num_layers = requests.get(f"{reasoner}/rksc/status").json()["ranks"][0]["num_layers"]
    assert len(observed.lens) == num_layers - 1


@sgl.function
def fork_and_verify(s, temperature):
    s += sgl.user(PROBLEM)
    branches = rksc.fork(s, 4)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=60, temperature=temperature))
    return rksc.verify(branches, "answer", skip="calibrated")


def test_a_group_that_agrees_is_not_verified(reasoner):
    backend = sgl.RuntimeEndpoint(reasoner, chat_template_name="chatml")
    verdict = fork_and_verify.run(0.0, backend=backend).ret_value
    assert verdict.gate == "the calibrated gate"
    assert verdict.winner is not None
    assert verdict.prompt_tokens == 0
