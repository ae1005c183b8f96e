"""Requests leave the layers of a real model of SGLang one by one, as if each had run alone."""

import os
import subprocess
import sys
from array import array

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sglang.benchmark.one_batch import extend

from rksc_sglang.asks.signature import Signatures
from rksc_sglang.cgee.exit_rule import (
    CalibratedRule,
    Observe,
    PaperRule,
    Probe,
    check_layers,
    paper_rule,
)
from rksc_sglang.cgee.layer_exit import Candidate, LayerExit, UnsupportedModel

LAYERS, VOCABULARY = 6, 1000
CHECKS = (2, 3, 5)
LABELS = (11, 12)


class Runner:
    """A model runner with a layer exit whose candidates the tests choose."""

    def __init__(self, runner):
        self.runner = runner
        self.candidates = []
        self.errors = []
        self.streams = {}
        self.exit = LayerExit(
            runner.model, runner.attn_backend, lambda batch: self.candidates, self.errors.append
        )

    def rule_of(self, accept, reject=None, patience=1):
        """A probe that reads what the last layer's own columns do: the logit lens."""
        columns = self.runner.model.lm_head.weight[list(LABELS)].float().tolist()
        checks = len(CHECKS)
        probe = Probe(CHECKS, (tuple(map(tuple, columns)),) * checks, ((0.0, 0.0),) * checks)
        thresholds = accept, accept if reject is None else reject
        return CalibratedRule(probe, (1.0,) * checks, ((0.0, 0.1),) * checks, *thresholds, patience)

    def run(self, requests, candidates=()):
        """Logits [requests, vocabulary] of ``(prefix, new)`` token lists."""
        self.errors.clear()
        self.runner.req_to_token_pool.clear()
        self.runner.token_to_kv_pool_allocator.clear()
        reqs = [self._req(number, *tokens) for number, tokens in enumerate(requests)]
        self.candidates = []
        some = [req for req, (prefix, _) in zip(reqs, requests) if prefix]
        if some:
            extend(some, self.runner)
        for req, (prefix, new) in zip(reqs, requests):
            if prefix:
                req.full_untruncated_fill_ids.extend(new)
                req.prefix_len = len(prefix)
            req.extend_end = len(req.full_untruncated_fill_ids)
        self.candidates = list(candidates)
        _, logits, _ = extend(reqs, self.runner)
        self.reqs = reqs
        return logits

    def _req(self, number, prefix, new):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        tokens = array("q", prefix or new)
        req = Req(str(number), "", tokens, SamplingParams(temperature=0, max_new_tokens=1))
        req.full_untruncated_fill_ids = array("q", tokens)
        req.logprob_start_len = -1
        req.extend_end = len(tokens)
        return req

    def slots_of(self, req):
        count = len(req.full_untruncated_fill_ids)
        return self.runner.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :count].long()

    def kv_of(self, req):
        """Keys and values of a request's tokens, in all layers."""
        slots = self.slots_of(req)
        pool = self.runner.token_to_kv_pool
        return torch.stack([buffer[slots] for buffer in (*pool.k_buffer, *pool.v_buffer)])


class Reports:
    def __init__(self):
        self.of = {}

    def __call__(self, row):
        return lambda layer, scores, seen: self.of.__setitem__(row, (layer, scores, seen))


@pytest.fixture(scope="module")
def runner(model_runner):
    return Runner(model_runner)


def make_candidates(rows, rule, labels=LABELS):
    reports = Reports()
    return [Candidate(row, labels, rule, reports(row)) for row in rows], reports


tokens = st.lists(st.integers(5, VOCABULARY - 1), min_size=1, max_size=12)
requests = st.lists(st.tuples(st.one_of(st.just([]), tokens), tokens), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(requests=requests, data=st.data())
def test_a_batch_exits_as_each_request_alone(runner, requests, data):
    rows = data.draw(st.sets(st.integers(0, len(requests) - 1)))
    patience = data.draw(st.integers(1, 2))
    accept, reject = (data.draw(st.sampled_from([0.0, 0.5, 2.0, 5.0, 1e9])) for _ in range(2))
    rule = runner.rule_of(accept, reject, patience)
    plain = runner.run(requests)
    plain_kv = [runner.kv_of(req) for req in runner.reqs]

    expected, wanted = [], {}
    for row, request in enumerate(requests):
        if row not in rows:
            expected.append(plain[row])
            continue
        # Alone, and never decided: what is read in all checks.
        never, seen = make_candidates([0], runner.rule_of(1e9))
        runner.run([request], never)
        _, _, reads = seen.of[0]
        rows_of_reads = torch.tensor(reads)[:, None]
        stops = [
            check
            for check in range(len(CHECKS))
            if rule.decided(rows_of_reads[: check + 1], None)[0]
        ]
        wanted[row] = (
            CHECKS[stops[0]] if stops else None,
            reads[: stops[0] + 1 if stops else None],
        )
        alone, _ = make_candidates([0], rule)
        expected.append(runner.run([request], alone)[0])

    candidates, reports = make_candidates(sorted(rows), rule)
    found = runner.run(requests, candidates)
    assert runner.errors == []
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-3, rtol=1e-3)
    assert set(reports.of) == rows
    for row, (layer, reads) in wanted.items():
        assert reports.of[row][0] == layer
        torch.testing.assert_close(
            torch.tensor(reports.of[row][2]), torch.tensor(reads), atol=1e-3, rtol=1e-3
        )
    for row, req in enumerate(runner.reqs):
        if row not in rows or wanted[row][0] is None:
            torch.testing.assert_close(runner.kv_of(req), plain_kv[row], atol=1e-4, rtol=1e-4)


def test_logits_of_an_exited_request_are_those_of_its_layer(runner):
    candidates, reports = make_candidates([0, 1], runner.rule_of(0.0))
    logits = runner.run([([], [7, 8, 9]), ([], [10, 11])], candidates)
    for row in (0, 1):
        layer, scores, lens = reports.of[row]
        assert layer == CHECKS[0]
        assert logits[row][list(LABELS)].tolist() == pytest.approx(lens[-1], abs=1e-4)
        lead = lens[-1][0] - lens[-1][1]
        assert scores[0] - scores[1] == pytest.approx(lead - 0.1, abs=1e-4)


def test_a_batch_without_candidates_is_bit_equal_to_stock(runner):
    batch = [([3, 4, 5], [6, 7]), ([], [8, 9, 10])]
    first = runner.run(batch)
    never, _ = make_candidates([1], runner.rule_of(1e9))
    watched = runner.run(batch, never)
    assert torch.equal(first, watched)


def test_different_rules_and_labels_share_a_batch(runner):
    (first,), one = make_candidates([0], runner.rule_of(0.0))
    (second,), two = make_candidates([2], runner.rule_of(1e9), labels=(20, 21))
    runner.run([([], [7, 8]), ([], [9]), ([5, 6], [7])], [first, second])
    assert one.of[0][0] == CHECKS[0]
    assert two.of[2][0] is None
    assert len(two.of[2][2]) == len(CHECKS)


def test_states_are_what_the_probe_reads(runner):
    (seen,), states = make_candidates([0], Observe(CHECKS))
    (reading,), reads = make_candidates([1], runner.rule_of(1e9))
    logits = runner.run([([], [7, 8, 9])] * 2, [seen, reading])
    assert torch.isfinite(logits).all()
    layer, _, found = states.of[0]
    assert layer is None
    probe = runner.rule_of(1e9).probe
    for check, state in enumerate(torch.tensor(found)):
        read = probe.read(check, state[None])[0]
        assert read.tolist() == pytest.approx(reads.of[1][2][check], abs=1e-4)


@pytest.mark.parametrize(
    ("layers", "checks"), [(8, (2, 4, 6)), (12, (3, 6, 9)), (30, (8, 15, 22)), (2, (1,))]
)
def test_exits_look_behind_quarters_and_never_at_the_end(layers, checks):
    assert check_layers(layers) == checks


def test_the_papers_rule_looks_at_the_vocabulary(runner):
    """With a vocabulary of random logits no entropy is low, and the paper's bound holds for all."""
    at_once, reports = make_candidates([0], paper_rule(LAYERS))
    runner.run([([], [7, 8, 9])], at_once)
    assert reports.of[0][0] == 3  # the second layer that it looks at
    never, reports = make_candidates([0], PaperRule((2, 3, 4), entropy=1e-6))
    runner.run([([], [7, 8, 9])], never)
    assert reports.of[0][0] is None


def test_signatures_are_those_of_the_requests_that_stayed(model_runner, runner):
    signatures = Signatures(model_runner.model, 64, 4097, "cpu")
    batch = [([], [7, 8, 9]), ([], [10, 11]), ([], [12, 13, 14, 15])]

    def rows(which):
        return signatures.rows[torch.cat([runner.slots_of(runner.reqs[row]) for row in which])]

    runner.run(batch)
    plain = rows([0, 2]).clone()
    signatures.rows.zero_()
    candidates, _ = make_candidates([1], runner.rule_of(0.0))
    runner.run(batch, candidates)
    assert plain.any(1).all()
    torch.testing.assert_close(rows([0, 2]), plain, atol=1e-2, rtol=1e-2)


def test_a_failure_leaves_the_pass_whole(runner):
    class Broken(PaperRule):
        def decided(self, seen, entropy):
            raise RuntimeError("broken")

    batch = [([], [7, 8, 9])]
    plain = runner.run(batch)
    broken, _ = make_candidates([0], Broken((2,)))
    assert torch.equal(runner.run(batch, broken), plain)
    assert runner.errors == ["layer_exit"]


def test_a_model_without_layers_is_refused():
    with pytest.raises(UnsupportedModel, match="no list of decoder layers"):
        LayerExit(torch.nn.Linear(2, 2), None, lambda batch: [], print)


@pytest.mark.skipif("RKSC_TEST_ARCHITECTURE" in os.environ, reason="is one of these runs")
def test_another_architecture():
    """A third is what the end-to-end tests run these tests on, with SGLang patched."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "batch", __file__]
    env = {**os.environ, "RKSC_TEST_ARCHITECTURE": "Qwen2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
