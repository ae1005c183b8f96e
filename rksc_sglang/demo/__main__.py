"""``python -m rksc_sglang.demo``: questions, branches, votes and verdicts on a server of its own.

SmolLM2 answers questions, with RKSC and then with the radix cache off; the reasoner, a small model
of our own, solves problems.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rksc_sglang.demo.questions import Question, QuestionsError, load_questions
from rksc_sglang.server_process import ServerFailedError, ServerProcess

if TYPE_CHECKING:
    from rich.console import Console

    from rksc_sglang.demo.display import Pass
    from rksc_sglang.demo.program import Setting

#: 16 Ki tokens, 0.8 GB, are enough for the questions in work. The fraction is of the memory that is
#: free at start; with SGLang's default, whatever else takes memory meanwhile can stop the server.
SERVER_FLAGS = ("--max-total-tokens", "16384")
MODELS = {"smollm2": "SmolLM2", "reasoner": "the reasoner"}
EXACT = ("--rksc-mode", "exact")
CACHE_OFF = ("--rksc-mode", "off", "--disable-radix-cache")
MAX_BRANCHES = 8
#: Questions in work at the same time, to keep the server's batches full.
CONCURRENCY = 4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart.sh",
        description="Starts a server with an embedded model, has it answer questions in several "
        "branches each, verifies and votes, then does the same with the radix cache off; then "
        "another model, trained to solve problems, does its own.",
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='JSON lines with "question" and "answer", where an answer is text, a number, or a '
        'list of right ones, and may end in "#### 18" as in GSM8K; default: questions of the demo',
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="only this model (default: one after the other, or smollm2 with --questions)",
    )
    parser.add_argument(
        "--limit",
        type=_count,
        default=12,
        help="questions to ask each model at most (default: %(default)s)",
    )
    parser.add_argument(
        "--branches",
        type=_count,
        choices=range(1, MAX_BRANCHES + 1),
        default=MAX_BRANCHES,
        metavar=f"1-{MAX_BRANCHES}",
        help="branches a question (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_count,
        help="tokens of an answer at most (default: 24 of SmolLM2, 96 with --questions, and 160 "
        "of the reasoner)",
    )
    parser.add_argument("--port", type=_port, help="port of the server (default: a free one)")
    parser.add_argument(
        "--skip-cache-off",
        action="store_true",
        help="leave out the second pass, with the radix cache off",
    )
    args = parser.parse_args(argv)
    if args.questions is not None:
        args.model = args.model or "smollm2"
        args.max_tokens = args.max_tokens or (96 if args.model == "smollm2" else None)
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, got {text!r}")
    return int(text)


def setting_of(model: str, args: argparse.Namespace) -> Setting:
    from rksc_sglang.demo.program import SETTINGS

    setting = SETTINGS[model]
    return replace(
        setting,
        questions=args.questions or setting.questions,
        max_tokens=args.max_tokens or setting.max_tokens,
    )


def run_pass(
    model: str,
    flags: Sequence[str],
    questions: Sequence[Question],
    args: argparse.Namespace,
    console: Console,
    log: Path,
) -> Pass:
    """All questions on a server of their own, which is gone afterwards."""
    name = f"{MODELS[model]}, {'RKSC on' if flags == EXACT else 'radix cache off'}"
    setting = setting_of(model, args)
    flags = ["--rksc-model", model, *SERVER_FLAGS, *flags]
    # SGLang leaves its sockets behind in the temporary directory.
    env = {"TMPDIR": str(log.parent)}
    with ServerProcess(flags, log=log, port=args.port, env=env) as server:
        from rksc_sglang.demo.display import Pass, outcome_table, waiting
        from rksc_sglang.demo.program import CountingEndpoint, Outcome, solve

        with waiting(console, f"Starting the server: {name}"):
            server.wait_ready()
        endpoint = CountingEndpoint(server.url, chat_template_name="chatml")
        outcomes: dict[int, Outcome] = {}
        pool = ThreadPoolExecutor(CONCURRENCY)
        try:
            start = time.perf_counter()
            with outcome_table(console, name, questions) as show:
                running = {
                    pool.submit(solve, endpoint, question, args.branches, setting): number
                    for number, question in enumerate(questions)
                }
                while running:
                    done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                    server.check()
                    for future in done:
                        error = future.exception()
                        if error is not None:
                            raise _reason(error, server)
                        number = running.pop(future)
                        outcomes[number] = future.result()
                        show(number, outcomes[number])
            seconds = time.perf_counter() - start
        finally:
            # Without waiting: what still runs ends with the server.
            pool.shutdown(wait=False, cancel_futures=True)
        return Pass(name, model, [outcomes[number] for number in range(len(questions))], seconds)


def _reason(error: BaseException, server: ServerProcess) -> ServerFailedError:
    """Why a program failed: most often because the server is about to be gone."""
    try:
        for _ in range(100):
            server.check()
            time.sleep(0.1)
    except ServerFailedError as failure:
        return failure
    return ServerFailedError(f"a question failed: {error!r}; the server's log is {server.log}")


def run_demo(args: argparse.Namespace) -> int:
    """The exit status; the reason of a failure has been printed."""
    models = [args.model] if args.model else list(MODELS)
    questions = {}
    for model in models:
        setting = setting_of(model, args)
        questions[model] = load_questions(setting.questions, setting.key)[: args.limit]

    from rich.console import Console

    from rksc_sglang.demo.display import print_summary
    from rksc_sglang.models import ensure_model

    # Here and not in the server, so that its progress is seen.
    for model in models:
        ensure_model(model)
    console = Console()
    logs = Path(tempfile.mkdtemp(prefix="rksc-demo-"))
    keep_logs = False
    try:
        passes: list[Pass] = []
        for model in models:
            # The reasoner's pass is about its solutions: one is enough.
            off = model == "smollm2" and not args.skip_cache_off
            for flags in (EXACT, CACHE_OFF)[: 2 if off else 1]:
                log = logs / f"server-{len(passes)}.log"
                passes.append(run_pass(model, flags, questions[model], args, console, log))
        print_summary(console, passes)
        return 0
    except Exception:
        keep_logs = True
        raise
    finally:
        if not keep_logs:
            shutil.rmtree(logs, ignore_errors=True)


def _exit_on(signum: int, frame: object) -> NoReturn:
    sys.exit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # A program's failure arrives as an exception; SGLang's frontend warns about it as well.
    warnings.simplefilter("ignore")
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _exit_on)

    from rksc_sglang.models import EmbeddedModelError

    try:
        return run_demo(args)
    except QuestionsError as error:
        return _fail(error, 2)
    except (ServerFailedError, EmbeddedModelError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted, the server is stopped", 130)
    except BrokenPipeError:
        return 1  # whoever read the output has gone
    except OSError as error:
        return _fail(error, 1)
    except SystemExit as error:
        return int(error.code or 0)


def _fail(message: object, code: int) -> int:
    print(f"rksc: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    # SGLang's frontend leaves threads behind when a program is cut short; they would be waited for.
    os._exit(code)
