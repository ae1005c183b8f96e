"""``benchmarks.throughput``: its load, its conditions, and its summary of rows that are known."""

import itertools
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks import load, throughput, throughput_tasks
from benchmarks.harness import BenchmarkError
from benchmarks.load import Done, Meter, work
from benchmarks.programs import PROGRAMS, Mechanisms, Outcome, Program, Settings
from benchmarks.throughput_conditions import NOTHING, PAPER, conditions_of, mechanisms_of
from benchmarks.throughput_summary import accuracy_delta, plot, print_bars, ratios, summarise
from benchmarks.throughput_tasks import (
    Task,
    in_the_papers_length,
    solved_examples,
    tasks_of,
    with_lengths,
)
from rksc_sglang.cgee.profile import ExitProfileError
from rksc_sglang.models.problems import check, problems
from rksc_sglang.models.reasoner import WEIGHTS

# Summary


def row(condition, throughput, program="debate", repeat=0, **changed):
    part, model = changed.get("part", "speed"), changed.get("model", "smollm2")
    place = changed.get("load", "4")
    return {
        "workload": f"{model}/{part}/{program}/{place}",
        "condition": condition,
        "repeat": f"0/{repeat}",
        "position": 0,
        "model": model,
        "part": part,
        "program": program,
        "load": place,
        "seed": 0,
        "throughput": throughput,
        "seconds": [1 / throughput, 3 / throughput],
        "problems": [2 * repeat, 2 * repeat + 1],
        "right": [True, False],
        "computed_tokens": 10.0,
        "generated_tokens": 5.0,
        "peak_kv_tokens": 100.0,
        **changed,
    }


def speed_rows(**throughputs):
    """Two programs; in the second RKSC is twice as fast as in the first, against everybody."""
    rows = []
    for program in "ab":
        for repeat, drift in enumerate((1.0, 5.0, 2.0)):
            for part in ("speed", "no_kv"):
                for condition in throughput.PARTS[part]:
                    value = drift * throughputs[condition]
                    if (program, condition) == ("b", "rksc"):
                        value *= 2
                    rows.append(row(condition, value, program, repeat, part=part))
    return rows


def test_speedups_are_geometric_means_over_programs_of_paired_rounds():
    summary = summarise(speed_rows(no_kv=1.0, sglang=2.0, sglang_best=4.0, rksc=4.0))
    root = 2**0.5
    assert summary["speedup_vs_no_kv"]["ratio"] == pytest.approx(4 * root)
    assert summary["speedup_vs_sglang"]["ratio"] == pytest.approx(2 * root)
    best = summary["speedup_vs_sglang_best"]
    assert best == pytest.approx({"ratio": root, "low": root, "high": root})
    assert summary["models"]["smollm2"]["programs"]["sglang_best"] == pytest.approx(
        {"a": 1, "b": 2}
    )
    assert summary["worst_program_ratio"] == pytest.approx(1)


def test_one_slow_program_is_the_worst_and_not_averaged_away():
    rows = speed_rows(no_kv=1.0, sglang=2.0, sglang_best=4.0, rksc=3.0)
    summary = summarise(rows)
    assert summary["worst_program_ratio"] == pytest.approx(0.75)
    assert summary["speedup_vs_sglang_best"]["low"] > 1


def test_rounds_that_only_one_condition_has_are_no_pairs():
    rows = speed_rows(no_kv=1.0, sglang=2.0, sglang_best=4.0, rksc=4.0)
    rows.append(row("rksc", 1e6, "a", repeat=7))
    assert summarise(rows)["models"]["smollm2"]["programs"]["sglang_best"]["a"] == pytest.approx(1)
    # Nor are those of different parts, or of different loads.
    rows = [row("rksc", 8.0, part="no_kv"), row("sglang_best", 1.0), row("rksc", 2.0, load="1")]
    assert ratios(rows, "rksc", "sglang_best") == {}


def test_parts_that_were_not_run_have_no_bar():
    summary = summarise([row("rksc", 3.0), row("sglang_best", 2.0)])
    assert summary["speedup_vs_sglang_best"]["ratio"] == pytest.approx(1.5)
    for bar in ("speedup_vs_no_kv", "speedup_vs_sglang", "paper_setting_vs_no_kv"):
        assert summary[bar] is None
    print_bars(summary)


def test_speed_is_judged_on_smollm2_and_accuracy_on_the_other_model():
    rows = [
        *(row(c, t, right=[False, False]) for c, t in (("rksc", 3.0), ("sglang_best", 2.0))),
        row("rksc", 1.0, model="m", part="accuracy", right=[True, True]),
        row("sglang_best", 2.0, model="m", part="accuracy", right=[True, False]),
    ]
    summary = summarise(rows)
    assert summary["speedup_vs_sglang_best"]["ratio"] == pytest.approx(1.5)
    assert summary["accuracy_delta"]["value"] == pytest.approx(50)
    other = summary["models"]["m"]
    assert other["speedups"]["sglang_best"]["ratio"] == pytest.approx(0.5)
    assert other["accuracy"]["rksc"]["debate"]["mean"] == 1
    assert summary["models"]["smollm2"]["accuracy_delta"]["value"] == 0


def test_accuracy_where_the_model_ended_by_itself_goes_before_that_at_given_lengths():
    rows = [
        *(row(c, 1.0, right=[False, False]) for c in ("rksc", "sglang_best")),
        row("rksc", 1.0, part="accuracy", right=[True, False]),
        row("sglang_best", 1.0, part="accuracy", right=[True, True]),
    ]
    assert summarise(rows)["accuracy_delta"]["value"] == pytest.approx(-50)


def test_programs_that_solve_the_same_problem_are_one_observation():
    rows = [
        row(condition, 1.0, program, repeat, right=[condition == "rksc" or repeat < 30, True])
        for program in ("a", "b", "c")
        for repeat in range(40)
        for condition in ("rksc", "sglang_best")
    ]
    delta = accuracy_delta(rows, "rksc", "sglang_best")
    assert delta["problems"] == 80
    assert delta["value"] == pytest.approx(100 * 10 / 80)
    # Of 80 independent observations; 240 would give an interval of 8 points.
    assert 12 < delta["high"] - delta["low"] < 17
    rows = [r for r in rows if r["condition"] == "rksc"]
    assert accuracy_delta(rows, "rksc", "sglang_best") is None


def test_programs_weigh_alike_however_many_problems_each_had():
    rows = [
        row("rksc", 1.0, "a", right=[True] * 2),
        row("sglang_best", 1.0, "a", right=[False] * 2),
        *(row(c, 1.0, "b", r, right=[True] * 2) for c in ("rksc", "sglang_best") for r in (1, 2)),
    ]
    assert accuracy_delta(rows, "rksc", "sglang_best")["value"] == pytest.approx(50)


def test_what_each_mechanism_adds_by_program():
    rows = [
        row(condition, throughput, program, part="ablations")
        for program, both in (("a", 6.0), ("b", 4.0))
        for condition, throughput in (("rksc", both), ("rksc_no_splice", 4.0))
    ]
    without = summarise(rows)["models"]["smollm2"]["without"]
    assert without["rksc_no_splice"] == pytest.approx({"a": 1.5, "b": 1.0})
    assert without.keys() == {"rksc_no_splice"}


def test_the_papers_row_is_printed_beside_ours(capsys):
    rows = [
        row(condition, throughput, f"paper_setting_{new}", part="paper", right=[])
        for new, rksc in ((8, 8.0), (32, 2.0))
        for condition, throughput in (("no_kv", 1.0), ("sglang_best", 2.0), ("rksc", rksc))
    ]
    summary = summarise(rows)
    assert summary["paper_setting_vs_no_kv"]["ratio"] == pytest.approx(4)
    assert summary["accuracy_delta"] is None
    paper = summary["models"]["smollm2"]["paper"]
    assert paper["rksc/no_kv"]["paper_setting_8"]["ratio"] == pytest.approx(8)
    assert paper["sglang_best/no_kv"]["all"]["ratio"] == pytest.approx(2)
    print_bars(summary)
    line = next(line for line in capsys.readouterr().out.splitlines() if "3.008" in line)
    assert "4.00 [4.00, 4.00]" in line


def test_seconds_of_problems_are_pooled():
    rows = [row("rksc", 1.0, part="open", load="open", seconds=[float(s) for s in range(101)])]
    summary = summarise(rows)["models"]["smollm2"]
    assert summary["open_loop"]["rksc"] == pytest.approx({"debate p50": 50, "debate p95": 95})
    assert summary["workloads"]["smollm2/open/debate/open"]["rksc"]["p95"] == pytest.approx(95)


# Load


def test_a_closed_loop_keeps_so_many_tasks_in_work_and_no_more():
    now, most, lock = 0, 0, threading.Lock()
    full = threading.Barrier(3, timeout=60)

    def solve(task):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        full.wait()
        with lock:
            now -= 1
        return 10 * task

    worked = work(range(9), solve, 3)
    assert most == 3
    assert worked.results == [10 * task for task in range(9)]
    assert worked.wall >= max(worked.seconds)


def test_an_arrival_that_finds_the_server_busy_has_its_waiting_counted():
    worked = work(range(3), lambda task: time.sleep(0.05), 1, arrivals=[0.0, 0.0, 0.0])
    assert worked.seconds[2] >= 0.15
    apart = work(range(2), lambda task: None, 2, arrivals=[0.0, 0.2])
    assert apart.wall >= 0.2
    assert apart.seconds[1] < 0.2


METRICS = """# TYPE sglang:realtime_tokens_total counter
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m",tp_rank="0"} 4875.0
sglang:realtime_tokens_total{mode="prefill_cache",model_name="m",tp_rank="0"} 13395.0
sglang:generation_tokens_total{is_streaming="false",model_name="m"} 1.4e+03
sglang:generation_tokens_total{is_streaming="true",model_name="m"} 32.0
sglang:cuda_graph_passes_total{mode="prefill_none",model_name="m"} 11.0
sglang:cuda_graph_passes_total{mode="decode_none",model_name="m"} 60.0
sglang:cuda_graph_passes_total{mode="decode_cuda_graph",model_name="m"} 2.0
"""


def test_tokens_and_passes_are_read_from_the_servers_metrics(monkeypatch):
    class Answer:
        text = METRICS

        def raise_for_status(self):
            pass

    monkeypatch.setattr(load.requests, "get", lambda url, timeout: Answer())
    assert Meter("http://x").done() == Done(4875, 1432, 11, 62)


# Tasks


def test_problems_are_the_same_from_the_same_seed_and_none_comes_twice():
    def draw(program, seed, count=150):
        return [task.text for task in itertools.islice(tasks_of(program, seed, None, 0), count)]

    assert draw("debate", 1) == draw("best_of_n", 1) != draw("debate", 2)
    assert len(set(draw("debate", 0))) == 150
    assert all(text.startswith("Facts: ") for text in draw("document_qa", 0, 20))


def test_right_answers_are_known():
    tasks = tasks_of("debate", 0, None, 0)
    for task, problem in zip(itertools.islice(tasks, 5), problems("test", 0)):
        assert task.text == problem.question
        assert task.is_right(problem.answer)
        assert not task.is_right("wrong")
        assert not task.is_right(None)


@pytest.fixture
def few_texts(monkeypatch):
    """Reading all of the machine's takes seconds."""
    texts = [f"{place} words " * 2000 for place in ("some", "more")]
    monkeypatch.setattr(throughput_tasks, "machine_texts", lambda: texts)


def test_a_file_of_questions_can_be_used(tmp_path, few_texts):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "So. #### 1,018"}))
    tasks = tasks_of("document_qa", 0, path, 60)
    first, second = next(tasks), next(tasks)
    for task in (first, second):
        assert task.text.endswith("\n\nHow many?")
        assert len(task.text.split()) == 62
        assert task.is_right("1018")
        assert not task.is_right("18")
        assert not task.is_right(None)


def test_lengths_vary_within_their_span_and_not_between_conditions():
    tasks = [Task("?", bool)] * 40
    drawn = [task.lengths for task in with_lengths(iter(tasks), (8, 16), 12, 3)]
    assert drawn == [task.lengths for task in with_lengths(iter(tasks), (8, 16), 12, 3)]
    assert {length for lengths in drawn for length in lengths} == set(range(8, 17))
    assert all(len(lengths) == 12 for lengths in drawn)


def test_the_papers_prompts_have_its_length(few_texts):
    class Words:
        def encode(self, text, add_special_tokens):
            return text.split()

        def decode(self, tokens):
            return " ".join(tokens)

    tasks = in_the_papers_length(iter([Task("What is it?", bool)] * 2), 0, Words(), 8)
    first, second = tasks
    assert first.text.endswith("\n\nWhat is it?")
    assert len(first.text.split()) == len(second.text.split()) == 1024
    assert first.lengths == (8,)


def test_examples_are_solved_problems_of_the_training_split():
    drawn = problems("train", 0, ("chain", "legs", "order"), (1,))
    trained = {problem.question: problem for problem in itertools.islice(drawn, 3)}
    examples = solved_examples(3)
    assert len(examples) == 3
    assert all(check(trained[question], solution) for question, solution in examples)


# Conditions


def test_each_mechanism_that_there_is_is_left_out_once():
    everything = Mechanisms(share="similar", exit="layer", skip="calibrated")
    found = {c.name: c for c in conditions_of("ablations", everything)}
    assert list(found) == [
        "rksc",
        "rksc_no_root_first",
        *(f"rksc_no_{name}" for name in ("splice", "exit", "skip", "stop")),
    ]
    assert found["rksc_no_splice"].mechanisms == Mechanisms("exact", "layer", "calibrated")
    assert found["rksc_no_root_first"].mechanisms == everything
    without_profile = [c.name for c in conditions_of("ablations", Mechanisms(exit="off"))]
    assert without_profile == ["rksc", "rksc_no_root_first", "rksc_no_splice", "rksc_no_stop"]


def test_what_is_calibrated_for_a_model_is_known_before_its_servers_run(tmp_path):
    assert mechanisms_of(None, WEIGHTS).exit == "layer"
    elsewhere = mechanisms_of(None, tmp_path / "no-directory")
    assert elsewhere == Mechanisms(share="similar", exit="off")
    with pytest.raises(ExitProfileError, match="is no profile"):
        mechanisms_of(str(tmp_path / "missing.json"), tmp_path / "no-directory")


def test_the_baselines_use_nothing_of_rksc():
    for part in ("speed", "no_kv", "open", "accuracy", "paper"):
        for condition in conditions_of(part, Mechanisms()):
            ours = PAPER if part == "paper" else Mechanisms()
            assert condition.mechanisms == (ours if condition.name == "rksc" else NOTHING)
    assert not PAPER.stop


@pytest.fixture
def part(monkeypatch):
    """A part of two programs, its rows on servers that count, and what was asked of them.

    Programs with RKSC know all answers, those without none.
    """
    asked = []
    answers = {p.question: p.answer for p in itertools.islice(problems("test", 0), 80)}

    def form(name):
        def run(text, settings, *mechanisms, backend, **options):
            asked.append((name, backend, text, settings.lengths, *mechanisms, options))
            answer = answers.get(text) if name == "solve" else None
            return SimpleNamespace(ret_value=Outcome(answer, "", [""], {}))

        return SimpleNamespace(run=run)

    program = Program("fake", form("solve"), form("solve_plain"))
    monkeypatch.setattr(throughput, "PROGRAMS", dict.fromkeys(PROGRAMS, program))
    for grown in (throughput.self_consistency, throughput.document_qa):
        named = program._replace(name=grown.PROGRAM.name)
        monkeypatch.setattr(grown, "PROGRAM", named)

    class FakeMeter:
        def __init__(self):
            self.count = 0

        def emptied(self):
            self.count += 1
            return Done(100 * self.count, 10 * self.count, 3 * self.count, self.count)

        @contextmanager
        def peak(self):
            yield lambda: 7

    def server(name):
        return SimpleNamespace(
            process=SimpleNamespace(check=lambda: None, signal=lambda number: None),
            endpoint=name,
            meter=FakeMeter(),
        )

    def make(name, *argv):
        args = throughput.parse_args(["--quick", "--programs", "debate", "best_of_n", *argv])
        sizes = throughput.sizes_of(args)
        conditions = conditions_of(name, Mechanisms(exit="off"))
        part = throughput.Part(name, args, sizes, "", conditions)
        servers = {one.name: server(one.name) for one in conditions}
        return part, lambda start=0: list(part.measure(start, servers)), asked

    return make


def test_each_condition_has_its_form_its_server_and_the_same_problems(part):
    measured, measure, asked = part("speed")
    rows = measure()
    assert len(rows) == measured.runs == 2 * 3
    asked = [call for call in asked if call[2] != throughput.WARM_UP.text]
    assert {call[:2] for call in asked} == {
        ("solve", "sglang"),
        ("solve_plain", "sglang_best"),
        ("solve", "rksc"),
    }
    servers = throughput.PARTS["speed"]
    by_server = {server: {call[2:4] for call in asked if call[1] == server} for server in servers}
    assert by_server["rksc"] == by_server["sglang_best"] == by_server["sglang"]
    assert all(len(lengths) == 12 for _, lengths in by_server["rksc"])
    assert all(call[4] == Mechanisms(exit="off") for call in asked if call[1] == "rksc")
    assert all(call[4] == NOTHING for call in asked if call[1] == "sglang")
    assert len(ratios(rows, "rksc", "sglang_best")) == 2
    for one in rows:
        assert (one["computed_tokens"], one["generated_tokens"]) == (50, 5)  # of two problems
        assert (one["prefill_passes"], one["decode_passes"]) == (3, 1)  # of both together
        assert len(one["seconds"]) == len(one["right"]) == len(one["problems"]) == 2
    json.dumps(rows)


def test_further_starts_add_rounds_of_further_problems(part):
    _, measure, _ = part("speed")
    rows = [row for start in range(3) for row in measure(start)]
    assert {one["repeat"] for one in rows} == {"0/0", "0/1", "0/2"}
    debates = [one["problems"] for one in rows if one["program"] == "debate"]
    assert len(set(map(tuple, debates))) == 3
    assert len(ratios(rows, "rksc", "sglang_best")) == 2


def test_branches_and_documents_grow(part, tmp_path):
    pytest.importorskip("matplotlib")
    measured, measure, asked = part("growth")
    rows = measure()
    assert len(rows) == measured.runs == 3 * 3
    names = ["self_consistency_1", "self_consistency_2", "document_qa_0"]
    assert list(dict.fromkeys(one["program"] for one in rows)) == names
    asked = [call for call in asked if call[2] != throughput.WARM_UP.text]
    assert [call[-1] for call in asked] == [{"branches": 1}] * 6 + [{"branches": 2}] * 6 + [{}] * 6
    picture = tmp_path / "throughput.png"
    plot(summarise([*rows, *part("speed")[1]()]), picture)
    assert picture.stat().st_size > 10_000


def test_accuracy_is_measured_where_the_model_ends_by_itself(part):
    measured, measure, asked = part("accuracy", "--bare")
    rows = measure()
    lengths = {call[3] for call in asked if call[2] != throughput.WARM_UP.text}
    assert lengths == {()}
    assert measured.settings == Settings(examples=[])
    assert [one["right"] for one in rows if one["condition"] == "rksc"] == [[True] * 48] * 2
    assert [one["right"] for one in rows if one["condition"] != "rksc"] == [[False] * 48] * 2
    assert accuracy_delta(rows, "rksc", "sglang_best")["problems"] == 48


def test_problems_arrive_at_the_same_times_under_each_condition(part):
    _, measure, _ = part("open")
    rows = measure()
    assert len({tuple(one["arrivals"]) for one in rows}) == 2  # by program
    assert {one["load"] for one in rows} == {"open"}


def test_a_program_that_fails_reports_nothing(part, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("answer")

    broken = Program("broken", SimpleNamespace(run=fail), SimpleNamespace(run=fail))
    monkeypatch.setattr(throughput, "PROGRAMS", dict.fromkeys(PROGRAMS, broken))
    _, measure, _ = part("speed")
    with pytest.raises(BenchmarkError, match=r"sglang: debate: KeyError\('answer'\)"):
        measure()


# Parts and their files


def test_a_part_that_is_measured_again_replaces_its_own_rows_only():
    speed, other = row("rksc", 1.0), row("rksc", 1.0, "tree_of_thought")
    paper, seed = row("rksc", 1.0, part="paper"), row("rksc", 1.0, seed=1)
    again = row("rksc", 2.0)
    together = throughput.merged([speed, other, paper, seed], [again])
    assert together == [other, paper, seed, again]


def test_rows_are_taken_up_from_a_file(tmp_path):
    path = tmp_path / "throughput.json"
    assert throughput.stored(path) == ([], [])
    path.write_text(json.dumps({"rows": [1], "config": {"runs": [2]}}))
    assert throughput.stored(path) == ([1], [2])


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], list(throughput.PARTS)),
        (["--quick"], ["speed", "no_kv", "paper"]),
        (["--paper"], ["paper"]),
        (["--part", "open", "speed"], ["open", "speed"]),
    ],
)
def test_parts_of_a_command_line(argv, parts):
    args = throughput.parse_args(argv)
    assert args.part == parts
    assert args.programs == list(PROGRAMS)
    assert set(throughput.sizes_of(args).loads) == set(throughput.PARTS)


def test_a_full_run_judges_accuracy_on_a_thousand_problems():
    sizes = throughput.sizes_of(throughput.parse_args(["--bare"]))
    (load_,) = sizes.loads["accuracy"]
    assert load_.problems * load_.rounds >= 1000
