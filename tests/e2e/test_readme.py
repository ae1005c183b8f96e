"""What the README and the docs show, runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("page", "said"),
    [("README.md", "won with"), ("docs/verification.md", "won"), ("docs/sharing.md", "Counter(")],
)
def test_a_pages_program(page, said, server, tmp_path):
    program = blocks(page, "python")[0]
    assert "http://localhost:30000" in program
    script = tmp_path / "program.py"
    script.write_text(program.replace("http://localhost:30000", server))
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout


def test_the_contracts_request(server):
    (command,) = blocks("docs/contract.md", "bash")
    command = command.replace("localhost:30000", server.removeprefix("http://"))
    output = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(output.stdout)["meta_info"]["rksc"]["share"] == "exact"
