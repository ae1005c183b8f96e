"""The launcher refuses before it loads anything, with one line and exit status 2."""

import pytest

from rksc_sglang.launch_server import main


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
