"""Splicing on a live server: SmolLM2, mode balanced, pages of 16, the guard on every splice."""

import json
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import requests
from transformers import AutoTokenizer

from rksc_sglang.server_process import ServerProcess

ROOT = Path(__file__).parents[2]

DOCUMENT = (
    "The lighthouse at Cape Morrow was built in 1874, when two ships had been lost on the reef in "
    "one winter. Its keeper, Agnes Hale, lit the lamp every evening for thirty years, and wrote "
    "down in a log what she saw: the weather, the names of the ships, and now and then a whale. "
    "When the lamp was changed from oil to electricity, the harbour master asked her to stay and "
    "to train the men who came after her. She agreed on one condition: that the old lens, which "
    "had been made in France, should not be sold. It is still there, in the museum by the harbour, "
    "and on the first Sunday of each month a volunteer cleans it with vinegar and a soft cloth."
)
# Long enough to be worth a pass on any machine.
LONG = "\n\n".join([DOCUMENT, DOCUMENT.replace("lighthouse", "windmill").replace("lens", "stone")])
OTHER = LONG.replace("lamp", "wheel").replace("keeper", "warden").replace("Agnes", "Ruth")
SYSTEMS = [
    "You answer questions in a few words.",
    "You are a historian. Answer in one short sentence, and only from the text.",
    "You are a teacher who speaks to children of ten. Be brief.",
    "You work at the desk of a museum and help its visitors.",
]


def chat(system, user):
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def prompt(number, document=DOCUMENT, question="What should not be sold?"):
    return chat(SYSTEMS[number], f"{document}\n\n{question}")


def ask(url, text, share=None, salt=None, rksc=None, temperature=0, **kwargs):
    contract = {**({"share": share} if share else {}), **(rksc or {})}
    body = {
        "text": text,
        "sampling_params": {
            "max_new_tokens": 8,
            "temperature": temperature,
            "ignore_eos": True,
            **({"custom_params": {"rksc": contract}} if contract else {}),
        },
        **kwargs,
    }
    if salt:
        body["cache_salt"] = salt
    answer = requests.post(url + "/generate", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def info(answer):
    return answer["meta_info"]["rksc"]


def rank(url):
    return requests.get(url + "/rksc/status", timeout=60).json()["ranks"][0]


def test_the_document_behind_another_system_prompt_is_spliced(splicing):
    first = ask(splicing, prompt(0), "similar", "a")
    assert info(first)["share"] == "exact"
    second = ask(splicing, prompt(1), "similar", "a")
    used = info(second)
    assert used["share"] == "similar"
    assert used["spliced_tokens"] >= 96
    assert used["spliced_tokens"] % 16 == 0
    assert 0.5 <= used["similarity"] <= 1
    total = used["exact_tokens"] + used["spliced_tokens"] + used["recomputed_tokens"]
    assert total == second["meta_info"]["prompt_tokens"]
    assert second["meta_info"]["cached_tokens"] == total - used["recomputed_tokens"]


def test_head_and_tail_in_one_pass_or_in_two(splicing, smollm2):
    """The same KV: once the stage and the request share a pass, once the head was cached before."""
    options = {"return_logprob": True, "top_logprobs_num": 5}
    ask(splicing, prompt(0), "similar", "joined")
    before = rank(splicing)["counters"]["joined_splices"]
    joined = ask(splicing, prompt(1), "similar", "joined", **options)
    assert rank(splicing)["counters"]["joined_splices"] == before + 1

    ask(splicing, prompt(0), "similar", "apart")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer(prompt(1))["input_ids"]
    begin = (len(tokens) - 16) // 16 * 16 - info(joined)["spliced_tokens"]  # all but 16 repeats
    ask(splicing, tokenizer.decode(tokens[:begin]), "exact", "apart")
    apart = ask(splicing, prompt(1), "similar", "apart", **options)
    assert rank(splicing)["counters"]["joined_splices"] == before + 1
    assert info(apart)["spliced_tokens"] == info(joined)["spliced_tokens"]
    assert abs(info(joined)["similarity"] - info(apart)["similarity"]) < 1e-3
    assert joined["output_ids"] == apart["output_ids"]
    first = [x["meta_info"]["output_top_logprobs"][0] for x in (joined, apart)]
    for ours, theirs in zip(*first):
        assert ours[1] == theirs[1]
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3)


def test_siblings_read_their_prefix_in_the_pass_that_computes_it(splicing):
    texts = [prompt(0, question=f"What is said of year {number}?") for number in (1874, 1902, 30)]
    options = {"return_logprob": True, "top_logprobs_num": 5}
    for attempt in range(10):  # a machine may be too busy for them to come together
        before = rank(splicing)["counters"]
        contract = {"together": {"id": f"siblings-{attempt}", "count": len(texts)}}
        send = partial(ask, splicing, salt=f"together-{attempt}", rksc=contract, **options)
        with ThreadPoolExecutor(len(texts)) as pool:
            together = list(pool.map(send, texts))
        after = rank(splicing)["counters"]
        if after["gathered_groups"] > before["gathered_groups"]:
            break
    assert after["gathered_groups"] == before["gathered_groups"] + 1
    assert after["joined_prefixes"] == before["joined_prefixes"] + 2
    assert sorted(a["meta_info"]["cached_tokens"] > 96 for a in together) == [False, True, True]
    for number, (text, answer) in enumerate(zip(texts, together)):
        assert info(answer)["share"] == "exact"
        alone = ask(splicing, text, "exact", f"alone-{number}", **options)
        assert answer["output_ids"] == alone["output_ids"]
        first = [x["meta_info"]["output_top_logprobs"][0] for x in (answer, alone)]
        for ours, theirs in zip(*first):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-3)


def test_whom_the_gate_refuses_in_mid_pass_is_served_exactly(splicing, server):
    ask(splicing, prompt(0), "similar", "refused")
    before = rank(splicing)["counters"]
    strict = ask(splicing, prompt(1), "similar", "refused", {"tau": 0.9999})
    after = rank(splicing)["counters"]
    assert info(strict)["share"] == "exact"
    assert info(strict)["spliced_tokens"] == 0
    assert after["gate_refusals"] > before["gate_refusals"]
    assert after["joined_splices"] == before["joined_splices"]
    assert after["requests"] == before["requests"] + 1
    assert strict["output_ids"] == ask(server, prompt(1), "exact")["output_ids"]


def test_the_readmes_first_splice(splicing, tmp_path):
    _, program = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "splice.py"
    script.write_text(program.replace("http://localhost:30000", splicing))
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "'share': 'similar'" in result.stdout.splitlines()[-1]


def test_it_is_on_for_all_requests_and_they_are_told(splicing):
    ask(splicing, prompt(0), salt="default")
    answer = ask(splicing, prompt(2), salt="default")
    assert info(answer)["share"] == "similar"


def test_nothing_spliced_reaches_an_exact_request(splicing, server):
    ask(splicing, prompt(0), "similar", "b")
    assert info(ask(splicing, prompt(1), "similar", "b"))["share"] == "similar"
    options = {"return_logprob": True, "top_logprobs_num": 2}
    ours = ask(splicing, prompt(1), "exact", "b", **options)
    exact = ask(server, prompt(1), "exact", "b", **options)
    assert info(ours)["spliced_tokens"] == 0
    assert ours["output_ids"] == exact["output_ids"]
    for a, b in zip(*(x["meta_info"]["output_token_logprobs"] for x in (ours, exact))):
        assert a[0] == pytest.approx(b[0], abs=1e-4)


def test_exact_requests_in_the_same_batches_are_exact(splicing, server):
    ask(splicing, prompt(0), "similar", "mixed")
    options = {"return_logprob": True, "top_logprobs_num": 2}
    questions = [f"What happened in {year}?" for year in (1874, 1900, 1905)]
    work = [("exact", 1, q) for q in questions] + [("similar", n, questions[0]) for n in (2, 3)]
    answers = [None] * len(work)

    def send(i):
        share, number, question = work[i]
        text = prompt(number, question=question)
        answers[i] = ask(splicing, text, share, "mixed", **options)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(info(a)["share"] == "similar" for a in answers)
    for (share, number, question), ours in zip(work, answers):
        if share == "similar":
            continue
        assert info(ours)["share"] == "exact"
        exact = ask(server, prompt(number, question=question), "exact", "mixed", **options)
        for step, (a, b) in enumerate(zip(ours["output_ids"], exact["output_ids"])):
            if a != b:
                top = exact["meta_info"]["output_top_logprobs"][step]
                assert abs(top[0][0] - top[1][0]) < 1e-4
                break
            values = (x["meta_info"]["output_token_logprobs"][step][0] for x in (ours, exact))
            assert next(values) == pytest.approx(next(values), abs=1e-4)


def test_tenants_are_apart(splicing):
    ask(splicing, prompt(0), "similar", "tenant 1")
    assert info(ask(splicing, prompt(1), "similar", "tenant 2"))["share"] == "exact"
    ask(splicing, prompt(0), "similar", extra_key="x")
    assert info(ask(splicing, prompt(1), "similar", extra_key="y"))["share"] == "exact"


def test_a_request_may_ask_for_more_similarity(splicing):
    ask(splicing, prompt(0), "similar", "tau")
    answer = ask(splicing, prompt(3), "similar", "tau", {"tau": 1.0})
    assert info(answer)["share"] == "exact"


def test_input_logprobs_over_the_run_are_exact(splicing):
    ask(splicing, prompt(0), "similar", "logprobs")
    answer = ask(
        splicing, prompt(1), "similar", "logprobs", return_logprob=True, logprob_start_len=0
    )
    assert info(answer)["spliced_tokens"] == 0
    assert len(answer["meta_info"]["input_token_logprobs"]) == answer["meta_info"]["prompt_tokens"]


def test_siblings_that_arrive_together_wait_for_one_donor(splicing):
    answers = [None] * len(SYSTEMS)

    def send(number):  # sampled: no near tie is doubted
        answers[number] = ask(splicing, prompt(number, LONG), "similar", "together", temperature=1)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(SYSTEMS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(info(a)["share"] for a in answers) == ["exact", "similar", "similar", "similar"]


def test_documents_in_another_order(splicing):
    ask(splicing, prompt(0, f"{LONG}\n\n{OTHER}"), "similar", "order")
    answer = ask(splicing, prompt(0, f"{OTHER}\n\n{LONG}"), "similar", "order", temperature=1)
    assert info(answer)["spliced_tokens"] > 400, info(answer)


def test_the_openai_routes_say_it_too(splicing):
    for number in (0, 1):
        body = {
            "model": "smollm2",
            "messages": [
                {"role": "system", "content": SYSTEMS[number]},
                {"role": "user", "content": DOCUMENT + "\n\nWho was the keeper?"},
            ],
            "max_tokens": 4,
            "custom_params": {"rksc": {"share": "similar"}},
            "cache_salt": "openai",
        }
        answer = requests.post(splicing + "/v1/chat/completions", json=body, timeout=120)
    assert json.loads(answer.headers["x-rksc"])["share"] == "similar"


def test_aborts_in_mid_splice_leak_nothing(splicing):
    ask(splicing, prompt(0), "similar", "abort")
    rng = random.Random(0)

    def send(number):
        with pytest.raises(requests.Timeout):
            requests.post(
                splicing + "/generate",
                json={
                    "text": prompt(number % 4, question=f"Question {number}?"),
                    "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
                    "cache_salt": "abort",
                },
                timeout=rng.uniform(0.02, 0.6),
            )

    threads = [threading.Thread(target=send, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # SGLang counts its slots whenever it is idle, and ends the server when one is missing.
    deadline = time.monotonic() + 60
    while rank(splicing)["splice"]["waiting_stages"] and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    # Behind a context of its own: what is spliced again and again is computed.
    last = chat("You keep a lighthouse.", f"{DOCUMENT}\n\nWhat should not be sold?")
    assert info(ask(splicing, last, "similar", "abort"))["share"] == "similar"
    assert rank(splicing)["counters"]["errors"] == 0


def test_a_verifier_with_its_own_system_prompt(splicing):
    import sglang as sgl

    import rksc_sglang as rksc

    @sgl.function
    def program(s):
        s += sgl.system("You answer questions in a few words.")
        s += sgl.user(DOCUMENT + "\n\nWho was the keeper?")
        branches = rksc.fork(s, 2, share="similar")
        branches += sgl.assistant(sgl.gen("answer", max_tokens=6))
        own = rksc.verify(branches, "answer", share="exact")
        other = rksc.verify(
            branches, "answer", system="You check the answers of others.", share="similar"
        )
        return own, other

    backend = sgl.RuntimeEndpoint(splicing, chat_template_name="chatml")
    own, other = program.run(backend=backend).ret_value
    assert own.spliced_tokens == 0
    assert other.spliced_tokens > 150
    assert other.winner in (0, 1)


def test_the_guard_has_looked_at_them(splicing):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        state = rank(splicing)
        if state["counters"]["shadows"] >= 3 and state["splice"]["cost"] is not None:
            break
        time.sleep(0.5)
    assert state["counters"]["shadows"] >= 3
    assert state["splice"]["cost"]["token_seconds"] > 0
    metrics = requests.get(splicing + "/metrics", timeout=60).text
    assert "rksc:spliced_requests_total" in metrics


def test_a_corrupted_splice_is_noticed_and_ended(tiny_model, logs):
    flags = ["--model-path", str(tiny_model), "--rksc-mode", "balanced", "--rksc-tau", "0"]
    flags += ["--rksc-guard-share", "1", "--max-total-tokens", "8192"]
    module = "tests.e2e.corrupted_server"
    with ServerProcess(flags, log=logs / "corrupted.log", module=module) as server:
        server.wait_ready()
        deadline = time.monotonic() + 120
        spliced = rounds = 0
        while time.monotonic() < deadline and not rank(server.url)["counters"]["guard_trips"]:
            # One tenant; each time another text, so that there is something to splice.
            text = f"{DOCUMENT}\n\n{DOCUMENT}".replace("1874", str(1000 + rounds))
            ask(server.url, prompt(0, text), "similar", "harmed")
            answer = ask(server.url, prompt(1, text), "similar", "harmed")
            spliced += info(answer)["share"] == "similar"
            rounds += 1
            time.sleep(1.2)
        assert spliced
        state = rank(server.url)
        assert state["counters"]["guard_trips"] == 1
        assert sum(t["tripped"] for t in state["splice"]["guard"]["tenants"].values()) == 1
        text = DOCUMENT.replace("1874", "1999")
        ask(server.url, prompt(0, text), "similar", "harmed")
        answer = ask(server.url, prompt(1, text), "similar", "harmed")
        assert info(answer)["share"] == "exact"
        assert "guard" in info(answer)["fallback"]


def test_near_ties_are_computed_again_exactly(smollm2, logs):
    # Not the tiny model: whether a splice pays there is decided by the noise of its measurement.
    flags = ["--rksc-mode", "balanced", "--rksc-tau", "0.5", "--rksc-margin", "50"]
    flags += ["--rksc-guard-share", "0", "--max-total-tokens", "8192", "--dtype", "float32"]
    with ServerProcess(flags, log=logs / "doubt.log") as server:
        server.wait_ready()
        text = " ".join([DOCUMENT] * 3)
        prompts = [chat(SYSTEMS[0], f"This is copy {number}. {text}") for number in range(4)]
        ask(server.url, prompts[0], "similar", "a")
        with ThreadPoolExecutor(2) as pool:
            send = partial(ask, server.url, share="similar", salt="a")
            answers = list(pool.map(send, prompts[1:3]))
        for text, answer in zip(prompts[1:3], answers):
            assert info(answer)["share"] == "exact"
            assert info(answer)["spliced_tokens"] == 0
            assert "nearly tied" in info(answer)["fallback"]
            exact = ask(server.url, text, "exact", text)
            assert answer["output_ids"] == exact["output_ids"]
        state = rank(server.url)
        assert state["counters"]["doubts"] == 2
        assert state["counters"]["spliced_requests"] == 2
        assert state["splice"]["margin"] == 50

        answer = ask(server.url, prompts[3], "similar", "a", temperature=1)
        assert info(answer)["share"] == "similar"
        server.check()
