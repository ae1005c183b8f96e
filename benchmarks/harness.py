"""What all benchmarks share: servers, interleaved and paired runs, tables, JSON.

A benchmark is a module with a ``summarise(rows)`` function and a ``main`` that calls :func:`run`.
*Conditions* are servers; those of a group are up at the same time. *Cases* are pieces of work. Each
repetition sends a case to every condition of its group, one after the other in random order: the
machine's drift hits all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rksc_sglang.server_process import ServerProcess

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        workload: the kind it belongs to; summaries are by workload.
        run: does it on the server at a URL, and returns measurements by name.
        group: the conditions that it is for, by their group (a model, say).
    """

    workload: str
    run: Callable[[str, random.Random], Mapping[str, Any]]
    group: str = ""


@dataclass(frozen=True)
class Condition:
    """A server to measure: flags of ``python -m rksc_sglang.launch_server``."""

    name: str
    flags: Sequence[str]
    group: str = ""


#: RKSC measures what a prefill costs, mostly in its first half minute: all must be idle then.
SETTLING_SECONDS = 30
#: Whose versions a result is of.
PACKAGES = ("rksc-sglang", "sglang", "torch", "transformers")


class BenchmarkError(Exception):
    """A condition failed, so there is nothing to report."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="a few minutes, wide intervals")
    result.add_argument("--seed", type=int, default=0, help="of texts and orders (default: 0)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    result.add_argument(
        "--questions", type=Path, metavar="FILE", help="JSON lines whose 'question' is the text"
    )
    return result


def generate(url: str, text: str | Sequence[str], max_new_tokens: int, **kwargs: Any) -> Any:
    """One ``/generate`` call, greedy and of exactly this many tokens.

    Raises:
        BenchmarkError: the server did not answer with success.
    """
    params = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "sampling_params": params, **kwargs}
    try:
        answer = requests.post(url + "/generate", json=body, timeout=600)
    except requests.RequestException as error:
        raise BenchmarkError(f"{url}: {error}") from error
    if answer.status_code != 200:
        raise BenchmarkError(f"{url} answered {answer.status_code}: {answer.text[:300]}")
    return answer.json()


def stream(url: str, text: str, max_new_tokens: int) -> dict[str, float]:
    """As :func:`generate`, streamed: seconds until the first token, and prompt + output tokens."""
    params = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
    body = {"text": text, "sampling_params": params, "stream": True}
    start = time.perf_counter()
    ttft, last = None, b""
    try:
        with requests.post(url + "/generate", json=body, stream=True, timeout=600) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    ttft = ttft or time.perf_counter() - start
                    last = line
        meta = json.loads(last[len(b"data: ") :])["meta_info"]
    except (requests.RequestException, ValueError, KeyError) as error:
        raise BenchmarkError(f"{url}: {error!r}") from error
    assert ttft is not None
    return {"ttft": ttft, "tokens": meta["prompt_tokens"] + meta["completion_tokens"]}


def together(calls: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[float]]:
    """Make calls at the same time; gives their results and each one's seconds."""
    results: list[Any] = [None] * len(calls)
    seconds = [0.0] * len(calls)
    errors: list[BaseException] = []

    def make(i: int) -> None:
        start = time.perf_counter()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)
        seconds[i] = time.perf_counter() - start

    threads = [threading.Thread(target=make, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, seconds


def run(
    module: str,
    args: argparse.Namespace,
    conditions: Sequence[Condition],
    cases: Sequence[Case],
    repeats: int,
) -> dict[str, Any]:
    """Measure, summarise, print, and write JSON when asked to.

    Args:
        module: dotted name of the benchmark, whose ``summarise(rows)`` is used.
        repeats: how often each case is run under each of its conditions, warm-up not counted.

    Raises:
        BenchmarkError: a condition failed; nothing is reported then.
    """
    rng = random.Random(args.seed)
    rows: list[Row] = []
    with Progress(
        *Progress.get_default_columns()[:3],
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        for group in dict.fromkeys(condition.group for condition in conditions):
            rows += _measure(
                [c for c in conditions if c.group == group],
                [c for c in cases if c.group == group],
                repeats,
                rng,
                progress,
            )
    flags = {c.name: list(c.flags) for c in conditions}
    result = make_result(module, args, rows, repeats=repeats, conditions=flags)
    return report(result, args.json)


@contextmanager
def start_together(flags: Mapping[str, Sequence[str]]) -> Iterator[dict[str, ServerProcess]]:
    """Servers that are up, idle, and have settled, by the names that their flags have.

    They start at the same time: of two equal servers that started one after the other, the second
    was faster by up to a fifth.
    """
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: stack.enter_context(ServerProcess(list(own), log=logs / f"{name}.log"))
            for name, own in flags.items()
        }
        for server in servers.values():
            server.wait_ready()
        time.sleep(SETTLING_SECONDS)
        yield servers


def _measure(
    conditions: Sequence[Condition],
    cases: Sequence[Case],
    repeats: int,
    rng: random.Random,
    progress: Progress,
) -> Iterator[Row]:
    """Rows of conditions whose servers are up at the same time."""
    bar = progress.add_task("starting servers", total=None)
    with start_together({c.name: c.flags for c in conditions}) as servers:
        total = (repeats + 1) * len(cases) * len(conditions)
        progress.update(bar, description="measuring", total=total)
        for repeat in range(-1, repeats):  # -1 warms up: first calls allocate and compile
            for number, case in enumerate(rng.sample(cases, len(cases))):
                seed = rng.random()  # the same work for each condition
                for condition in rng.sample(conditions, len(conditions)):
                    server = servers[condition.name]
                    server.check()
                    measured = case.run(server.url, random.Random(seed))
                    progress.advance(bar)
                    if repeat >= 0:
                        yield {
                            "workload": case.workload,
                            "condition": condition.name,
                            "repeat": repeat,
                            "position": number,
                            **measured,
                        }


def make_result(
    module: str,
    args: argparse.Namespace,
    rows: Sequence[Row],
    packages: Sequence[str] = PACKAGES,
    **config: Any,
) -> dict[str, Any]:
    """A result without its summary: where, with what, and how the rows were measured."""
    return {
        "benchmark": module,
        "machine": machine(),
        "versions": {package: version(package) for package in packages},
        "config": {
            "quick": args.quick,
            "seed": args.seed,
            **without_folders({"argv": sys.argv[1:], **config}),
        },
        "rows": rows,
    }


def report(result: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """Add the summary to a result, print it, and write it to ``path``.

    What was measured is kept beside it in a ``.partial`` file, should it make no summary.
    """

    def write() -> None:
        if partial is not None:
            store(result, partial)

    partial = path and path.with_suffix(".partial")
    write()
    result["summary"] = import_module(result["benchmark"]).summarise(result["rows"])
    print_tables(result)
    write()
    if path and partial:
        partial.replace(path)
    return result


def store(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON, in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dump(result))


def stored(path: Path | None) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows and runs of a file that earlier parts of a benchmark were written to."""
    if path is None or not path.exists():
        return [], []
    result = json.loads(path.read_text())
    return result["rows"], result["config"].get("runs", [])


def _dump(result: Mapping[str, Any]) -> str:
    """JSON that can be read and compared: a row a line."""
    parts = {key: json.dumps(value, indent=1).replace("\n", "\n ") for key, value in result.items()}
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    parts["rows"] = f"[\n{rows}\n ]"
    return "{\n" + ",\n".join(f' "{key}": {text}' for key, text in parts.items()) + "\n}\n"


def pyplot() -> Any:
    """Matplotlib's, for pictures in files; None, and a word about it, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: install the extra "bench" for matplotlib')
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def without_folders(value: Any) -> Any:
    """Paths inside of a value, by their names alone: where files are is nobody's business."""
    if isinstance(value, Mapping):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    if isinstance(value, str) and value.startswith((os.sep, f".{os.sep}", f"..{os.sep}")):
        return Path(value).name
    return value


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version()}


def print_tables(result: Mapping[str, Any]) -> None:
    """Medians by workload and condition, then the summary."""
    console = Console()
    rows: Sequence[Row] = result["rows"]
    names = sorted({k for row in rows for k, v in row.items() if isinstance(v, float)}, key=str)
    table = Table("workload", "condition", "n", *names, title=result["benchmark"])
    for key in dict.fromkeys((row["workload"], row["condition"]) for row in rows):
        chosen = [row for row in rows if (row["workload"], row["condition"]) == key]
        cells = []
        for name in names:
            values = sorted(row[name] for row in chosen if name in row)
            cells.append(f"{values[len(values) // 2]:.4g}" if values else "")
        table.add_row(*key, str(len(chosen)), *cells)
    console.print(table)
    console.print_json(json.dumps(result["summary"]))


def pairs(rows: Sequence[Row], workload: str, name: str, a: str, b: str) -> tuple[list, list]:
    """Measurement ``name`` under conditions ``a`` and ``b``, paired by repetition and position."""
    values = {
        (row["condition"], row["repeat"], row["position"]): row[name]
        for row in rows
        if row["workload"] == workload and name in row
    }
    keys = [key[1:] for key in values if key[0] == a and (b, *key[1:]) in values]
    return [values[(a, *key)] for key in keys], [values[(b, *key)] for key in keys]
