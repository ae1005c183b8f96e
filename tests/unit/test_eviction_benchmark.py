"""Replays of traces, and the summary of benchmarks.eviction."""

import json
import random
from array import array

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import eviction
from benchmarks.eviction import FREEING, OURS, STOCK, VARIANTS
from benchmarks.eviction_replay import Policy, clairvoyant, read_trace, replay, smallest_pool
from rksc_sglang.rsbcm.trace import End, Finish, Report, Start, TraceWriter, read_events

TENANT = (None, None)


@st.composite
def traces(draw):
    """Programs that overlap: prompts with common beginnings, outputs, reports, ends."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    events, running, texts = [], [], [[1], [2]]
    for number in range(draw(st.integers(1, 25))):
        now = float(number)
        if running and rng.random() < 0.4:
            rid, text = running.pop(rng.randrange(len(running)))
            output = [rng.randrange(3) for _ in range(rng.randrange(3))]
            events.append(Finish(now, rid, array("q", output), None))
            texts.append(text + output)
        elif rng.random() < 0.2:
            states = {rng.randrange(3): rng.choice(["pruned", "joined", "frontier"])}
            events.append(Report(now, TENANT, f"g{rng.randrange(3)}", states))
        elif rng.random() < 0.1:
            events.append(End(now, TENANT, f"p{rng.randrange(2)}"))
        else:
            text = rng.choice(texts) + [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            group = rng.randrange(3)
            names = (f"p{group % 2}", f"g{group}", rng.randrange(3))
            events.append(Start(now, str(number), array("q", text), TENANT, *names))
            running.append((str(number), text))
    events += [Finish(99.0, rid, array("q")) for rid, _ in running]
    return events


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(events=traces(), spare=st.integers(0, 10))
def test_no_policy_beats_the_clairvoyant_one(sglang_runtime, events, spare):
    smallest, whole = smallest_pool(events)
    if not whole:
        return
    capacity = smallest + spare
    bound = clairvoyant(events, capacity)
    policies = [Policy("lru", "lru"), Policy("slru", "slru"), OURS, FREEING]
    for policy in policies:
        outcome = replay(events, capacity, policy)
        assert outcome.prompt_tokens == bound.prompt_tokens
        assert outcome.recomputed_tokens >= bound.recomputed_tokens, policy
    # Ours gives back what pruned branches leave even where there is plenty.
    plenty = replay(events, 1000, policies[0])
    assert plenty.recomputed_tokens == clairvoyant(events, 1000).recomputed_tokens
    assert plenty.evicted_tokens == 0


def test_the_clairvoyant_policy_keeps_what_is_needed_next(sglang_runtime):
    events = []
    for number, text in enumerate(([1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3], [4, 5, 6])):
        events += [Start(0.0, str(number), array("q", text)), Finish(0.0, str(number), array("q"))]
    # Of two texts in the pool the one goes that is needed last; a last token is always computed.
    assert clairvoyant(events, 6).recomputed_tokens == 3 + 3 + 3 + 1 + 3
    assert replay(events, 6, Policy("lru", "lru")).recomputed_tokens == 5 * 3


def test_what_a_server_writes_is_read_again(tmp_path):
    writer = TraceWriter(tmp_path / "trace.jsonl")
    for _ in range(2):  # a request is in the tree before and after its decoding
        names = {"program": "p", "group": "g", "branch": 1, "verifies": True}
        writer.start("a", [1, 2], ("tenant", None), **names)
    writer.finish("a", [3], [0.12345, 0.5, 0.0])
    writer.finish("unknown", [3], None)
    writer.report(("tenant", None), "g", {1: "pruned"})
    writer.end(("tenant", None), "p")
    with (tmp_path / "trace.jsonl").open() as lines:
        start, finish, report, end = read_events(lines)
    assert start[1:] == ("a", array("q", [1, 2]), ("tenant", None), "p", "g", 1, True)
    assert finish[1:] == ("a", array("q", [3]), [0.12, 0.5, 0.0])
    assert report[1:] == (("tenant", None), "g", {1: "pruned"})
    assert end[1:] == (("tenant", None), "p")
    with pytest.raises(ValueError, match="no event"):
        list(read_events(['{"time": 1}']))


def test_a_public_trace_is_read_block_by_block(tmp_path):
    path = tmp_path / "public.jsonl"
    rows = [{"timestamp": 1000 * i, "hash_ids": [1, 2, 3 + i]} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    events, unit = read_trace(path, limit=2)
    assert unit == 512
    assert [event.time for event in events] == [0, 0, 1, 1]
    assert events[2].tokens == array("q", [1, 2, 4])


def rows_of(workload, recomputed, reasoning=True):
    names = [*(policy.name for policy in (*STOCK, OURS, *VARIANTS)), "clairvoyant"]
    return [
        {
            "workload": workload,
            "condition": name,
            "reasoning": reasoning,
            "recomputed_tokens": recomputed.get(name, 100),
            "prompt_tokens": 200,
            "hit_rate": 1 - recomputed.get(name, 100) / 200,
            "evicted_tokens": 10,
            "evict_seconds": 1e-5,
        }
        for name in names
    ]


def test_the_summary_says_how_much_of_the_gap_is_closed_and_at_what_regret():
    rows = rows_of("a/0.1", {"clairvoyant": 50, "rksc": 60, "lfu": 90, "lru-freeing": 95})
    rows += rows_of("b/0.1", {"clairvoyant": 50, "rksc": 80, "lfu": 90, "lru-freeing": 95})
    rows += rows_of("public/0.1", {"clairvoyant": 10, "rksc": 100, "slru-2": 98}, reasoning=False)
    summary = eviction.summarise(rows)
    assert summary["gap_closed"]["value"] == pytest.approx(60 / 100)
    assert 0.4 <= summary["gap_closed"]["low"] <= 0.6 <= summary["gap_closed"]["high"] <= 0.8
    assert summary["gap_closed_by_best_stock"]["policy"] == "lfu"
    assert summary["gap_closed_by_best_stock"]["value"] == pytest.approx(0.2)
    assert summary["gap_closed_by_lru_freeing"]["value"] == pytest.approx(0.1)
    assert summary["worst_regret"] == pytest.approx(1.0)
    assert summary["evict_us_per_token"] == pytest.approx(1.0)


def test_the_summary_of_a_live_run_is_against_the_best_stock_policy():
    speeds = {"lru": 1.0, "lfu": 0.8, "slru": 1.1, "rksc": 1.32, "rksc-mass": 1.3}
    rows = [
        {
            "workload": "mixed",
            "condition": name,
            "repeat": repeat,
            "position": 0,
            "problems_per_second": speed,
            "decode_seconds": 10.0,
            "mass_seconds": 0.05 if name == "rksc-mass" else 0.0,
        }
        for repeat in range(3)
        for name, speed in speeds.items()
    ]
    summary = eviction.summarise(rows)
    assert summary["server_speedup_vs_best_stock"]["policy"] == "slru"
    assert summary["server_speedup_vs_best_stock"]["ratio"] == pytest.approx(1.2)
    assert summary["mass_overhead"] == pytest.approx(0.005)
