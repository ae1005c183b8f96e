"""The demo, as far as it goes without a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rksc_sglang.demo.questions import (
    OWN_QUESTIONS,
    QuestionsError,
    answer_key,
    load_questions,
    vote,
)
from rksc_sglang.server_process import ServerFailedError, ServerProcess, free_port

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("reply", "question", "key"),
    [
        ("The capital of Japan is Tokyo.", "What is the capital of Japan?", "tokyo"),
        ("Tokyo is the capital of Japan.", "What is the capital of Japan?", "tokyo"),
        (" Paris", "", "paris"),
        ("3 * 5 = 15 balls.", "How many balls?", "15"),
        ("It costs $1,234.50 in total.", "", "1234.5"),
        ("It is 10.0 or 20", "", "20"),
        ("7 - 9 = -2", "", "-2"),
        ("Yes, it is larger.", "Is it larger?", "yes"),
        ("hot", "Is it hot or cold?", "hot"),
        ("", "What is it?", ""),
    ],
)
def test_answer_key(reply: str, question: str, key: str) -> None:
    assert answer_key(reply, question) == key


def test_vote_takes_the_most_frequent() -> None:
    assert vote(["a", "b", "b"], [0.9, 0.1, 0.1]) == ("b", 2)


def test_vote_breaks_ties_by_the_best_score() -> None:
    assert vote(["a", "a", "b", "b"], [0.2, 0.3, None, 0.4]) == ("b", 2)


def test_vote_avoids_empty_answers() -> None:
    assert vote(["", "", "a"], [0.9, 0.9, 0.1]) == ("a", 1)
    assert vote(["", ""], [None, None]) == ("", 2)


def test_own_questions() -> None:
    questions = load_questions(OWN_QUESTIONS)
    assert len(questions) >= 12
    assert len({question.text for question in questions}) == len(questions)


def test_questions_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"question": "How much?", "answer": "6 * 3 = <<6*3=18>>18.\\n#### 18", "id": 7}\n'
        "\n"
        '{"question": "How many?", "answer": 1200}\n'
        '{"question": "Who?", "answer": ["William Shakespeare", "Shakespeare"]}\n'
    )
    answers = [question.answers for question in load_questions(path)]
    assert answers == [{"18"}, {"1200"}, {"william shakespeare", "shakespeare"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "a"', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'["a", "b"]', "expected an object"),
        (b'{"answer": "b"}', '"question" is missing'),
        (b'{"question": "a"}', '"answer" is missing'),
        (b'{"question": " ", "answer": "b"}', '"question": expected some text'),
        (b'{"question": "a", "answer": true}', '"answer": expected text or a number'),
        (b'{"question": "a", "answer": null}', '"answer": expected text or a number'),
        (b'{"question": "a", "answer": []}', '"answer": the list is empty'),
        (b'{"question": "a", "answer": "####"}', '"answer": no word and no number'),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n' + line + b"\n")
    with pytest.raises(QuestionsError) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_unusable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    with pytest.raises(QuestionsError, match=r"questions\.jsonl: No such file"):
        load_questions(path)
    path.write_text("\n")
    with pytest.raises(QuestionsError, match="no questions"):
        load_questions(path)


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that starts a child, says both process ids and answers /health."""
    (tmp_path / "fake_server.py").write_text(
        textwrap.dedent("""\
            import http.server, os, subprocess, sys
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            print(os.getpid(), child.pid, flush=True)
            if "--fail" in sys.argv:
                print("noise\\nrksc: error: no luck", flush=True)
                os._exit(2)
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(200)
                    self.end_headers()
            port = int(sys.argv[sys.argv.index("--port") + 1])
            http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
            """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "fake_server"


def pids_in(log: Path) -> list[int]:
    return [int(pid) for pid in log.read_text().splitlines()[0].split()]


def is_running(pid: int) -> bool:
    """Whether it runs; the dead that nobody has waited for do not count."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    stat = done.stdout.strip()
    return stat != "" and not stat.startswith("Z")


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"still running: {[p for p in pids if is_running(p)]}"
        time.sleep(0.05)


def test_server_process_takes_its_children_with_it(tmp_path: Path, fake_server: str) -> None:
    log = tmp_path / "log"
    with ServerProcess([], log=log, module=fake_server) as server:
        server.wait_ready(timeout=30)
        pids = pids_in(log)
        assert len(pids) == 2
        assert all(map(is_running, pids))
        server.check()
    wait_gone(pids)


def test_killed_server_is_noticed(tmp_path: Path, fake_server: str) -> None:
    log = tmp_path / "log"
    with ServerProcess([], log=log, module=fake_server) as server:
        server.wait_ready(timeout=30)
        pids = pids_in(log)
        os.kill(pids[0], signal.SIGKILL)
        wait_gone(pids[:1])
        with pytest.raises(ServerFailedError, match="killed by signal 9") as caught:
            server.check()
        assert str(log) in str(caught.value)
    wait_gone(pids)


def test_server_that_fails_says_why(tmp_path: Path, fake_server: str) -> None:
    with (
        ServerProcess(["--fail"], log=tmp_path / "log", module=fake_server) as server,
        pytest.raises(ServerFailedError, match=r"^no luck$"),
    ):
        server.wait_ready(timeout=30)


def test_busy_port_is_refused(tmp_path: Path, fake_server: str) -> None:
    port = free_port()
    with ServerProcess([], log=tmp_path / "log", port=port, module=fake_server) as server:
        server.wait_ready(timeout=30)
        with (
            pytest.raises(ServerFailedError, match=f"port {port} is in use"),
            ServerProcess([], log=tmp_path / "log2", port=port, module=fake_server),
        ):
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux only")
def test_server_dies_with_its_killed_owner(tmp_path: Path, fake_server: str) -> None:
    log = tmp_path / "log"
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, time\n"
            "from rksc_sglang.server_process import ServerProcess\n"
            "with ServerProcess([], log=pathlib.Path(sys.argv[1]), module=sys.argv[2]) as server:\n"
            "    server.wait_ready(timeout=30)\n"
            "    print('ready', flush=True)\n"
            "    time.sleep(600)\n",
            str(log),
            fake_server,
        ],
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == b"ready\n"
        owner.kill()
        owner.wait()
    server, child = pids_in(log)
    wait_gone([server])
    os.kill(child, signal.SIGKILL)  # SGLang's children watch their parent, this one does not


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rksc_sglang.demo", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_demo_refuses_a_bad_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a"}\n')
    done = demo("--questions", str(path))
    assert done.returncode == 2
    assert done.stderr == f'rksc: {path}:1: "answer" is missing\n'


@pytest.mark.parametrize("arguments", [["--branches", "9"], ["--port", "0"], ["--limit", "none"]])
def test_demo_refuses_bad_arguments(arguments: list[str]) -> None:
    done = demo(*arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_quickstart_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts/quickstart.sh")], check=True)


def test_quickstart_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh")],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Python 3.10 or newer is needed" in done.stderr
