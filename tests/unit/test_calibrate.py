"""From recorded groups to a profile that the server loads."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from rksc_sglang.calibrate import asked_problems, calibrate, lens_layers, parser
from rksc_sglang.cgee.calibration import Judged
from rksc_sglang.cgee.profile import (
    CgeeProfile,
    ExitProfile,
    ExitProfileError,
    SkipProfile,
    profile_of,
    update_profile,
)


def easy_groups(count):
    """Every layer knows the verdict, and the most frequent answer is right."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(count):
        group = []
        for branch in range(4):
            right = branch < 3
            lead = rng.normal(3 if right else -3, 0.3)
            lens = [[lead + rng.normal(0, 0.01), 0.0] for _ in range(7)]
            answer = "8" if right else "9"
            group.append(
                Judged(answer, right, rng.uniform(0.7, 0.9), lens, [lead - 5, -5.0], 10 + branch)
            )
        groups.append(group)
    return groups


@pytest.fixture(scope="module")
def parts():
    found, reasons = calibrate(easy_groups(700), [11, 12], "model", risk=0.02, delta=0.05)
    assert reasons == []
    return found


@pytest.mark.parametrize(("layers", "checks"), [(8, (4, 6, 7)), (30, (15, 22, 29)), (2, (1,))])
def test_exits_look_in_the_second_half_and_never_at_the_end(layers, checks):
    assert lens_layers(layers) == checks


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
    found, reasons = calibrate(easy_groups(60), [11, 12], "model", risk=0.02, delta=0.05)
    assert found == []
    assert [reason.split(":")[0] for reason in reasons] == ["no layer exit", "no skip gate"]
    assert all("it takes 368 without an error" in reason for reason in reasons)


def test_a_profile_comes_back_as_it_was_written(parts, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"splice": {"tau": 1}}))
    for part in parts:
        update_profile(path, part)
    assert profile_of(str(path), "model") == CgeeProfile(*parts)
    assert json.loads(path.read_text())["splice"] == {"tau": 1}
    newer = replace(parts[0], risk=0.5)
    update_profile(path, newer)
    assert profile_of(str(path), "model") == CgeeProfile(newer, parts[1])


def test_a_profile_without_early_exit_is_one(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"splice": {}}))
    assert profile_of(str(path), "model") == CgeeProfile()
    assert profile_of(None, "model") == CgeeProfile()


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


@pytest.mark.parametrize("flags", [["--risk", "0"], ["--delta", "1"], ["--risk", "2"]])
def test_shares_are_between_zero_and_one(flags, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--output", "x", *flags])
    assert flags[0] in capsys.readouterr().err


def test_questions_of_a_file_are_judged_by_their_answers(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "How many?", "answer": "2 + 3 = 5\\n#### 5"}\n')
    args = argparse.Namespace(questions=path, seed=0, branches=4, temperature=0.8)
    (ask,) = asked_problems(args)
    assert ask.keywords["extract"]("It is 5.") == "5"
    assert ask.keywords["extract"]("") is None
    assert ask.keywords["is_right"]("5")
    assert not ask.keywords["is_right"]("6")


def test_the_kinds_have_parts_of_their_own():
    assert (ExitProfile.PART, SkipProfile.PART) == ("exit", "skip")
