"""From recorded groups to a profile that the server loads."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rksc_sglang.asks.alike import SIGNALS, Thought
from rksc_sglang.asks.merge_calibration import compare
from rksc_sglang.asks.profile import fingerprint
from rksc_sglang.calibrate import (
    asked_problems,
    calibrate,
    calibrate_merging,
    parser,
)
from rksc_sglang.cgee import profile
from rksc_sglang.cgee.judged import Judged
from rksc_sglang.cgee.probing import fit_probe, probed
from rksc_sglang.cgee.profile import (
    CalibratedParts,
    ExitProfile,
    ExitProfileError,
    MergeProfile,
    SkipProfile,
    profile_of,
    update_profile,
)
from rksc_sglang.models import ensure_model


def easy_groups(count):
    """Every layer knows the verdict, and the most frequent answer is right."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(count):
        group = []
        for branch in range(4):
            right = branch < 3
            lead = rng.normal(3 if right else -3, 0.3)
            states = np.array([[lead + rng.normal(0, 0.01), 1.0] for _ in range(3)])
            answer = "8" if right else "9"
            group.append(
                Judged(answer, right, rng.uniform(0.7, 0.9), states, [lead - 5, -5.0], 10 + branch)
            )
        groups.append(group)
    return groups


def calibrated(count):
    groups = easy_groups(count)
    probe = fit_probe(groups[: count // 4], (2, 4, 6))
    return calibrate(probed(groups, probe), probe, [11, 12], 8, "model", risk=0.02, delta=0.05)


@pytest.fixture(scope="module")
def parts():
    found, reasons = calibrated(700)
    assert reasons == []
    return found


def test_exit_and_skip_share_the_risk(parts):
    assert [(part.PART, part.risk, part.delta) for part in parts] == [
        ("exit", 0.01, 0.025),
        ("skip", 0.01, 0.025),
    ]
    exit_, skip = parts
    assert exit_.evidence["mean_exit_layer"] < 8
    assert exit_.evidence["problems"] + exit_.evidence["fitted_on"] == 700
    assert skip.evidence["skipped"] > 0


def test_too_little_data_promises_nothing():
    found, reasons = calibrated(60)
    assert found == []
    assert [reason.split(":")[0] for reason in reasons] == ["no layer exit", "no skip gate"]
    assert all("it takes 368 without an error" in reason for reason in reasons)


def test_a_profile_comes_back_as_it_was_written(parts, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"splice": {"tau": 1}}))
    for part in parts:
        update_profile(path, part)
    assert profile_of(str(path), "model") == CalibratedParts(*parts)
    assert json.loads(path.read_text())["splice"] == {"tau": 1}
    newer = replace(parts[0], risk=0.5)
    update_profile(path, newer)
    assert profile_of(str(path), "model") == CalibratedParts(newer, parts[1])


def test_a_profile_without_early_exit_is_one(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"splice": {}}))
    assert profile_of(str(path), "model") == CalibratedParts()
    assert profile_of(None, "model") == CalibratedParts()


@pytest.mark.parametrize("content", ["", "[]", '{"exit": {"model": "model"}}', '{"skip": 3}'])
def test_what_is_no_profile_is_refused(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ExitProfileError, match="is no profile"):
        profile_of(str(path), "model")


def test_the_profile_of_another_model_is_refused(parts, tmp_path):
    path = tmp_path / "profile.json"
    update_profile(path, parts[0])
    with pytest.raises(ExitProfileError, match="of another model"):
        profile_of(str(path), "other")


def test_the_profile_shipped_for_a_model_is_found(parts, tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    for part in parts:
        update_profile(path, part)
    monkeypatch.setattr(profile, "shipped_files", lambda: [path])
    assert profile_of(None, "model") == CalibratedParts(*parts)
    assert profile_of(None, "other") == CalibratedParts()


def test_the_reasoners_profile_is_what_its_committed_results_give():
    from scripts.reasoner_profile import PROFILE, parts

    shipped = profile_of(None, fingerprint(ensure_model("reasoner")))
    assert shipped == profile_of(str(PROFILE), shipped.exit.model)
    exit_, skip = parts()
    assert (shipped.exit.rule.probe, shipped.exit.labels) == (exit_.rule.probe, exit_.labels)
    assert shipped.exit.rule.accept == exit_.rule.accept
    assert shipped.exit.unanimous == exit_.unanimous
    # Fitted again, on whatever processor this is.
    assert shipped.skip.gate.threshold == pytest.approx(skip.gate.threshold, abs=0.02)
    assert shipped.skip.gate.weights == pytest.approx(skip.gate.weights, rel=0.05)


@pytest.mark.parametrize("flags", [["--risk", "0"], ["--delta", "1"], ["--risk", "2"]])
def test_shares_are_between_zero_and_one(flags, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--output", "x", *flags])
    assert flags[0] in capsys.readouterr().err


def test_questions_of_a_file_are_judged_by_their_answers(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "How many?", "answer": "2 + 3 = 5\\n#### 5"}\n')
    (asked,) = asked_problems(path, seed=0)
    assert asked.question == "How many?"
    assert asked.extract("It is 5.") == "5"
    assert asked.extract("") is None
    assert asked.is_right("5")
    assert not asked.is_right("6")


def thought_rows(count):
    """Branches whose first word decides their answer, in groups whose majority is clear."""
    rows = []
    for _ in range(count):
        branches, thoughts = [], []
        for branch in range(6):
            word = "no" if branch < 2 else "yes"
            branches.append(
                {
                    "text": f"{word} I say\nAnswer: {word}",
                    "tokens": 10,
                    "answer": word,
                    "right": word == "yes",
                    "ends": [4, 10],
                }
            )
            # What comes next, and the signature, are alike where the answers are not.
            signature = (1.0, 0.0) if branch % 2 else (0.0, 1.0)
            following = {branch % 2: 1.0}
            thoughts.append([Thought(f"{word} I say", word, following, signature)])
        rows.append({"branches": branches, "alike": compare(thoughts)})
    return rows


def test_signals_that_hold_the_risk_are_in_the_profile(tmp_path):
    (part,), reasons = calibrate_merging(thought_rows(100), "model", risk=0.05, delta=0.05)
    assert set(part.thresholds) == {"text", "state"}
    assert part.thresholds["text"] > 2 / 3, "or those who say yes are merged into those who say no"
    assert part.evidence["state"]["changed"] == 0
    assert part.evidence["state"]["problems"] == 100
    # Two of six go on; four end behind the first line.
    assert part.evidence["state"]["tokens_saved"] == pytest.approx(24 / 60)
    assert [reason.split(":")[0] for reason in reasons] == [
        "no merging by next",
        "no merging by sigma",
    ]
    path = tmp_path / "profile.json"
    update_profile(path, part)
    assert profile_of(str(path), "model").merge == part


def test_too_few_problems_calibrate_no_merging():
    parts, reasons = calibrate_merging(thought_rows(20), "model", risk=0.05, delta=0.05)
    assert parts == []
    assert all("it takes 59 without an error" in reason for reason in reasons)
    assert len(reasons) == len(SIGNALS)


def test_the_kinds_have_parts_of_their_own():
    assert (ExitProfile.PART, SkipProfile.PART, MergeProfile.PART) == ("exit", "skip", "merge")
