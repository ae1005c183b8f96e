"""The pages agree with the code."""

import dataclasses
import importlib.util
import re
from pathlib import Path

from rksc_sglang.config import RkscConfig, flag
from rksc_sglang.contract import RequestContract, ResponseInfo

ROOT = Path(__file__).parents[2]


def first_column(page, heading):
    table = (ROOT / page).read_text().split(heading, 1)[1].split("\n\n|", 1)[1].split("\n\n", 1)[0]
    return [
        re.sub("[` ]", "", row.split("|")[0 if i == 0 else 1])
        for i, row in enumerate(table.splitlines())
    ][2:]


def test_the_readme_lists_every_flag():
    expected = [flag(field.name) for field in dataclasses.fields(RkscConfig)]
    assert first_column("README.md", "## The server") == expected


def test_the_contract_page_lists_every_key():
    request = [field.name for field in dataclasses.fields(RequestContract)]
    assert first_column("docs/contract.md", "# The request contract") == request
    response = [field.name for field in dataclasses.fields(ResponseInfo)]
    assert first_column("docs/contract.md", "The answer is an object") == response


def test_the_results_page_is_made_of_the_results():
    spec = importlib.util.spec_from_file_location("page", ROOT / "scripts/results_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run scripts/results_page.py"
