"""benchmarks/kernels at a tiny size, on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.harness import BenchmarkError
from benchmarks.kernels import Model, Sizes, make_cases, measure, summarise
from rksc_sglang.kernels.rotate_copy import rotate_copy

ROOT = Path(__file__).parents[2]
TINY = Sizes((Model("a", 2, 2, 8), Model("b", 1, 1, 4)), (4, 8, 16), (3,), 32, 60, 1 << 16)
SPLICES = {f"splice {name} {dtype}" for name in "ab" for dtype in ("bfloat16", "float32")}
WORKLOADS = {"copy", *SPLICES, "exit projection", "exit check", "attention mass"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_all_cases_are_right_timed_and_summarised():
    cases = make_cases(TINY, "cpu")
    assert {case.workload for case in cases} == WORKLOADS
    names = [(case.workload, case.condition) for case in cases]
    assert len(set(names)) == len(names)

    rows = measure(cases, "cpu", 2, seed=0)
    assert [(row["workload"], row["condition"]) for row in rows[::2]] == names
    assert [row["repeat"] for row in rows] == [0, 1] * len(cases)
    for row in rows:
        assert min(row["rksc_us"], row["floor_us"], row["host_us"]) > 0
        assert ("baseline_us" in row) == (row["workload"] not in ("copy", "attention mass"))

    summary = summarise(rows)
    assert summary["bandwidth_gb_s"] > 0
    assert set(summary["floor_share"]) == WORKLOADS - {"copy"}
    assert set(summary["least_speedup"]) == WORKLOADS - {"copy", "attention mass"}


def test_what_a_splice_must_move():
    [case, *_] = [case for case in make_cases(TINY, "cpu") if case.workload.startswith("splice a")]
    assert case.condition == "4 scattered, one delta"
    # 4 tokens, read and written, K and V, 2 layers of 2 heads of 8 values of 2 bytes;
    # two slot numbers for each token; cosines and sines of 4 pairs.
    assert case.bytes == 4 * 2 * 2 * 2 * 2 * 8 * 2 + 4 * 2 * 8 + 2 * 4 * 4


def test_the_summary_is_of_medians():
    def rows(workload, size, times, **more):
        row = {"workload": workload, "condition": "", "bytes": size, **more}
        return [{**row, "rksc_us": us} for us in times]

    summary = summarise(
        [
            *rows("copy", 6000, [2.0, 3.0, 90.0]),
            *rows("exit", 10, [4.0, 4.0, 1.0], floor_us=1.0, baseline_us=8.0),
            *rows("exit", 20, [4.0, 4.0, 9.0], floor_us=2.0, baseline_us=16.0),
        ]
    )
    assert summary == {
        "bandwidth_gb_s": 2.0,
        "floor_share": {"exit": 0.5},
        "least_speedup": {"exit": 2.0},
    }


def skips_the_last_layer(keys, values, *args):
    rotate_copy(keys[:-1], values[:-1], *args)


def forgets_to_turn(keys, values, source, target, rotation):
    rotate_copy(keys, values, source, target, None)


def writes_elsewhere_too(keys, values, source, target, rotation):
    rotate_copy(keys, values, source, target, rotation)
    values[0][source[0]] += 1


@pytest.mark.parametrize("wrong", [skips_the_last_layer, forgets_to_turn, writes_elsewhere_too])
def test_a_wrong_kernel_is_not_timed(monkeypatch, wrong):
    monkeypatch.setattr(kernels, "rotate_copy", wrong)
    with pytest.raises(BenchmarkError, match=r"splice a bfloat16, 4 scattered.* wrong"):
        measure(make_cases(TINY, "cpu"), "cpu", 1, seed=0)


def test_it_needs_no_sglang():
    code = "import sys; sys.modules['sglang'] = None; import benchmarks.kernels"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
