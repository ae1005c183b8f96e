"""benchmarks.splice: its prompts, how it measures, and what it computes from its rows."""

import itertools
import json
import random
import re

import numpy as np
import pytest

from benchmarks import splice, splice_cases, splice_quality, splice_summary
from benchmarks.harness import BenchmarkError
from benchmarks.splice_cases import (
    ADVERSARIAL,
    HINT,
    KINDS,
    LENGTH,
    ORDER,
    PERSONA,
    VERIFIER,
    Problem,
    Shelf,
    SpliceCase,
)
from benchmarks.text import machine_texts
from rksc_sglang.contract import DOUBTED

PROBLEMS = [
    Problem(
        f"{name} has {n} apples and buys {n + 3} more at the market near the old harbour daily. "
        f"{name} gives away less than half of them after two weeks, because there is not enough "
        f"room at home for all of them. How many apples does {name} have?",
        f"First there are {n} apples.\nThen there are {n}+{n + 3}={2 * n + 3}.\nThe answer is {n}",
    )
    for n, name in enumerate(["Katina", "Tommy", "Wendell", "Arianna", "Felix"], start=11)
]


@pytest.fixture(scope="module")
def texts():
    return machine_texts()


def all_cases(texts, problems, seed=0):
    shelf = Shelf(texts, problems, seed)
    return [
        *splice.quality_cases(shelf, splice.QUICK),
        *splice_cases.length_cases(shelf, [20, 80], 2),
        *itertools.islice(splice_cases.adversarial_cases(shelf), 60),
    ]


@pytest.fixture(scope="module", params=[[], PROBLEMS], ids=["machine", "problems"])
def cases(request, texts):
    return all_cases(texts, request.param)


def by_family(cases, family):
    return [case for case in cases if case.family == family]


def test_the_same_seed_gives_the_same_cases(texts, cases):
    problems = [] if "apples" not in str(cases) else PROBLEMS
    assert all_cases(texts, problems) == cases
    assert all_cases(texts, problems, seed=1) != cases


def test_documents_are_paragraphs_of_the_machine(texts):
    words = " ".join(" ".join(texts).split())
    document = Shelf(texts, [], 3).document(100)
    assert len(document.split()) >= 100
    for paragraph in document.split("\n\n"):
        assert paragraph in words


def test_no_paragraph_comes_twice_before_all_have_been_drawn(texts):
    shelf = Shelf(texts, [], 0)
    drawn = [shelf.paragraph() for _ in splice_cases.paragraphs(texts)]
    assert len(set(drawn)) == len(drawn)


def test_every_prompt_repeats_words_of_its_donor_and_is_no_donor(cases):
    for case in cases:
        (donor,) = case.donors
        assert case.prompt != donor
        runs = splice_quality.repeated_runs(case.prompt.split(), [donor.split()], 8)
        assert runs, case
        assert case.prompt.startswith("<|im_start|>system\n")


def test_personas_differ_from_the_first_word_of_theirs_on(cases):
    for case in by_family(cases, PERSONA):
        donor, prompt = (text.partition("<|im_end|>\n") for text in (*case.donors, case.prompt))
        assert donor[0] != prompt[0]
        assert donor[2] == prompt[2]


def test_verifiers_judge_different_candidates_of_one_problem(cases):
    groups = {}
    for case in by_family(cases, VERIFIER):
        groups.setdefault(case.facts["group"], []).append(case)
        candidate = case.prompt.split("Proposed solution:\n")[1].split("\n\nIs the proposed")[0]
        assert case.donors[0].endswith(f"assistant\n{candidate}<|im_end|>\n")
    for group in groups.values():
        assert len({case.prompt for case in group}) == len(group) >= 4
        assert len({case.prompt.split("Proposed solution:")[0] for case in group}) == 1


def test_eight_hints_stand_before_the_problem_of_their_parent(cases):
    branches = by_family(cases, HINT)
    assert len(branches) == 8 * splice.QUICK.hinted
    parent = branches[0].donors[0]
    problem = parent.split("user\n")[1]
    assert all(case.prompt.endswith(problem) for case in branches[:8])
    assert len({case.prompt for case in branches[:8]}) == 8


def test_another_order_has_the_same_parts_but_not_the_same_beginning(cases):
    for case in by_family(cases, ORDER):
        (donor,) = case.donors
        assert sorted(donor.split()) == sorted(case.prompt.split())
        system = donor.index("user\n") + 40
        assert donor[:system] != case.prompt[:system]


def test_near_duplicates_differ_in_one_thing(cases):
    pairs = by_family(cases, ADVERSARIAL)
    assert {(case.facts["kind"], case.facts["where"]) for case in pairs} == {
        (kind, where) for kind in KINDS for where in ("near", "far")
    }
    for case in pairs:
        (donor,) = case.donors
        old, new = (case.facts[name].split() for name in ("old", "new"))
        assert old != new
        a, b = donor.split(), case.prompt.split()
        # One place, or one name in all its places.
        changed = abs(len(a) - len(b)) or sum(x != y for x, y in zip(a, b))
        assert changed >= 1
        if case.facts["kind"] != "name":
            assert changed == 1
        assert any(word in " ".join(b) for word in new)


def test_far_changes_are_farther_from_the_question_than_near_ones(cases):
    def distance(case):
        words, donor = case.prompt.split(), case.donors[0].split()
        return len(words) - next(i for i, (a, b) in enumerate(zip(words, donor)) if a != b)

    pairs = by_family(cases, ADVERSARIAL)
    near, far = (
        np.mean([distance(case) for case in pairs if case.facts["where"] == where])
        for where in ("near", "far")
    )
    assert far > near + 50


@pytest.mark.parametrize(
    ("kind", "text", "changed"),
    [
        ("number", "It takes 7 of them", r"It takes \d of them"),
        ("unit", "It takes seven days in all", r"It takes seven \w+ in all"),
        ("negation", "This may not be used", "This may be used"),
        ("negation", "This may be used", "This may not be used"),
        ("comparison", "It is at least seven", "It is at most seven"),
        ("name", "We met Katina there", r"We met \w+ there"),
    ],
)
def test_edits(kind, text, changed):
    edited = [edit.apply(text) for edit in splice_cases.edits(text, kind, random.Random(0))]
    assert text not in edited
    assert any(re.fullmatch(changed, e) for e in edited)


def test_a_name_is_changed_wherever_it_stands():
    text = "We met Katina there, and Katina was glad"
    edit = splice_cases.edits(text, "name", random.Random(0))[0]
    assert "Katina" not in edit.apply(text)
    assert edit.apply(text).count(edit.new) == 2


def test_word_problems_are_read_as_gsm8k_writes_them(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}))
    assert splice_cases.word_problems(path) == [Problem("2 and 3?", "2+3=5\nThe answer is 5")]


def test_repeated_runs_are_found_behind_other_prefixes_in_any_order():
    a, b, c = list(range(10, 20)), list(range(30, 42)), list(range(50, 55))
    donor = [1, 2, *a, 3, *b, 4, *c]
    assert splice_quality.repeated_runs([1, 9, *b, 8, *a, 7], [donor], 6) == [(2, 12), (15, 10)]
    # The exact prefix is none of ours, and the last token is always computed.
    assert splice_quality.repeated_runs([1, 2, *a, 9, *b], [donor], 6) == [(13, 11)]
    assert splice_quality.repeated_runs([9, *c, 9], [donor], 6) == []
    assert splice_quality.repeated_runs(donor, [donor], 6) == []


class FakeClient(splice_quality.Client):
    """A server that answers edited prompts by their length, and splices all but a few tokens."""

    def __init__(self, spliced=50):
        super().__init__("http://nowhere", 8)
        self.spliced = spliced
        self.asked = []

    def rksc_status(self):
        return {"ranks": [{"splice": {"head": 16, "min_tokens": 48, "cost": None}}]}

    def _info(self, share):
        spliced = self.spliced if share == splice_quality.SIMILAR else 0
        return {"spliced_tokens": spliced, "recomputed_tokens": 9, "similarity": 0.9}

    def ask(self, prompt, steps, share, salt, tau=None):
        self.asked.append((salt, share))
        return splice_quality.Answer(0.1, [len(prompt) % 3] * steps, self._info(share))

    def first_token(self, prompt, share, salt, tau=None):
        self.asked.append((salt, share))
        logits = np.zeros(8)
        logits[len(prompt) % 3] = 3 if share == splice_quality.EXACT else 2
        return logits - np.log(np.exp(logits).sum()), self._info(share)


def quality(client):
    def tokenize(text):
        return [int(word) if word.isdigit() else len(word) % 8 for word in text.split()]

    return splice_quality.Quality(client, "rksc", tokenize)


def test_a_case_finds_its_donors_and_nothing_else():
    client = FakeClient()
    case = SpliceCase(PERSONA, ["donor"], "prompt")
    row = quality(client).row(0, case, quality(client).recompute(case))
    assert row["kl"] > 0
    assert row["top1"]
    assert row["ungated"] is None
    salts = {}
    for salt, share in client.asked:
        salts.setdefault(salt, []).append(share)
    assert list(salts.values()) == [["exact", "exact"], ["exact", "similar"], ["exact", "similar"]]


def test_what_the_gate_refuses_is_measured_without_it():
    client = FakeClient(spliced=0)
    words = [str(n) for n in range(40)]
    case = SpliceCase(PERSONA, [" ".join(["a", *words])], " ".join(["bb", *words]))
    measure = quality(client)
    assert measure.row(0, case, measure.recompute(case))["ungated"]["kl"] > 0


def test_near_duplicates_are_tried_until_enough_are_answered_differently():
    pairs = [("a", "a b"), ("a", "abcd"), ("a", "abc"), ("abc", "a"), ("a", "ab")]
    cases = [SpliceCase(ADVERSARIAL, [a], b, {"kind": "name"}) for a, b in pairs]
    rows = list(quality(FakeClient()).adversarial(cases, wanted=2))
    assert [row["answers_differ"] for row in rows] == [True, False, True]
    assert [("kl" in row) for row in rows] == [True, False, True]
    assert rows[0]["output"][:4] != rows[0]["donor_output"]


def test_a_verdict_of_several_tokens_is_refused():
    with pytest.raises(BenchmarkError, match="'Yes' is not a single token"):
        splice_quality.Quality(FakeClient(), "rksc", lambda text: [1, 2])


def test_kl_divergence_in_nats():
    p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert splice_quality.kl_divergence(p, q) == pytest.approx(
        0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    )


def test_auc_counts_ties_half():
    assert splice_summary.auc([3, 2, 1, 0], [True, True, False, False]) == 1
    assert splice_summary.auc([1, 1], [True, False]) == 0.5
    assert splice_summary.auc([1, 2], [True, True]) is None


def test_all_of_a_few_is_no_certainty():
    interval = splice_summary.wilson([True] * 10)
    assert interval["share"] == 1
    assert interval["low"] < 0.75


def quality_row(family, position, condition="rksc", head=16, **changed):
    info = {"spliced_tokens": 100, "recomputed_tokens": 50, "similarity": 0.9, "fallback": None}
    return {
        "workload": family,
        "condition": condition,
        "repeat": 0,
        "position": position,
        "setting": {"head": head, "min_tokens": 48},
        "prompt_tokens": 150,
        "prefix_tokens": 10,
        "repeatable_tokens": 110,
        "runs": [(30, 110)],
        "exact_ttft": 0.4,
        "ttft": 0.1,
        "exact_output": [1] * 16,
        "output": [1] * 12 + [2] * 4,
        "info": info,
        "kl_info": info,
        "kl": 0.001 * (position + 1),
        "lead": 0.1 * position,
        "top1": True,
        "exact_labels": [-1.0, -2.0 - position],
        "labels": [-1.0, -2.0 - position],
        "ungated": None,
        **changed,
    }


def timing_rows():
    seconds = {
        "ttft_1k": (2.0, 0.2),
        "ttft_1k_new_context": (2.0, 0.4),
        "fanout8": (20.0, 1.0),
        "fanout8_cold": (20.0, 4.0),
    }
    for workload, (stock, ours) in seconds.items():
        for repeat in range(3):
            common = {"workload": workload, "repeat": repeat, "position": 0}
            info = {"spliced_tokens": 900, "fallback": None}
            yield {**common, "condition": "stock", "seconds": stock, "infos": [None]}
            yield {**common, "condition": "rksc", "seconds": ours, "infos": [info]}
    for repeat, condition in itertools.product(range(3), ("stock", "rksc")):
        common = {"workload": "f_nothing", "repeat": repeat, "position": 0}
        throughput = 99.0 if condition == "rksc" else 100.0
        yield {**common, "condition": condition, "throughput": throughput}


def all_rows():
    rows = list(timing_rows())
    for family in (PERSONA, HINT, ORDER):
        rows += [quality_row(family, n) for n in range(4)]
    rows += [quality_row(VERIFIER, n, group=n // 4) for n in range(8)]
    answers = {"answer_tokens": 4, "donor_output": [9] * 4, "answers_differ": True}
    rows += [quality_row(ADVERSARIAL, n, **answers) for n in range(4)]
    rows.append(
        {"workload": ADVERSARIAL, "condition": "rksc", "position": 9, "answers_differ": False}
    )
    rows += [quality_row(PERSONA, n, "head=1", head=1, kl=0.1) for n in range(2)]
    rows += [quality_row(splice_cases.LENGTH, n, "min_tokens=8") for n in range(2)]
    status = {"splice": {"index_microseconds_per_token": 0.5}}
    rows.append({"workload": "status", "condition": "rksc", **status})
    return rows


def test_the_summary_is_computed_from_the_rows():
    summary = splice.summarise(all_rows())
    assert summary["ttft_speedup_1k"] == pytest.approx(10)
    assert summary["ttft_speedup_1k_new_context"] == pytest.approx(5)
    assert summary["fanout8_speedup"] == pytest.approx(20)
    assert summary["fanout8_cold_speedup"] == pytest.approx(5)
    assert summary["overhead_f"] == pytest.approx(0.99)
    assert summary["top1_agreement"] == summary["coverage"] == summary["judge_consistency"] == 1
    assert summary["kl_mean"] == pytest.approx((4 * 0.01 + 0.036) / 24)
    assert summary["greedy16_agreement"] == 0.75
    assert summary["adversarial_agreement"] == 1
    assert summary["adversarial"]["tried"] == 5
    assert summary["index_us_per_token"] == 0.5
    assert summary["cases"] == summary["spliced_cases"] == 24
    head = summary["curves"]["head"]
    assert [(point["head"], point["cases"]) for point in head] == [(1, 2), (16, 2)]
    assert summary["curves"]["run_length"][0]["run_tokens"] == 100
    json.dumps(summary)


def test_what_was_not_spliced_counts_for_coverage_alone():
    rows = all_rows()
    unspliced = {"spliced_tokens": 0, "recomputed_tokens": 140, "similarity": None, "fallback": "x"}
    rows += [
        quality_row(PERSONA, n, info=unspliced, kl_info=unspliced, kl=9.0, top1=False)
        for n in range(10, 26)
    ]
    summary = splice.summarise(rows)
    assert summary["coverage"] == pytest.approx(16 / 32)
    assert summary["top1_agreement"] == 1
    assert summary["families"][PERSONA]["spliced"] == 4


def test_doubts_count_for_coverage_apart():
    rows = all_rows()
    doubted = {**rows[-2]["info"], "spliced_tokens": 0, "similarity": None, "fallback": DOUBTED}
    row = next(r for r in rows if r["workload"] == PERSONA and r["condition"] == "rksc")
    row |= {"info": doubted, "kl_info": doubted, "ungated": {"kl": 0.1, "lead": 0.0, "top1": False}}
    row["ungated"]["kl_info"] = {**doubted, "spliced_tokens": 100, "similarity": 0.9}
    summary = splice.summarise(rows)
    assert summary["doubted_cases"] == 1
    assert summary["coverage"] == pytest.approx(15 / 16)
    assert summary["coverage_with_doubted"] == 1
    assert summary["top1_agreement"] == 1
    none, *_, half = summary["curves"]["margin"]
    assert none["top1_agreement"] < 1
    assert half["share"] < none["share"] == 1
    assert half["top1_agreement"] == 1


def test_a_donors_answer_to_an_edited_prompt_is_no_agreement():
    rows = all_rows()
    victim = next(row for row in rows if row["workload"] == ADVERSARIAL)
    victim["output"] = [9] * 16
    summary = splice.summarise(rows)
    assert summary["adversarial_agreement"] == 0.75
    assert summary["adversarial"]["donor_answers"] == 1


def test_a_judge_is_consistent_with_the_same_winner_and_the_same_verdicts():
    rows = all_rows()
    first = next(row for row in rows if row["workload"] == VERIFIER)
    first["labels"] = [-1.0, -99.0]
    summary = splice.summarise(rows)["judge"]
    assert (summary["groups"], summary["same_winner"], summary["same_verdicts"]) == (2, 0.5, 1)
    assert summary["consistent"] == 0.5


def test_the_gate_is_judged_by_what_it_refused_too():
    rows = [row for row in all_rows() if row["workload"] != PERSONA]
    for position, similarity in enumerate((0.2, 0.3, 0.4)):
        info = {"spliced_tokens": 100, "recomputed_tokens": 50, "fallback": None}
        ungated = {"kl": 1.0, "top1": False, "kl_info": {**info, "similarity": similarity}}
        refused = {"spliced_tokens": 0, "recomputed_tokens": 1, "similarity": 0.2, "fallback": "x"}
        rows.append(quality_row(PERSONA, position, info=refused, kl_info=refused, ungated=ungated))
    summary = splice.summarise(rows)
    assert summary["gate_auc"] > 0.5
    assert summary["gate"]["tail"]["similarity"] == 1
    curve = summary["curves"]["tau"]
    assert curve[0]["spliced_share"] == 1
    assert curve[-1]["kl_max"] < 1


@pytest.mark.parametrize("workload", ["ttft_1k", ADVERSARIAL])
def test_nothing_is_reported_when_nothing_was_spliced(workload):
    none = {"spliced_tokens": 0, "similarity": None, "fallback": "splice: off (mode exact)"}
    rows = all_rows()
    for row in rows:
        if row["workload"] == workload and row["condition"] == "rksc":
            row.update({"infos": [none]} if "infos" in row else {"info": none, "kl_info": none})
    with pytest.raises(BenchmarkError, match=r"nothing was spliced.*mode exact"):
        splice.summarise(rows)


def test_curves_are_drawn_beside_the_json(tmp_path, capsys):
    curves = splice.summarise(all_rows())["curves"]
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        splice_summary.plot(curves, tmp_path / "curves.png")
        assert 'the extra "bench"' in capsys.readouterr().out
    else:
        splice_summary.plot(curves, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("workload", "condition", "part"),
    [
        ("ttft_1k", "stock", "timing"),
        ("fanout8_cold", "rksc", "timing"),
        ("f_nothing", "rksc", "timing"),
        (PERSONA, "rksc", "quality"),
        (ADVERSARIAL, "rksc", "quality"),
        ("status", "rksc", "quality"),
        (PERSONA, "head=16", "curves"),
        (LENGTH, "min_tokens=8", "curves"),
    ],
)
def test_rows_of_each_part(workload, condition, part):
    assert splice.part_of({"workload": workload, "condition": condition}) == part


def test_a_file_of_earlier_parts_is_gone_on_with(tmp_path):
    path = tmp_path / "splice.json"
    assert splice.stored(path) == splice.stored(None) == ([], [])
    rows, runs = [{"workload": PERSONA}], [{"parts": ["quality"]}]
    path.write_text(json.dumps({"rows": rows, "config": {"runs": runs}}))
    assert splice.stored(path) == (rows, runs)
