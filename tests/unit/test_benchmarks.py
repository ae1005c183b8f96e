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
        )
        for repeat in range(3)
    ]
    summary = overhead.summarise(rows)
    assert summary["throughput_ratio"]["ratio"] == pytest.approx(0.99)
    assert summary["ttft_ratio"]["ratio"] == 1
    assert summary["microseconds_per_request"] == {"match": 10, "insert": 20, "evict": 0}


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


def test_passages_are_real_text_and_never_repeat():
    texts = machine_texts()
    passages = Passages(texts, seed=3)
    assert passages.take(50) == Passages(texts, seed=3).take(50)
    first, second = passages.take(50), passages.take(50)
    assert len(first.split()) == 50
    assert first != second
    with pytest.raises(ValueError, match="out of text"):
        Passages(["too short"], seed=0).take(3)
