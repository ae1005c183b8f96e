"""When a verifier's thought ends."""

from dataclasses import dataclass

import pytest

from rksc_sglang.lang.thinking import Piece, Think, think


@dataclass
class Says:
    best: str
    sure: float

    @property
    def probabilities(self):
        return (self.sure, 1 - self.sure)


def run(how, verdicts, lengths):
    asked, seen = [], []
    verdicts, lengths = iter(verdicts), iter(lengths)

    def generate(thought, count):
        asked.append(count)
        tokens = min(count, next(lengths))
        return Piece("x" * tokens, tokens, tokens < count)

    def judge(thought):
        seen.append(thought)
        return next(verdicts)

    thought, generated, found = think(how, generate, judge)
    assert len(thought) == generated
    assert all(text.endswith("\nVerdict:") for text in seen)
    return generated, found, asked


def test_two_sure_verdicts_that_are_the_same_end_it():
    how = Think(max_tokens=100, every=10, sure=0.9)
    says = [Says("YES", 0.95), Says("NO", 0.95), Says("NO", 0.8), Says("NO", 0.99), Says("NO", 0.9)]
    generated, found, _ = run(how, says, [10] * 9)
    assert generated == 50
    assert found[-1] is says[4]


def test_it_ends_with_the_model_or_with_its_budget():
    never = Think(max_tokens=25, every=10, sure=2.0)
    generated, found, asked = run(never, [Says("YES", 1.0)] * 9, [10, 3])
    assert (generated, len(found)) == (13, 2)
    generated, found, asked = run(never, [Says("YES", 1.0)] * 9, [10] * 9)
    assert (generated, asked) == (25, [10, 10, 5])


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"every": 1.5}, {"marker": " "}])
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Think(**wrong)
