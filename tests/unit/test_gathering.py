from rksc_sglang.asks import gathering
from rksc_sglang.asks.gathering import Gathering
from rksc_sglang.contract import Together

THREE = Together(id="fork", count=3)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make(patience=0.1):
    clock, counts = Clock(), []
    return Gathering(lambda: patience, counts.append, clock), clock, counts


def test_the_first_wait_for_the_last():
    group, _, counts = make()
    for _ in range(2):
        group.arrived("us", THREE)
        assert group.awaits("us", THREE)
    group.arrived("us", THREE)
    assert not group.awaits("us", THREE)
    assert counts == ["gathered_groups"]


def test_patience_ends_once_for_all():
    group, clock, counts = make()
    group.arrived("us", THREE)
    clock.now = 0.09
    assert group.awaits("us", THREE)
    clock.now = 0.11
    assert not group.awaits("us", THREE)
    clock.now = 0.05  # whatever the time: who was let go is not held again
    assert not group.awaits("us", THREE)
    group.arrived("us", THREE)
    assert not group.awaits("us", THREE)
    assert counts == ["scattered_groups"]


def test_later_requests_of_a_branch_wait_for_nobody():
    group, _, counts = make()
    for _ in range(3):
        group.arrived("us", THREE)
    group.arrived("us", THREE)
    assert not group.awaits("us", THREE)
    assert counts == ["gathered_groups"]


def test_tenants_do_not_wait_for_each_other():
    group, _, _ = make()
    group.arrived("us", THREE)
    group.arrived("them", THREE)
    group.arrived("us", THREE)
    group.arrived("us", THREE)
    assert not group.awaits("us", THREE)
    assert group.awaits("them", THREE)


def test_nobody_waits_where_a_pass_costs_nothing_or_nobody_else_comes():
    group, _, _ = make(patience=0.0)
    group.arrived("us", THREE)
    assert not group.awaits("us", THREE)
    group, _, _ = make()
    group.arrived("us", Together(id="one", count=1))
    assert not group.awaits("us", Together(id="one", count=1))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(gathering, "REMEMBERED", 4)
    group, _, _ = make()
    for number in range(10):
        group.arrived("us", Together(id=str(number), count=2))
    assert len(group._gathered) == 4
    assert not group.awaits("us", Together(id="0", count=2))
    assert group.awaits("us", Together(id="9", count=2))
