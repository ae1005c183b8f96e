"""What benchmarks compute from their measurements."""

import json

import numpy as np
import pytest

from benchmarks import cpu_attention, harness, overhead
from benchmarks.statistics import geometric_mean_ratio, paired_ratio
from benchmarks.text import Passages, machine_texts


def test_a_ratio_of_pairs_does_not_see_drift():
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 5, 40)
    base = drift * rng.normal(1, 0.01, 40)
    other = 2 * drift * rng.normal(1, 0.01, 40)
    result = paired_ratio(other, base)
    assert result["low"] < 2 < result["high"]
    assert result["high"] - result["low"] < 0.05
    assert result["ratio"] == pytest.approx(2, rel=0.02)


def test_a_geometric_mean_of_two_workloads():
    result = geometric_mean_ratio([[2.0] * 5, [8.0] * 5])
    assert result == pytest.approx({"ratio": 4, "low": 4, "high": 4})


@pytest.mark.parametrize("bad", [[], [0.0], [float("nan")], [-1.0]])
def test_what_is_no_measurement_is_refused(bad):
    with pytest.raises(ValueError, match="pairs of positive finite numbers"):
        paired_ratio(bad, [1.0] * len(bad))


def row(workload, condition, repeat, **measured):
    return {
        "workload": workload,
        "condition": condition,
        "repeat": repeat,
        "position": 0,
        **measured,
    }


def test_cpu_attention_is_summarised_from_its_rows():
    rows = [
        row(workload, backend, repeat, seconds=seconds, logprobs=[-1.0, -2.0 - seconds / 1e6])
        for workload in ("cached_extend", "decode_b16", "fork_decode", "decode_b1")
        for backend, seconds in (("torch_native", 3.0), ("rksc_cpu", 1.0))
        for repeat in range(3)
    ]
    summary = cpu_attention.summarise(rows)
    assert summary["cached_extend_speedup"] == summary["worst_speedup"] == 3
    assert summary["max_logprob_difference"] == pytest.approx(2e-6)


def test_overhead_is_summarised_from_its_rows():
    rows = [
        row(
            f"{model}/{workload}",
            f"{model}-{name}",
            repeat,
            throughput=throughput,
            ttft=1.0,
            requests=4,
            cache_microseconds=work,
        )
        for model in overhead.MODELS
        for workload in ("unrelated", "one_long")
        for name, throughput, work in (
            ("stock", 100.0, {}),
            ("exact", 99.0, {"match": 40, "insert": 80, "evict": 0}),
            ("balanced", 50.0, {"match": 400, "insert": 800, "evict": 4}),
        )
        for repeat in range(3)
    ]
    rows[0]["throughput"] = 1.0  # an outlier is no median
    summary = overhead.summarise(rows)
    assert summary["throughput_ratio"]["ratio"] == pytest.approx(0.99)
    assert summary["ttft_ratio"]["ratio"] == 1
    assert summary["microseconds_per_request"] == {"match": 10, "insert": 20, "evict": 0}
    assert summary["throughput_ratios"]["tiny/one_long"] == pytest.approx(0.99)
    assert summary["balanced"]["worst_throughput_ratio"] == pytest.approx(0.5)
    assert summary["balanced"]["microseconds_per_request"]["evict"] == 1


def test_a_stored_result_is_summarised_again(tmp_path, capsys):
    rows = [
        row(workload, backend, 0, seconds=1.0, logprobs=[-1.0])
        for workload in ("cached_extend", "decode_b16", "fork_decode")
        for backend in cpu_attention.BACKENDS
    ]
    path = tmp_path / "result.json"
    harness.report({"benchmark": "benchmarks.cpu_attention", "rows": rows}, path)
    stored = json.loads(path.read_text())
    assert stored["summary"]["worst_speedup"] == 1
    assert "worst_speedup" in capsys.readouterr().out


class FakeServer:
    """Stands for a server process; ``up`` has those that run."""

    up: list[str] = []

    def __init__(self, flags, log):
        self.url = flags[0]

    def __enter__(self):
        self.up.append(self.url)
        return self

    def __exit__(self, *exc):
        self.up.remove(self.url)

    def wait_ready(self):
        pass

    def check(self):
        pass


@pytest.fixture
def fake_servers(monkeypatch):
    monkeypatch.setattr(harness, "ServerProcess", FakeServer)
    monkeypatch.setattr(harness, "SETTLING_SECONDS", 0)


@pytest.fixture
def measured(fake_servers, monkeypatch):
    """Rows of two groups, and what each call of a case saw."""
    monkeypatch.setattr(harness, "report", lambda result, path: result)
    calls = []

    def case(url, rng):
        calls.append((url, sorted(FakeServer.up)))
        return {"seconds": rng.random()}

    conditions = [harness.Condition(name, [name], name[0]) for name in ("a1", "a2", "b1", "b2")]
    cases = [harness.Case(f"{group}/{i}", case, group) for group in "ab" for i in range(3)]
    args = harness.parser("").parse_args(["--seed", "5"])
    return harness.run("benchmarks.none", args, conditions, cases, 2)["rows"], calls


def test_each_case_runs_under_every_condition_of_its_group_and_no_other(measured):
    rows, calls = measured
    assert len(rows) == 2 * 2 * 3 * 2
    assert {(r["workload"][0], r["condition"][0]) for r in rows} == {("a", "a"), ("b", "b")}
    assert {tuple(up) for _, up in calls} == {("a1", "a2"), ("b1", "b2")}
    assert FakeServer.up == []


def test_pairs_are_the_same_work(measured):
    rows, calls = measured
    for workload in ("a/0", "b/2"):
        ours, stock = harness.pairs(rows, workload, "seconds", f"{workload[0]}1", f"{workload[0]}2")
        assert ours == stock
        assert len(set(ours)) == 2
    assert [url for url, _ in calls[:12:2]] != ["a1"] * 6  # the order of conditions varies


def test_a_failed_condition_reports_nothing(fake_servers, monkeypatch):
    monkeypatch.setattr(harness, "report", lambda *_: pytest.fail("reported"))

    def case(url, rng):
        raise harness.BenchmarkError("no answer")

    conditions = [harness.Condition("a", ["a"])]
    with pytest.raises(harness.BenchmarkError, match="no answer"):
        harness.run(
            "x", harness.parser("").parse_args([]), conditions, [harness.Case("w", case)], 1
        )
    assert FakeServer.up == []


def test_passages_are_real_text_and_never_repeat():
    texts = machine_texts()
    passages = Passages(texts, seed=3)
    assert passages.take(50) == Passages(texts, seed=3).take(50)
    first, second = passages.take(50), passages.take(50)
    assert len(first.split()) == 50
    assert first != second
    with pytest.raises(ValueError, match="out of text"):
        Passages(["too short"], seed=0).take(3)
