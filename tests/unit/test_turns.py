"""Servers in turns: one works at a time, and each clock counts its own turns."""

import signal
import time

import pytest

from benchmarks.turns import Clock, settle, take_turns


class Server:
    """Records when it may run; ``check`` is asked before each turn."""

    def __init__(self, name, events):
        self.name, self.events, self.is_running, self.turns = name, events, True, 0

    def signal(self, number):
        assert number in (signal.SIGSTOP, signal.SIGCONT)
        self.is_running = number == signal.SIGCONT
        self.events.append(self)

    def check(self):
        self.turns += 1


@pytest.fixture
def servers():
    events = []
    return {name: Server(name, events) for name in "abc"}


def test_one_works_at_a_time_and_all_afterwards(servers):
    seen = []

    def job(name):
        def run(clock):
            for _ in range(20):
                time.sleep(0.005)
                seen.append([one for one, server in servers.items() if server.is_running])
            return name.upper()

        return run

    done = take_turns(servers, {name: job(name) for name in "abc"}, turn=0.01)
    assert done == {"a": "A", "b": "B", "c": "C"}
    assert all(len(running) <= 1 for running in seen)
    assert {tuple(running) for running in seen} >= {("a",), ("b",), ("c",)}
    assert all(server.is_running for server in servers.values())


def test_a_clock_stands_still_outside_of_its_turns(servers):
    moved_while_stopped = []

    def watch(name):
        def run(clock):
            server = servers[name]
            while clock() < 0.05:
                before, first = (server.turns, server.is_running), clock()
                last, after = clock(), (server.turns, server.is_running)
                if before == after and not server.is_running:
                    moved_while_stopped.append(last - first)
            return clock()

        return run

    start = time.perf_counter()
    done = take_turns(servers, {name: watch(name) for name in "ab"}, turn=0.01)
    assert sum(done.values()) <= time.perf_counter() - start
    assert min(done.values()) >= 0.05
    assert not any(moved_while_stopped)
    assert servers["a"].turns >= 2
    assert servers["c"].turns == 0  # has no job


def test_a_job_that_fails_leaves_all_running(servers):
    def fail(clock):
        raise KeyError("answer")

    with pytest.raises(KeyError, match="answer"):
        take_turns(servers, {"a": lambda clock: time.sleep(0.02), "b": fail}, turn=0.01)
    assert all(server.is_running for server in servers.values())


def test_a_server_that_has_ended_is_noticed(servers):
    def ended():
        raise RuntimeError("ended")

    servers["b"].check = ended
    with pytest.raises(RuntimeError, match="ended"):
        take_turns(servers, dict.fromkeys("ab", lambda clock: time.sleep(0.05)), turn=0.01)
    assert all(server.is_running for server in servers.values())


def test_a_clock_that_never_ran_is_at_zero():
    assert Clock()() == 0.0


def test_each_settles_in_turns_of_its_own(servers):
    settle(servers, seconds=0.03, turn=0.02)
    assert all(server.turns >= 2 and server.is_running for server in servers.values())
