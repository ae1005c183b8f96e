"""Branches' life cycle on a real server with RKSC's eviction policy and a small pool."""

import time

import pytest
import requests
import sglang as sgl

import rksc_sglang as rksc
from rksc_sglang.rsbcm.trace import End, Finish, Report, Start, read_events


@pytest.fixture
def backend(evicting_tiny):
    return sgl.RuntimeEndpoint(evicting_tiny, chat_template_name="chatml")


def status(url):
    return requests.get(url + "/rksc/status", timeout=60).json()["ranks"][0]


def eventually(condition):
    """The cache hears of reports between two passes, later than they are answered."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@sgl.function
def program(s):
    s += "A story about a river, told by several people at once:"
    branches = rksc.fork(s, 4, hints=[f" number {i} says" for i in range(4)])
    branches += sgl.gen("x", max_tokens=16, ignore_eos=True, temperature=0)
    texts = [branch["x"] for branch in branches]
    branches.stop([1, 2])
    return texts


def test_pages_of_pruned_branches_are_given_back_and_programs_end(evicting_tiny, backend):
    before = status(evicting_tiny)["eviction"]
    texts = program.run(backend=backend).ret_value
    assert all(texts)
    # Each of the two has a hint and 16 tokens of its own, but for the last, whose KV nobody needs.
    eventually(
        lambda: status(evicting_tiny)["eviction"]["freed_tokens"] >= before["freed_tokens"] + 30
    )
    assert status(evicting_tiny)["features"]["eviction"]["on"]
    assert status(evicting_tiny)["features"]["attention_mass"]["on"]
    assert status(evicting_tiny)["counters"]["errors"] == 0


def test_the_trace_has_requests_reports_and_ends_of_programs(evicting_tiny, backend, logs):
    program.run(backend=backend)

    def events():
        with (logs / "trace.jsonl").open() as lines:
            return list(read_events(lines))

    eventually(lambda: any(isinstance(event, End) for event in events()))
    found = events()
    (end,) = [event for event in found if isinstance(event, End)][-1:]
    starts = [e for e in found if isinstance(e, Start) and e.program == end.program]
    assert {start.branch for start in starts} == {0, 1, 2, 3}
    (group,) = {start.group for start in starts}
    reports = [event for event in found if isinstance(event, Report) and event.group == group]
    assert {b: s for report in reports for b, s in report.states.items()} == {
        **dict.fromkeys([1, 2], "pruned"),
        **dict.fromkeys([0, 3], "frontier"),
    }
    rids = {start.rid for start in starts}
    ended = [event for event in found if isinstance(event, Finish) and event.rid in rids]
    assert [len(event.output) for event in ended] == [16] * 4
    assert all(event.mass is not None for event in ended)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"states": {"0": "pruned"}}, "group"),
        ({"group": "g", "states": {"0": "dead"}}, "frontier"),
        ({"program": ""}, "program"),
    ],
)
def test_a_malformed_report_is_refused_by_the_fields_name(evicting_tiny, body, named):
    answer = requests.post(evicting_tiny + "/rksc/branches", json=body, timeout=60)
    assert answer.status_code in (400, 422)
    assert named in answer.text
