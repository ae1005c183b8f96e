"""Siblings that arrive together compute their shared prefix once, by their cached_tokens."""

import threading

import requests

WORDS = "harbour lantern river stone window garden copper engine valley paper".split()


def prompt(seed, length):
    """``length`` words in an order of their own."""
    return " ".join(WORDS[(seed * 7 + i * (1 + seed % 3) + i // 10) % 10] for i in range(length))


def send_together(url, texts):
    answers = [None] * len(texts)

    def send(i):
        body = {"text": texts[i], "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
        answers[i] = requests.post(url + "/generate", json=body, timeout=300).json()["meta_info"]

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def computed(answers):
    return sum(a["prompt_tokens"] - a["cached_tokens"] for a in answers)


def test_eight_siblings_compute_their_prefix_once(server):
    prefix = "Eight: " + prompt(1, 100)
    answers = send_together(server, [f"{prefix}. Branch {i} says" for i in range(8)])
    alone = answers[0]["prompt_tokens"]
    assert computed(answers) < 1.5 * alone  # stock fcfs may compute all eight, 8 * alone
    assert sorted(a["cached_tokens"] for a in answers)[1] > 0.8 * alone


def test_it_holds_for_a_prefix_longer_than_a_prefill_chunk(server):
    prefix = "Chunked: " + prompt(2, 620)  # the server prefills in chunks of 256 tokens
    answers = send_together(server, [f"{prefix}. Branch {i} says" for i in range(4)])
    alone = answers[0]["prompt_tokens"]
    assert alone > 512
    assert computed(answers) < 1.2 * alone


def test_families_do_not_wait_for_each_other_for_ever(server):
    texts = [f"Family {f}: {prompt(3 + f, 60)}. Child {i}" for i in range(3) for f in range(3)]
    answers = send_together(server, texts)
    assert all(a["finish_reason"]["type"] in ("length", "stop") for a in answers)
    assert computed(answers) < 1.6 * sum(a["prompt_tokens"] for a in answers[:3])


def test_the_server_counts_whom_it_held(server):
    counters = requests.get(server + "/rksc/status", timeout=60).json()["ranks"][0]["counters"]
    assert counters["held_requests"] >= 7
    assert counters["errors"] == 0
