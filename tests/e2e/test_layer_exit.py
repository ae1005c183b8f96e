"""Verifications that stop at a middle layer, on the server that splices (SmolLM2, balanced)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import sglang as sgl

import rksc_sglang as rksc
from rksc_sglang.cgee.record import Recorder, RecordError

CHECKED = "The capital of France is Paris.\nIs that right? Answer Yes or No:"


def post(url, text, verify=None, **params):
    custom = {"custom_params": {"rksc": {"share": "exact", "verify": verify}}} if verify else {}
    body = {
        "text": text,
        "sampling_params": {"temperature": 0, **params, **custom},
        "return_logprob": True,
    }
    if verify:
        body["token_ids_logprob"] = label_tokens(url)
    answer = requests.post(url + "/generate", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["meta_info"]


def label_tokens(url):
    tokens = [
        requests.post(url + "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
        for text in (" Yes", " No")
    ]
    return [answer["tokens"][0] for answer in tokens]


def verify(url, text, exit, **params):
    return post(url, text, {"labels": ["Yes", "No"], "exit": exit}, max_new_tokens=1, **params)


def lead_of(meta):
    (yes, _, _), (no, _, _) = meta["output_token_ids_logprobs"][0]
    return yes - no


def counters(url):
    return requests.get(url + "/rksc/status").json()["ranks"][0]["counters"]


def test_the_states_of_some_layers_are_shown(splicing):
    meta = verify(splicing, CHECKED, "observe")
    assert meta["rksc"]["exit_layer"] is None
    states = meta["rksc"]["states"]
    assert [len(state) for state in states] == [576] * 3


def test_the_papers_rule_stops_at_its_second_look(splicing):
    before = counters(splicing)["layer_exits"]
    meta = verify(splicing, CHECKED, "paper")
    layer = meta["rksc"]["exit_layer"]
    assert 3 <= layer < 30
    yes, no = meta["rksc"]["label_scores"]
    assert lead_of(meta) == pytest.approx(yes - no, abs=1e-3)
    assert counters(splicing)["layer_exits"] == before + 1


def test_what_stopped_is_not_shared(splicing):
    text = f"A text that nobody has asked about. {CHECKED}"
    verify(splicing, text, "paper")
    assert verify(splicing, text, "off")["cached_tokens"] == 0
    assert verify(splicing, text, "off")["cached_tokens"] > 0


def test_other_requests_of_the_batch_get_what_they_get_alone(splicing):
    texts = [f"Story number {n}: once upon a time there was a" for n in range(4)]

    def tokens(text):
        meta = post(splicing, text, max_new_tokens=12)
        return [token for _, token, _ in meta["output_token_logprobs"]]

    alone = [tokens(text) for text in texts]
    requests.post(splicing + "/flush_cache", timeout=60)
    with ThreadPoolExecutor(12) as pool:
        together = [pool.submit(tokens, text) for text in texts]
        exits = [pool.submit(verify, splicing, f"{n}. {CHECKED}", "paper") for n in range(8)]
        assert [future.result() for future in together] == alone
        assert all(future.result()["rksc"]["exit_layer"] for future in exits)


@pytest.mark.parametrize(
    ("exit", "params", "reason"),
    [
        ("layer", {"max_new_tokens": 1}, "not calibrated for these labels"),
        ("paper", {"max_new_tokens": 4}, "only with max_new_tokens 1"),
    ],
)
def test_what_cannot_stop_says_why(splicing, exit, params, reason):
    meta = post(splicing, CHECKED, {"labels": ["Yes", "No"], "exit": exit}, **params)
    assert reason in meta["rksc"]["fallback"]
    assert meta["rksc"]["exit_layer"] is None


def test_labels_without_tokens_are_told(splicing):
    contract = {"verify": {"labels": ["Yes", "No"], "exit": "paper"}}
    params = {"max_new_tokens": 1, "custom_params": {"rksc": contract}}
    body = {"text": CHECKED, "sampling_params": params}
    meta = requests.post(splicing + "/generate", json=body, timeout=120).json()["meta_info"]
    assert "token_ids_logprob" in meta["rksc"]["fallback"]


@sgl.function
def fork_and_verify(s, skip):
    s += sgl.system("You answer questions in a few words.")
    s += sgl.user("What is the capital of France?")
    branches = rksc.fork(s, 3)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=12, temperature=0))
    exact = rksc.verify(branches, "answer", exit="off")
    return exact, rksc.verify(branches, "answer", skip=skip, question="Really? Yes or No.")


def test_a_profile_lets_verifications_stop_early(splicing):
    backend = sgl.RuntimeEndpoint(splicing, chat_template_name="chatml")
    exact, early = fork_and_verify.run(None, backend=backend).ret_value
    assert exact.exit_layers == [None] * 3
    assert early.labels == ("Yes", "No")
    assert early.exit_layers == [15] * 3
    assert all(0 < score < 1 for score in early.scores)
    assert "stopped after layer 15" in early.explain()
    assert "45 of 90 layers" in early.explain()


def test_a_group_that_agrees_is_not_verified(splicing):
    backend = sgl.RuntimeEndpoint(splicing, chat_template_name="chatml")
    _, verdict = fork_and_verify.run("calibrated", backend=backend).ret_value
    assert verdict.gate == "the calibrated gate"
    assert verdict.winner is not None
    assert verdict.prompt_tokens == 0


def test_recording_needs_the_verdicts_as_single_tokens(splicing):
    with pytest.raises(RecordError, match="'YES' is not a single token"):
        _ = Recorder(splicing).labels


@sgl.function
def fork_with_a_loser(s):
    s += sgl.system("You answer questions in a few words.")
    s += sgl.user("What is the capital of France?")
    branches = rksc.fork(s, 4)
    tokens = [8, 8, 300, 8]
    branches += lambda i: sgl.assistant(
        sgl.gen("answer", max_tokens=tokens[i], min_tokens=tokens[i], temperature=0)
    )
    verdict = rksc.verify(
        branches, "answer", skip="calibrated", stop=True, extract=lambda text: text[:10]
    )
    reason = branches[2].get_meta_info("answer")["finish_reason"]["type"]
    return verdict, branches.stopped, reason


def test_who_cannot_change_a_decided_group_is_stopped(splicing):
    backend = sgl.RuntimeEndpoint(splicing, chat_template_name="chatml")
    verdict, stopped, reason = fork_with_a_loser.run(backend=backend).ret_value
    assert verdict.gate == "the calibrated gate"
    assert verdict.winner in (0, 1, 3)
    assert stopped == {2}
    assert reason == "abort"
    assert verdict.skipped[2].startswith("stopped")
    assert verdict.confidences[2] is None


def test_only_branches_of_a_calibrated_group_can_be_stopped(splicing):
    @sgl.function
    def program(s, skip):
        s += "One, two,"
        branches = rksc.fork(s, 2)
        branches += sgl.gen("x", max_tokens=2)
        return rksc.verify(
            branches if skip == "paper" else branches.states, "x", skip=skip, stop=True
        )

    backend = sgl.RuntimeEndpoint(splicing, chat_template_name="chatml")
    for skip in ("paper", "calibrated"):
        with pytest.raises(rksc.VerifyError, match="stop: needs branches"):
            program.run(skip, backend=backend)


@sgl.function
def think_and_verify(s, think):
    s += sgl.user("What is the capital of France?")
    branches = rksc.fork(s, 2)
    branches += sgl.assistant(sgl.gen("answer", max_tokens=8, temperature=0))
    s += rksc.gen_verdict("sure", think=think)
    verdict = rksc.verify(branches, "answer", think=think)
    return verdict, s.get_meta_info("sure")


def test_a_verifier_thinks_until_its_verdict_is_stable(splicing):
    backend = sgl.RuntimeEndpoint(splicing, chat_template_name="chatml")
    common = {"max_tokens": 24, "every": 8, "marker": "Verdict, Yes or No:"}
    whole, node = think_and_verify.run(rksc.Think(sure=2.0, **common), backend=backend).ret_value
    early, _ = think_and_verify.run(rksc.Think(sure=0.5, **common), backend=backend).ret_value
    assert whole.labels == ("Yes", "No")
    assert all(0 < score < 1 for score in [*whole.scores, *early.scores])
    for some, all_of_it in zip(early.thoughts, whole.thoughts):
        assert some
        assert all_of_it.startswith(some)
    assert early.generated_tokens <= whole.generated_tokens <= 2 * 24
    assert f"{whole.generated_tokens} generated" in whole.explain()
    assert node["thought"]
    assert 0 < node["generated_tokens"] <= 24
    assert whole.computed_tokens < whole.prompt_tokens / 2, "each piece continues those before"
