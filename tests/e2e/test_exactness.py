"""Mode exact against stock SGLang: what a client sees is the same, token for token.

A tiny random model in float32, so that many prompts cost little; both servers run the same flags,
with a pool small enough that prefixes are evicted all the time. ``--long`` has ten times as many
prompts, and pages of 16 tokens as well.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

PROMPTS = 100
CLOSE = 1e-4
WORDS = "sum of the red and blue numbers before noon is seven or eight if rain stops".split()


def forks(seed, count):
    """Groups of siblings, ``count`` prompts in all: a common prefix, and an end of each one's own.

    Groups share prefixes with earlier groups too, by a few words or by most.
    """
    rng = random.Random(seed)
    roots = [words(rng, 5, 120) for _ in range(8)]
    while count > 0:
        prefix = rng.choice(roots)[: rng.randint(20, 600)]
        siblings = min(count, rng.choice([1, 1, 2, 4, 7]))
        yield [f"{prefix} {words(rng, 1, 30)}" for _ in range(siblings)]
        count -= siblings


def words(rng, fewest, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))


def ask(url, text, **options):
    """One request; several prompts arrive as one batch."""
    body = {
        "text": text,
        "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True},
        **options,
    }
    return requests.post(url + "/generate", json=body, timeout=120)


def seen(answer):
    """What a client sees, less what may differ: ids, times, and cached_tokens."""
    body = answer.json()
    meta = body.get("meta_info", {})
    return (
        answer.status_code,
        body.get("output_ids"),
        body.get("text"),
        {k: v for k, v in meta.items() if "logprobs" in k or k in ("finish_reason",)},
    )


def status(url):
    return requests.get(url + "/rksc/status", timeout=60).json()["ranks"][0]


LOGPROBS = [
    {},
    {"return_logprob": True, "top_logprobs_num": 3},
    {"return_logprob": True, "logprob_start_len": 0, "token_ids_logprob": [5, 9]},
]


@pytest.mark.parametrize("seed", [0])
def test_one_at_a_time_it_is_bit_equal(rksc_tiny, stock_tiny, seed, pytestconfig, report):
    """Prompts, forks, their next turns, and requests for log-probabilities, one after the other."""
    count = PROMPTS * (10 if pytestconfig.getoption("--long") else 1)
    rng = random.Random(seed)
    asked = 0
    for siblings in forks(seed, count):
        for text in siblings:
            options = rng.choice(LOGPROBS)
            answer = ask(rksc_tiny, text, **options)
            assert seen(answer) == seen(ask(stock_tiny, text, **options))
            asked += 1
            if rng.random() < 0.2:
                turn = f"{text}{answer.json()['text']} {words(rng, 1, 8)}"
                assert seen(ask(rksc_tiny, turn)) == seen(ask(stock_tiny, turn))
                asked += 1
    report(f"exactness, one at a time, seed {seed}: {asked} requests bit-equal")


@pytest.mark.parametrize("name", ["rksc_tiny", "evicting_tiny"])
def test_together_tokens_are_equal_unless_the_top_two_are(
    request, name, stock_tiny, pytestconfig, report
):
    """Forks whose siblings arrive together, several forks at the same time.

    Under another eviction policy other prefixes are cached, and sums are of other lengths.
    """
    rksc_url = request.getfixturevalue(name)
    count = PROMPTS * (10 if pytestconfig.getoption("--long") else 1)
    groups = list(forks(2, count))

    def send(url, number):
        # Every other fork wants its prompts' log-probabilities, and shares no cached prefix then.
        options = {"logprob_start_len": 0} if number % 2 else {}
        answer = ask(url, groups[number], return_logprob=True, top_logprobs_num=2, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    answers = []
    for url in (rksc_url, stock_tiny):
        with ThreadPoolExecutor(6) as pool:
            replies = pool.map(lambda number, url=url: send(url, number), range(len(groups)))
            answers.append([answer for reply in replies for answer in reply])
    ties, largest = 0, 0.0
    for ours, stock in zip(*answers, strict=True):
        a, b = ours["meta_info"], stock["meta_info"]
        pairs = list(zip(a["input_token_logprobs"], b["input_token_logprobs"], strict=True))
        for step, (one, other) in enumerate(
            zip(a["output_token_logprobs"], b["output_token_logprobs"], strict=True)
        ):
            if one[1] != other[1]:
                top = b["output_top_logprobs"][step]
                assert abs(top[0][0] - top[1][0]) < CLOSE
                ties += 1
                break  # Behind a tie the continuations are different texts.
            pairs.append((one, other))
        differences = [abs(x[0] - y[0]) for x, y in pairs if x[0] is not None]
        largest = max(largest, *differences)
    report(
        f"exactness, together, {name}: {len(answers[0])} prompts in {len(groups)} forks, {ties} of "
        f"them parted where stock's top two are closer than {CLOSE}; "
        f"log-probabilities differ by at most {largest:.1e}"
    )
    assert largest < CLOSE


@pytest.mark.parametrize("name", ["rksc_tiny", "evicting_tiny"])
def test_siblings_were_held_back_and_prefixes_evicted(request, name, tiny_servers):
    """What the tests above compared is not stock against stock."""
    url = request.getfixturevalue(name)
    for seed in range(100, 120):
        if status(url)["counters"]["held_requests"]:
            break
        # How the forks above fell into batches is chance: more of them, behind new prefixes.
        prefix = words(random.Random(seed), 100, 120)
        ask(url, [f"{prefix} {number}" for number in range(6)])
    rank = status(url)
    assert rank["counters"]["held_requests"] > 0
    assert rank["cache"]["timings"]["evict"]["calls"] > 0


@pytest.mark.parametrize(
    "body",
    [
        {"text": "x", "sampling_params": {"temperature": -1}},
        {"text": "x", "sampling_params": {"max_new_tokens": -3}},
        {"sampling_params": {}},
        {"text": "word " * 5000},
    ],
)
def test_errors_are_stocks_own(rksc_tiny, stock_tiny, body):
    ours, stock = (
        requests.post(url + "/generate", json=body, timeout=60) for url in (rksc_tiny, stock_tiny)
    )
    assert (ours.status_code, ours.json()) == (stock.status_code, stock.json())
