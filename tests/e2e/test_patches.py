"""RKSC on a copy of SGLang with the extension points of patches/: nothing is hooked, all works."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from rksc_sglang.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
#: Unit tests of what uses the extension points.
UNIT = ("test_compat", "test_layer_exit", "test_attention_mass", "test_root_first")
PROGRAM = """
import sglang as sgl
import rksc_sglang as rksc
from rksc_sglang import compat

@sgl.function
def program(s):
    s += sgl.user("Name a colour and say why, in the words of a painter.")
    s += sgl.assistant_begin()
    branches = rksc.fork(s, 3)
    branches += sgl.gen("answer", max_tokens=6, temperature=0)
    verdict = rksc.verify(branches, "answer", labels=("Yes", "No"))
    answers = [branch["answer"] for branch in branches]
    return answers, answers[verdict.winner]  # equal answers tie: which of them wins is rounding

backend = sgl.RuntimeEndpoint({url!r}, chat_template_name="chatml")
print(program.run(backend=backend).ret_value)
print(sum(map(compat.has_extension, compat.EXTENSIONS)))
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A directory with a copy of the installed SGLang: links, but for the files that it patches."""
    target = tmp_path_factory.mktemp("patched")
    installed = Path(importlib.util.find_spec("sglang").origin).parent
    shutil.copytree(installed, target / "sglang", copy_function=os.symlink)
    names = json.loads((ROOT / "patches/series.json").read_text())["files"]
    for copy in (target / name for name in names):
        if copy.exists():
            original = copy.resolve()
            copy.unlink()
            shutil.copy(original, copy)
    script = [sys.executable, ROOT / "scripts/apply_patches.py", "--target", target]
    subprocess.run(script, check=True)
    yield target
    subprocess.run([*script, "--revert"], check=True)
    for name in names:
        original, copy = installed.parent / name, target / name
        assert copy.exists() == original.exists()
        assert not copy.exists() or copy.read_bytes() == original.read_bytes()


def python(*command: object, **env: object) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **{name: str(value) for name, value in env.items()}},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_unit_tests_pass(patched):
    tests = [f"tests/unit/{name}.py" for name in UNIT]
    env = {"PYTHONPATH": patched, "RKSC_TEST_ARCHITECTURE": "Qwen3"}
    assert " passed" in python("-m", "pytest", "-q", *tests, **env)


def test_a_server_and_its_programs_hook_nothing(patched, tiny_model, rksc_tiny, logs):
    flags = ["--model-path", str(tiny_model), "--dtype", "float32", "--max-total-tokens", "1600"]
    log = logs / "patched.log"
    with ServerProcess(flags, log=log, env={"PYTHONPATH": str(patched)}) as server:
        server.wait_ready()
        status = requests.get(server.url + "/rksc/status", timeout=60).json()
        assert set(status["extension_points"].values()) == {"extension point"}
        assert "extension points of patches/: 6 of 6" in log.read_text()
        malformed = {
            "text": "x",
            "stream": True,
            "sampling_params": {"custom_params": {"rksc": {"branch": "first"}}},
        }
        answer = requests.post(server.url + "/generate", json=malformed, timeout=60)
        assert answer.status_code == 400
        assert "branch" in answer.text
        said = python("-c", PROGRAM.format(url=server.url), PYTHONPATH=patched)
        outcome, found = said.splitlines()
        assert found == "6"
    plain = python("-c", PROGRAM.format(url=rksc_tiny))
    assert plain.splitlines() == [outcome, "0"]
