import argparse
import dataclasses

import pytest

from rksc_sglang.config import ENV_VAR, ConfigError, RkscConfig, add_flags, flag, from_flags
from rksc_sglang.launch_server import LaunchError, check_supported, split_flags, with_defaults


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "fast"),
        ("mode", None),
        ("model", "gpt-2"),
        ("root_first", 1),
        ("root_first_min_tokens", 0),
        ("root_first_min_tokens", -5),
        ("root_first_min_tokens", "many"),
        ("root_first_min_tokens", True),
    ],
)
def test_a_wrong_value_is_refused_naming_its_flag(field, value):
    with pytest.raises(ConfigError) as error:
        RkscConfig(**{field: value})
    assert flag(field) in str(error.value)
    assert repr(value) in str(error.value) or str(value) in str(error.value)


def test_every_field_has_a_flag_with_help():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for field in dataclasses.fields(RkscConfig):
        assert flag(field.name) in text
        assert field.metadata["help"]


def test_flags_make_the_configuration_and_the_rest_is_sglangs():
    config, rest = split_flags(
        [
            "--port",
            "1",
            "--rksc-mode=off",
            "--no-rksc-root-first",
            "--rksc-root-first-min-tokens",
            "7",
        ]
    )
    assert config == RkscConfig(mode="off", root_first=False, root_first_min_tokens=7)
    assert rest == ["--port", "1"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rksc-mode", "fast"], "--rksc-mode"),
        (["--rksc-root-first-min-tokens", "x"], "--rksc-root-first-min-tokens"),
        (["--rksc-speed", "11"], "--rksc-speed"),
        (["--rksc-speed=11"], "--rksc-speed"),
        (["--rksc-mode"], "--rksc-mode"),
    ],
)
def test_a_wrong_flag_is_named(argv, named):
    with pytest.raises(ConfigError, match=named):
        split_flags(argv)


def test_flags_do_not_abbreviate_sglangs():
    namespace = argparse.Namespace()
    assert from_flags(namespace) == RkscConfig()
    assert split_flags(["--rksc-mode", "exact", "--model", "x"])[1] == ["--model", "x"]


def test_the_environment_carries_the_configuration(monkeypatch):
    monkeypatch.delenv(ENV_VAR, raising=False)
    assert RkscConfig.from_env() is None
    config = RkscConfig(mode="balanced", root_first_min_tokens=3)
    config.to_env()
    assert RkscConfig.from_env() == config
    RkscConfig(mode="off").to_env()
    assert RkscConfig.from_env() is None


def test_defaults_fill_only_what_the_user_left_open():
    defaults = {"--dtype": "float32", "--sleep-on-idle": None, "--device": "cpu"}
    assert with_defaults(["--dtype=bfloat16", "--device", "cpu"], defaults) == [
        "--dtype=bfloat16",
        "--device",
        "cpu",
        "--sleep-on-idle",
    ]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("enable_lmcache", True, "--enable-lmcache"),
        ("tokenizer_worker_num", 2, "--tokenizer-worker-num"),
        ("disaggregation_mode", "prefill", "--disaggregation-mode"),
        ("radix_cache_backend", "flexkv", "--radix-cache-backend"),
        ("encoder_only", True, "--encoder-only"),
    ],
)
def test_an_unsupported_flag_is_refused_with_the_reason(field, value, named):
    from sglang.srt.server_args import ServerArgs

    check_supported(ServerArgs(model_path="none"))
    with pytest.raises(LaunchError, match=named):
        check_supported(ServerArgs(model_path="none", **{field: value}))
