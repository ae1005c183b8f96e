"""Calibrated thresholds: chosen from measurements, kept in a profile, bound to a model."""

import json
import random
from itertools import islice

import numpy as np
import pytest

from rksc_sglang.asks.calibrate import (
    Pair,
    choose_tau,
    make_prompts,
    own_texts,
    rank_auc,
    read_texts,
    upper_mean,
)
from rksc_sglang.asks.profile import (
    DEFAULT_MARGIN,
    DEFAULT_TAU,
    PAPER_TAU,
    ProfileError,
    SpliceProfile,
    fingerprint,
    shipped_profiles,
    thresholds,
)
from rksc_sglang.config import RkscConfig
from rksc_sglang.launch_server import LaunchError, check_profile


def pair(similarity, kl):
    return Pair(similarity, kl, 0.1, True, 100, 200)


def test_tau_is_where_the_splices_begin_to_be_bad():
    good = [pair(0.99 - i / 1000, 0.002) for i in range(40)]
    bad = [pair(0.90 - i / 1000, 0.5) for i in range(40)]
    assert choose_tau(good + bad, 0.01) == pytest.approx(0.951)
    assert choose_tau(bad, 0.01) is None
    assert choose_tau(good[:10], 0.01) is None  # too few to say


def test_the_bound_is_above_the_mean_and_tightens():
    rng = np.random.default_rng(0)
    few, many = rng.exponential(0.01, 20), rng.exponential(0.01, 2000)
    assert upper_mean(few) > few.mean()
    assert upper_mean(many) - many.mean() < (upper_mean(few) - few.mean()) / 3


def test_an_auc_of_one_half_means_nothing():
    rng = random.Random(0)
    noise = [pair(rng.random(), rng.random()) for _ in range(400)]
    assert rank_auc(noise) == pytest.approx(0.5, abs=0.08)
    assert rank_auc([pair(1 - i / 100, i / 100) for i in range(100)]) == 1


def test_prompts_repeat_their_donors_text_and_differ_from_it():
    prompts = list(islice(make_prompts(own_texts(), random.Random(1)), 30))
    for donor, prompt in prompts:
        assert donor != prompt
        common = set(donor.split()) & set(prompt.split())
        assert len(common) > 0.3 * len(set(prompt.split()))
    assert prompts == list(islice(make_prompts(own_texts(), random.Random(1)), 30))


def test_texts_from_a_file(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"question": "a?"}\n\n{"text": "b", "question": "c"}\n')
    assert read_texts(file) == ["a?", "b"]


@pytest.fixture
def profile(tiny_model, tmp_path):
    path = tmp_path / "profile.json"
    SpliceProfile(fingerprint(tiny_model), 0.93, 0.1, 0.01, {"head": 16}, {"pairs": 1}).save(path)
    return path


def test_where_the_thresholds_come_from(tiny_model, smollm2, profile):
    def found(model, mode="balanced", **settings):
        limits = thresholds(RkscConfig(mode=mode, **settings), model)
        return limits.tau, limits.margin

    assert found(tiny_model, tau=0.3, profile=str(profile)) == (0.3, 0.1)
    assert found(tiny_model, margin=0.4, profile=str(profile)) == (0.93, 0.4)
    assert found(tiny_model) == (DEFAULT_TAU, DEFAULT_MARGIN)
    assert found(tiny_model, mode="paper") == (PAPER_TAU, 0)
    (shipped,) = shipped_profiles()
    assert found(smollm2) == (shipped.tau, shipped.margin)
    mixed = thresholds(RkscConfig(mode="balanced", margin=0.4), tiny_model)
    assert (mixed.tau_source, mixed.margin_source) == (
        "not calibrated for this model",
        "--rksc-margin",
    )
    assert shipped.evidence["pairs"] == len(shipped.evidence["rows"])


def test_a_profile_of_another_model_is_refused_at_start(smollm2, profile):
    config = RkscConfig(mode="balanced", profile=str(profile))
    with pytest.raises(LaunchError, match="another model"):
        check_profile(config, str(smollm2))


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"splice": {"tau": 1}})])
def test_what_is_no_profile_is_refused(tmp_path, tiny_model, content):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match="no splice profile"):
        thresholds(RkscConfig(mode="balanced", profile=str(path)), tiny_model)


def test_a_model_is_known_by_its_weights(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint(copy) == fingerprint(tiny_model)
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert fingerprint(copy) != fingerprint(tiny_model)
    with pytest.raises(ProfileError, match="no directory"):
        fingerprint(tmp_path / "nowhere")
