"""The launcher refuses before it loads anything, with one line and exit status 2."""

import os

import pytest

from rksc_sglang.launch_server import main, with_cpu_settings


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rksc-mode", "fast"], "--rksc-mode: expected one of off, exact, balanced, paper"),
        (["--rksc-root-first-min-tokens", "0"], "--rksc-root-first-min-tokens: must be at least 1"),
        (["--rksc-nothing", "0.5"], "--rksc-nothing: no such flag"),
    ],
)
def test_a_wrong_flag_is_one_line_naming_it(capsys, argv, named):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("rksc: error: ")
    assert named in message
    assert message.count("\n") == 1


def test_help_explains_our_flags_and_sglangs(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    assert "--rksc-mode" in text
    assert "--mem-fraction-static" in text


def test_cpu_settings_are_those_that_the_user_did_not_choose(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # has it restored behind this test
    monkeypatch.delenv("GLIBC_TUNABLES")
    chosen = with_cpu_settings(["--dtype", "float16", "--attention-backend=torch_native"])
    assert chosen[:2] == ["--dtype", "float16"]
    assert chosen.count("--dtype") == 1
    assert "rksc_cpu" not in chosen
    assert chosen[chosen.index("--device") + 1] == "cpu"
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_an_environment_that_the_user_chose_is_kept(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    with_cpu_settings([])
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.perturb=1"
