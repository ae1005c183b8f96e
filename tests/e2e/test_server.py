"""The server's face: contract, routes, status, metrics. One real server, SmolLM2, mode exact."""

import json
import threading
import time

import pytest
import requests
import torch


def generate(url, text="The capital of France is", rksc=None, stream=False, **params):
    sampling = {"max_new_tokens": 4, "temperature": 0, **params}
    if rksc is not None:
        sampling["custom_params"] = {"rksc": rksc}
    body = {"text": text, "sampling_params": sampling, "stream": stream}
    return requests.post(url + "/generate", json=body, timeout=120)


def status(url):
    return requests.get(url + "/rksc/status", timeout=60).json()


def test_status_says_what_runs(server):
    answer = status(server)
    assert answer["mode"] == "exact"
    assert answer["versions"]["sglang"] == "0.5.23"
    assert answer["model"] == "smollm2"
    assert answer["config"]["root_first_min_tokens"] == 32
    (rank,) = answer["ranks"]
    assert rank["features"]["root_first"] == {"on": True, "reason": None}
    assert rank["features"]["splice"] == {"on": False, "reason": "mode exact"}
    assert rank["cache"]["backend"] == "RkscRadixCache"
    assert rank["counters"]["errors"] == 0


def test_greedy_output_is_what_transformers_gives(server, smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for question in ("What is the capital of Italy?", "Name three colors.", "What is 7 + 5?"):
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=24, do_sample=False)
        expected = tokenizer.decode(
            output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answer = requests.post(
            server + "/v1/chat/completions",
            json={"model": "smollm2", "messages": messages, "max_tokens": 24, "temperature": 0},
            timeout=120,
        ).json()
        assert answer["choices"][0]["message"]["content"].strip() == expected.strip()


def test_the_contract_is_answered_in_meta_info(server):
    text = "A lighthouse keeper wrote in the log: "
    assert generate(server, text).json()["meta_info"].get("rksc") is None
    meta = generate(server, text, {"group": "g", "branch": 0}).json()["meta_info"]
    assert meta["rksc"] == {
        "share": "exact",
        "exact_tokens": meta["cached_tokens"],
        "spliced_tokens": 0,
        "recomputed_tokens": meta["prompt_tokens"] - meta["cached_tokens"],
        "similarity": None,
        "exit_layer": None,
        "num_layers": 30,
        "merged_into": None,
        "fallback": None,
    }
    assert meta["rksc"]["exact_tokens"] > 0


def test_what_cannot_be_done_is_served_exactly_and_says_why(server):
    before = status(server)["ranks"][0]["counters"]["fallbacks"]
    contract = {"share": "similar", "verify": {"labels": ["a", "b"], "exit": "layer"}}
    meta = generate(server, rksc=contract).json()["meta_info"]
    assert meta["rksc"]["share"] == "exact"
    assert meta["rksc"]["fallback"] == "splice: off (mode exact); layer_exit: off (mode exact)"
    assert status(server)["ranks"][0]["counters"]["fallbacks"] == before + 1


def test_a_batch_gets_one_answer_a_request(server):
    params = {"max_new_tokens": 2, "temperature": 0}
    body = {
        "text": ["one", "two", "three"],
        "sampling_params": [
            {**params, "custom_params": {"rksc": {"group": "b", "branch": 0}}},
            params,
            {**params, "custom_params": {"rksc": {"share": "similar"}}},
        ],
    }
    answers = requests.post(server + "/generate", json=body, timeout=120).json()
    infos = [answer["meta_info"].get("rksc") for answer in answers]
    assert infos[0]["fallback"] is None
    assert infos[1] is None
    assert infos[2]["fallback"] == "splice: off (mode exact)"


def test_a_stream_carries_it_in_every_chunk(server):
    lines = generate(server, rksc={"group": "s", "branch": 0}, stream=True).text.splitlines()
    chunks = [json.loads(line[5:]) for line in lines if line.startswith("data: {")]
    assert len(chunks) >= 2
    assert all(chunk["meta_info"]["rksc"]["share"] == "exact" for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("rksc", "named"),
    [({"grup": 1}, "rksc.grup"), ({"tau": 2}, "rksc.tau"), (["exact"], "custom_params.rksc")],
)
def test_a_malformed_contract_is_http_400_naming_the_key(server, rksc, named, stream):
    answer = generate(server, rksc=rksc, stream=stream)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]
    for path, prompt in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        body = {"model": "smollm2", "custom_params": {"rksc": rksc}, "stream": stream, **prompt}
        answer = requests.post(server + path, json=body, timeout=120)
        assert answer.status_code == 400
        assert named in answer.text
    assert generate(server).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_openai_routes_answer_in_a_header(server, stream):
    for path, prompt in (
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    ):
        body = {"model": "smollm2", "max_tokens": 2, "stream": stream, **prompt}
        plain = requests.post(server + path, json=body, timeout=120)
        assert "x-rksc" not in plain.headers
        body["custom_params"] = {"rksc": {"share": "similar"}}
        answer = requests.post(server + path, json=body, timeout=120)
        assert json.loads(answer.headers["x-rksc"])["fallback"] == "splice: off (mode exact)"


def test_openai_meta_info_has_it_where_sglang_returns_one(server):
    body = {
        "model": "smollm2",
        "max_tokens": 2,
        "return_meta_info": True,
        "messages": [{"role": "user", "content": "Hello"}],
        "custom_params": {"rksc": {"group": "o", "branch": 1}},
    }
    answer = requests.post(server + "/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["meta_info"]["rksc"]["share"] == "exact"


def test_structured_output_works_on_a_cpu(server):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = generate(
        server, "A person as JSON:", max_new_tokens=48, json_schema=json.dumps(schema)
    ).json()
    assert set(json.loads(answer["text"])) == {"name", "age"}


def test_a_pruned_branch_stops_generating_and_its_siblings_go_on(server):
    answers = {}

    def run(branch, **namespace):
        answers[branch] = requests.post(
            server + "/generate",
            json={
                "text": "Once upon a time",
                "sampling_params": {
                    "max_new_tokens": 60,
                    "ignore_eos": True,
                    "custom_params": {"rksc": {"group": "stop-me", "branch": branch}},
                },
                **namespace,
            },
            timeout=120,
        ).json()["meta_info"]

    threads = [threading.Thread(target=run, args=(branch,)) for branch in (0, 1)]
    # The same group name in another tenant's namespace is another group.
    threads.append(threading.Thread(target=run, args=(2,), kwargs={"extra_key": "tenant"}))
    for thread in threads:
        thread.start()
    aborted = []
    deadline = time.monotonic() + 60
    while not aborted and time.monotonic() < deadline:
        body = {"group": "stop-me", "states": {0: "pruned", 1: "frontier", 2: "pruned"}}
        aborted = requests.post(server + "/rksc/branches", json=body, timeout=60).json()["aborted"]
    for thread in threads:
        thread.join()
    assert aborted == [0]
    assert answers[0]["finish_reason"]["type"] == "abort"
    assert [answers[b]["finish_reason"]["type"] for b in (1, 2)] == ["length", "length"]
    assert status(server)["frontend_counters"]["aborted_branches"] >= 1


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"group": "g", "states": {"0": "dead"}}, "states"),
        ({"group": "g", "states": {"first": "won"}}, "states"),
        ({"states": {"0": "won"}}, "group"),
        ({"group": "g", "states": {}, "mood": 1}, "mood"),
    ],
)
def test_bad_branch_states_are_http_400_naming_the_field(server, body, named):
    answer = requests.post(server + "/rksc/branches", json=body, timeout=60)
    assert answer.status_code == 400
    assert named in answer.text


def test_metrics_are_named_rksc(server):
    generate(server, rksc={"tau": 7})
    text = requests.get(server + "/metrics", timeout=60).text
    for name in (
        "requests",
        "held_requests",
        "gathered_groups",
        "fallbacks",
        "errors",
        "rejected_requests",
    ):
        assert f"rksc:{name}_total{{" in text
    assert "sglang:" in text
