"""The series of patches, on copies of the files that it touches."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from rksc_sglang.compat import SGLANG_VERSION

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("apply_patches", ROOT / "scripts/apply_patches.py")
apply_patches = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(apply_patches)


@pytest.fixture
def target(tmp_path):
    """A directory with the touched files of the installed SGLang."""
    _, files = apply_patches.load_series()
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (apply_patches.installed() / name).exists():
            shutil.copy(apply_patches.installed() / name, tmp_path / name)
    (tmp_path / f"sglang-{SGLANG_VERSION}.dist-info").mkdir()
    return tmp_path


def contents(target):
    return {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}


def run(target, *flags):
    return apply_patches.main(["--target", str(target), *flags])


def test_it_is_applied_and_reverted_byte_for_byte(target):
    before = contents(target)
    assert run(target, "--check") == 1
    assert run(target) == 0
    applied = contents(target)
    assert applied != before
    assert run(target, "--check") == 0
    assert run(target) == 0
    assert contents(target) == applied
    assert run(target, "--revert") == 0
    assert contents(target) == before
    assert run(target, "--revert") == 0


def test_a_modified_sglang_is_refused_by_name(target, capsys):
    touched = target / "sglang/lang/ir.py"
    touched.write_text(touched.read_text() + "\n")
    before = contents(target)
    for flags in ([], ["--check"], ["--revert"]):
        assert run(target, *flags) == 2
        assert str(touched) in capsys.readouterr().err
    assert contents(target) == before


def test_half_a_series_is_refused_by_name(target, capsys):
    original = (target / "sglang/lang/ir.py").read_bytes()
    assert run(target) == 0
    (target / "sglang/lang/ir.py").write_bytes(original)
    assert run(target) == 2
    assert "sglang/lang/ir.py lacks it" in capsys.readouterr().err


def test_another_version_is_refused_by_name(target, capsys):
    (target / f"sglang-{SGLANG_VERSION}.dist-info").rename(target / "sglang-0.5.24.dist-info")
    assert run(target) == 2
    assert "sglang-0.5.24.dist-info" in capsys.readouterr().err
    assert run(target / "sglang") == 2
    assert "holds no directory sglang" in capsys.readouterr().err


def test_without_a_target_it_asks(monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    assert apply_patches.main([]) == 1
    assert str(apply_patches.installed()) in asked[0]


def test_the_series_is_that_of_the_patches(target, tmp_path_factory, monkeypatch):
    written = tmp_path_factory.mktemp("series") / "series.json"
    expected = apply_patches.SERIES.read_text()
    monkeypatch.setattr(apply_patches, "SERIES", written)
    assert run(target, "--write-series") == 0
    assert written.read_text() == expected


def test_each_patch_is_small_and_says_what_it_is_for():
    patches = sorted((ROOT / "patches").glob("*.patch"))
    assert [int(patch.name[:4]) for patch in patches] == list(range(1, len(patches) + 1))
    readme = (ROOT / "patches/README.md").read_text()
    for patch in patches:
        message, _, diff = patch.read_text().partition("\n---\n")
        assert re.search(r"^Subject: \[PATCH", message, re.M)
        assert "\nTest: " in message
        changed = re.findall(r"^[+-](?![+-])", diff, re.M)
        assert 0 < len(changed) < 80, patch.name
        assert patch.name in readme
