"""``python -m rksc_sglang.launch_server``: SGLang's server with RKSC on.

Takes every flag of ``python -m sglang.launch_server`` unchanged, and ``--rksc-*`` beside them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rksc_sglang import config as rksc_config
from rksc_sglang.config import ConfigError, RkscConfig

#: Flags for machines without an accelerator, each used only where the user gave none.
CPU_FLAGS = {
    "--device": "cpu",
    "--attention-backend": "rksc_cpu",
    "--sampling-backend": "pytorch",
    # Without it an idle scheduler burns a whole core.
    "--sleep-on-idle": None,
}

#: For SGLang's processes there, where the user's has none: weights in huge pages. A pass of few
#: tokens reads all of them, and took 1.1 times as long without.
CPU_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

#: SGLang sizes the KV pool by free memory, which on a CPU is the user's own: 64 Ki tokens of the
#: embedded model are 3 GB. The fraction only matters to SGLang's check that they fit, which fails
#: at its default when other programs take memory during the start.
EMBEDDED_FLAGS = {"--max-total-tokens": "65536", "--mem-fraction-static": "0.95"}

#: SGLang's fields that select a process layout or a cache that RKSC is not in, and why.
UNSUPPORTED_FIELDS = {
    "grpc_mode": "the gRPC servers do not pass the request contract on",
    "smg_grpc_mode": "the gRPC servers do not pass the request contract on",
    "use_ray": "Ray starts SGLang's processes by other means",
    "encoder_only": "an encoder has no KV cache",
    "enable_lmcache": "it replaces the radix cache",
    "enable_flexkv": "it replaces the radix cache",
    "enable_unified_cache_external_linker": "it needs SGLang's own radix cache",
    "enable_int8_mamba_checkpoint": "it needs SGLang's own radix cache",
    "dllm_algorithm": "diffusion language models have no causal prefix to share",
}


class LaunchError(Exception):
    """The server cannot start as asked; the message is for the user."""


def build_parser() -> argparse.ArgumentParser:
    """All flags in one parser, for ``--help``."""
    from sglang.srt.server_args import ServerArgs

    from rksc_sglang.rsbcm.policy import register_policies

    register_policies()
    parser = argparse.ArgumentParser(
        prog="python -m rksc_sglang.launch_server",
        usage="%(prog)s [--rksc-FLAG ...] [SGLANG-FLAG ...]",
        description="SGLang's server with reasoning-aware KV cache sharing. Every flag of SGLang "
        "is taken unchanged. Without --model-path an embedded model is served. Without an "
        "accelerator, CPU settings are chosen for the flags that are not given.",
    )
    rksc_config.add_flags(parser)
    ServerArgs.add_cli_args(parser)
    return parser


def split_flags(argv: Sequence[str]) -> tuple[RkscConfig, list[str]]:
    """Take RKSC's flags out of the command line.

    Returns:
        The configuration, and the arguments that are SGLang's.

    Raises:
        ConfigError: an ``--rksc-*`` flag is unknown or has a wrong value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    rksc_config.add_flags(parser)
    try:
        namespace, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    unknown = [arg for arg in rest if arg.startswith("--rksc-")]
    if unknown:
        raise ConfigError(f"{unknown[0].split('=')[0]}: no such flag, see --help")
    return rksc_config.from_flags(namespace), rest


def with_defaults(argv: Sequence[str], defaults: Mapping[str, str | None]) -> list[str]:
    """Add each default flag (value None: a switch) where the user did not give that flag."""
    given = {arg.split("=")[0] for arg in argv}
    result = list(argv)
    for name, value in defaults.items():
        if name not in given:
            result += [name] if value is None else [name, value]
    return result


def with_cpu_settings(argv: Sequence[str]) -> list[str]:
    """Choose what suits a machine without an accelerator, where the user did not.

    Environment variables are set in this process, and used by those that it starts.
    """
    from rksc_sglang.platform import default_dtype

    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return with_defaults(argv, {**CPU_FLAGS, "--dtype": default_dtype()})


def check_supported(server_args: Any) -> None:
    """Refuse what RKSC cannot run with.

    Raises:
        LaunchError: naming the flag and the reason.
    """
    from rksc_sglang.rsbcm.policy import POLICIES, make_strategy

    for name, reason in UNSUPPORTED_FIELDS.items():
        if getattr(server_args, name, None):
            raise LaunchError(f"--{name.replace('_', '-')} does not work with RKSC: {reason}")
    if server_args.tokenizer_worker_num > 1:
        raise LaunchError(
            "--tokenizer-worker-num above 1 does not work with RKSC: "
            "the tokenizer workers do not check the request contract"
        )
    if server_args.radix_eviction_policy in POLICIES:
        if server_args.enable_hierarchical_cache:
            raise LaunchError(
                f"--enable-hierarchical-cache does not work with --radix-eviction-policy "
                f"{server_args.radix_eviction_policy}: it was not tried; take one of SGLang's"
            )
        try:
            make_strategy(
                server_args.radix_eviction_policy, server_args.radix_eviction_policy_config
            )
        except ValueError as error:
            raise LaunchError(str(error)) from error
    if server_args.disaggregation_mode != "null":
        raise LaunchError(
            "--disaggregation-mode does not work with RKSC: "
            "prefix and decode live in different servers"
        )
    if server_args.radix_cache_backend not in (None, "rksc"):
        raise LaunchError(
            f"--radix-cache-backend {server_args.radix_cache_backend} does not work with RKSC, "
            "which brings its own"
        )
    if os.environ.get("SGLANG_RUST_SERVER", "0") not in ("", "0", "false"):
        raise LaunchError("SGLANG_RUST_SERVER does not work with RKSC: it bypasses the contract")


def check_profile(config: RkscConfig, model_path: str) -> None:
    """Refuse a profile that is not of the model that is to be served.

    Raises:
        LaunchError: with the reason.
    """
    from pathlib import Path

    from rksc_sglang.asks.profile import ProfileError, fingerprint, thresholds
    from rksc_sglang.cgee.profile import ExitProfileError, profile_of

    try:
        thresholds(config, Path(model_path))
        profile_of(config.profile, fingerprint(Path(model_path)))
    except (ProfileError, ExitProfileError) as error:
        raise LaunchError(str(error)) from error


def prepare(argv: Sequence[str]) -> tuple[RkscConfig, Any]:
    """Check the command line and complete it.

    Returns:
        RKSC's configuration, published to the environment, and SGLang's ``ServerArgs``.

    Raises:
        ConfigError, LaunchError, CompatError, EmbeddedModelError: with a message for the user.
    """
    config, rest = split_flags(argv)
    config.to_env()

    from sglang.srt.plugins import load_plugins

    from rksc_sglang import compat
    from rksc_sglang.platform import has_accelerator

    compat.check_version()
    load_plugins()
    if config.enabled:
        compat.check_registrations()
    if not has_accelerator():
        rest = with_cpu_settings(rest)
    if not any(arg.split("=")[0] in ("--model-path", "--model", "--config") for arg in rest):
        from rksc_sglang.models import ensure_model

        rest += ["--model-path", str(ensure_model(config.model))]
        rest = with_defaults(rest, {"--served-model-name": config.model, **EMBEDDED_FLAGS})

    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils.network import is_port_available

    if config.enabled:
        rest = with_defaults(rest, {"--radix-cache-backend": "rksc"})
    server_args = prepare_server_args(rest)
    if config.enabled:
        check_supported(server_args)
        if config.profile:
            check_profile(config, server_args.model_path)
    if not is_port_available(server_args.port):
        raise LaunchError(f"port {server_args.port} is in use: choose another with --port")
    return config, server_args


def print_banner(config: RkscConfig, server_args: Any) -> None:
    """Say what is on, and what is not and why; called when the server is ready."""
    from sglang.srt.entrypoints.http_server import get_global_state

    from rksc_sglang.compat import EXTENSIONS, has_extension
    from rksc_sglang.contract import KEY

    lines = [f"RKSC is on, mode {config.mode}. Status: {server_args.url()}/rksc/status"]
    # Under data parallelism SGLang keeps what the schedulers report: the status page has it.
    info = get_global_state().scheduler_info.get(KEY, {"features": {}})
    for name, feature in info["features"].items():
        lines.append(f"  {name}: " + ("on" if feature["on"] else f"off ({feature['reason']})"))
    missing = [name for name in EXTENSIONS if not has_extension(name)]
    lines.append(
        f"  extension points of patches/: {len(EXTENSIONS) - len(missing)} of {len(EXTENSIONS)}"
        + (f" (done otherwise: {', '.join(missing)})" if missing else "")
    )
    print("\n".join(lines), file=sys.stderr, flush=True)


def run(config: RkscConfig, server_args: Any) -> None:
    """Serve until stopped."""
    if not config.enabled:
        from sglang.launch_server import run_server

        run_server(server_args)
        return

    from sglang.srt.entrypoints import http_server

    from rksc_sglang.serving import http
    from rksc_sglang.serving.scheduler import run_scheduler_process
    from rksc_sglang.serving.tokenizer_manager import init_tokenizer_manager

    http.install(http_server.app)
    http_server.launch_server(
        server_args,
        init_tokenizer_manager_func=init_tokenizer_manager,
        run_scheduler_process_func=run_scheduler_process,
        launch_callback=lambda: print_banner(config, server_args),
    )


def _fail(message: object) -> NoReturn:
    print(f"rksc: error: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        build_parser().print_help()
        return

    from rksc_sglang.compat import CompatError
    from rksc_sglang.models import EmbeddedModelError

    try:
        config, server_args = prepare(argv)
    except (ConfigError, LaunchError, CompatError, EmbeddedModelError) as error:
        _fail(error)

    from sglang.srt.utils import kill_process_tree

    try:
        run(config, server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
