"""Our own tensor code alone, on one device: the splice copy, attention mass, label-margin exit.

    python -m benchmarks.kernels [--quick] [--device cuda|cpu] [--seed N] [--json FILE]

It starts no server: torch, Triton and what the harness imports are enough. Each case is first
checked on fresh random data against plain torch. ``floor_us`` is the time in which the device
copies as many bytes as the case must read and write, at the rate of a large copy in the same run.
The baseline is a splice in plain torch, or an exit that projects the whole vocabulary.

On CUDA none of a case's data is in the L2 cache before, and times are the device's alone, without
gaps between launches; ``host_us`` is how long Python is busy with the call. Only ``exit check``
waits for the device by itself: it is timed from call to answer.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from benchmarks.harness import BenchmarkError, Row, make_result, report
from rksc_sglang.cgee.exit_rule import CalibratedRule, Probe, lens_logits
from rksc_sglang.kernels.rotate_copy import (
    Rotation,
    rotate_copy,
    rotate_copy_reference,
    rotation_for,
)
from rksc_sglang.rsbcm.attention_mass import SlotMass, attention_of

HEAD_START = 10_000_000  # device cycles, some milliseconds, in which the host gets ahead of it
FLUSH = 1 << 26  # float32 values, more than an L2 cache holds
LEAD = 2.0  # nats at which the exit's rule decides


class Model(NamedTuple):
    """The KV cache of one."""

    name: str
    layers: int
    heads: int
    dim: int


class Sizes(NamedTuple):
    models: Sequence[Model]  # the first in full detail
    tokens: Sequence[int]  # of a splice, and keys of a sampled query; ascending
    rows: Sequence[int]  # verifications of a batch
    hidden: int
    vocabulary: int
    copied: int  # bytes of the copy that gives the bandwidth


MODELS = (Model("8b", 32, 8, 128), Model("smollm2", 30, 3, 64))
FULL = Sizes(MODELS, (64, 256, 1024, 4096, 16384), (8, 64, 256), 4096, 128_256, 1 << 30)
QUICK = Sizes(MODELS, (64, 256, 512), (8,), 4096, 128_256, 1 << 28)


class Case(NamedTuple):
    """One call to time.

    Attributes:
        bytes: that it must read and write.
        correct: runs it on fresh data, and compares.
        waits: it asks the device for its answer, so it is timed from an idle device.
    """

    workload: str
    condition: str
    bytes: int
    run: Callable[[], Any]
    baseline: Callable[[], Any] | None = None
    correct: Callable[[], bool] = lambda: True
    waits: bool = False


def make_cases(sizes: Sizes, device: str) -> list[Case]:
    old, new = torch.ones(2, sizes.copied, dtype=torch.uint8, device=device)
    cases = [Case("copy", f"{sizes.copied >> 20} MiB", 2 * sizes.copied, partial(new.copy_, old))]
    for model in sizes.models:
        for dtype in (torch.bfloat16, torch.float32):
            detailed = model is sizes.models[0] and dtype is torch.bfloat16
            cases += _splices(model, dtype, sizes.tokens, detailed, device)
    cases += _exits(sizes, device)
    cases += _masses(sizes.models[0], sizes.tokens[::2], device)
    return cases


def _splices(
    model: Model, dtype: torch.dtype, tokens: Sequence[int], detailed: bool, device: str
) -> Iterator[Case]:
    name, layers, heads, dim = model
    slots = 2 * tokens[-1]
    keys, values = (
        [torch.empty(slots, heads, dim, dtype=dtype, device=device) for _ in range(layers)]
        for _ in range(2)
    )
    inv_freq = 500_000.0 ** -torch.arange(0, 1, 2 / dim, dtype=torch.float64, device=device)

    def case(n: int, layout: str, turn: str = "one delta") -> Case:
        order = torch.arange if layout == "consecutive" else torch.randperm
        source, target = order(slots, device=device).split(tokens[-1])
        angles = torch.arange(n, device=device)[:, None] * inv_freq
        rotation = {
            "copy": None,
            "one delta": rotation_for(inv_freq, 1000, True),
            "per token": Rotation(angles.cos().float(), angles.sin().float(), True),
        }[turn]
        moved = 2 * 2 * n * layers * heads * dim * dtype.itemsize  # K and V, read and written
        angles_read = sum(x.nbytes for x in rotation[:2]) if rotation else 0
        args = (keys, values, source[:n], target[:n], rotation)
        return Case(
            f"splice {name} {str(dtype).removeprefix('torch.')}",
            f"{n} {layout}, {turn}",
            moved + 2 * 8 * n + angles_read,
            partial(rotate_copy, *args),
            partial(_plain_splice, *args),
            partial(_splices_right, *args),
        )

    yield from (case(n, "scattered") for n in (tokens if detailed else tokens[::2]))
    if detailed:
        yield from (case(n, "consecutive") for n in tokens)
        yield from (case(tokens[-1], "scattered", turn) for turn in ("per token", "copy"))


def _plain_splice(
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    source: Tensor,
    target: Tensor,
    rotation: Rotation | None,
) -> None:
    """The baseline: a layer after the other, in torch's own operations."""
    for k_cache, v_cache in zip(k_caches, v_caches):
        keys = k_cache.index_select(0, source)
        if rotation is not None:
            cos, sin = (x.unsqueeze(-2) for x in rotation[:2])
            x, y = keys.float().chunk(2, -1)
            keys = torch.cat([x * cos - y * sin, y * cos + x * sin], -1).to(keys.dtype)
        k_cache.index_copy_(0, target, keys)
        v_cache.index_copy_(0, target, v_cache.index_select(0, source))


def _splices_right(keys: Sequence[Tensor], values: Sequence[Tensor], *args: Any) -> bool:
    """What is written is right, and nothing else is changed."""
    for cache in (*keys, *values):
        cache.normal_()
    right_keys, right_values = ([cache.clone() for cache in caches] for caches in (keys, values))
    rotate_copy_reference(right_keys, right_values, *args)
    rotate_copy(keys, values, *args)
    unit = torch.finfo(keys[0].dtype).eps  # of the last place: the two may round apart
    return all(map(torch.equal, values, right_values)) and all(
        torch.allclose(key.float(), right.float(), rtol=unit, atol=2e-6)
        for key, right in zip(keys, right_keys)
    )


def _exits(sizes: Sizes, device: str) -> Iterator[Case]:
    """A check of ``cgee.layer_exit``: the labels' logits of each row, and the rule's decision."""
    like = {"dtype": torch.bfloat16, "device": device}
    head = torch.randn(sizes.vocabulary, sizes.hidden, **like).mul_(sizes.hidden**-0.5)
    gain = torch.ones(sizes.hidden, **like)
    labels = [sizes.vocabulary // 3, sizes.vocabulary // 2]
    columns = torch.tensor(labels, device=device)
    probe = Probe((8, 16, 24), ((),) * 3, ((),) * 3)  # the labels' columns are in its place
    rule = CalibratedRule(probe, (1.0,) * 3, ((0.0, 0.0),) * 3, LEAD, LEAD)

    def lens(stream: Tensor, which: Tensor | list[int]) -> Tensor:
        return lens_logits(rms_norm(stream, (sizes.hidden,), gain).float(), head, which)

    def whole(stream: Tensor) -> Tensor:
        """As a model computes its logits."""
        return rms_norm(stream, (sizes.hidden,), gain) @ head.T

    def decide(logits: Tensor) -> list[bool]:
        logits = logits.cpu()  # the rule works on the host
        earlier = torch.zeros_like(logits)
        return rule.decided(torch.stack([earlier, earlier, logits]), None).tolist()

    def check(stream: Tensor) -> list[bool]:
        return decide(lens(stream, labels))

    def check_whole(stream: Tensor) -> list[bool]:
        return decide(whole(stream)[:, labels].float())

    def projects_right(stream: Tensor) -> bool:
        wanted = whole(stream)[:, labels].float()
        return torch.allclose(lens(stream, columns), wanted, rtol=0.02, atol=0.02)

    def decides_right(stream: Tensor) -> bool:
        lead = lens(stream, columns).diff().abs().flatten()
        return check(stream) == (lead >= LEAD).tolist()

    for rows in sizes.rows:
        x = torch.randn(rows, sizes.hidden, **like)
        shape = f"{rows} rows", x.nbytes + len(labels) * (head[0].nbytes + 4 * rows)
        ours, all_, right = partial(lens, x, columns), partial(whole, x), partial(projects_right, x)
        yield Case("exit projection", *shape, ours, all_, right)
        checks = partial(check, x), partial(check_whole, x)
        yield Case("exit check", *shape, *checks, correct=partial(decides_right, x), waits=True)


def _masses(model: Model, tokens: Sequence[int], device: str) -> Iterator[Case]:
    """A sample of ``rsbcm.attention_mass``: one query of one layer, four query heads a KV head."""
    _, _, heads, dim = model
    slots = 2 * tokens[-1]
    keys = torch.randn(slots, heads, dim, device=device).bfloat16()
    query = torch.randn(4 * heads, dim, device=device).bfloat16()
    mass = SlotMass(slots, device)

    def case(n: int) -> Case:
        some = torch.randperm(slots, device=device)[:n]

        def run() -> None:
            mass.add(some, attention_of(query, keys[some], dim**-0.5))

        def correct() -> bool:
            mass.forget(some)
            run()
            each = keys[some].double().repeat_interleave(4, 1)
            scores = torch.einsum("hd,thd->ht", query.double(), each) * dim**-0.5
            expected = scores.softmax(1).mean(0).float()
            return torch.allclose(mass.mass[some], expected, rtol=1e-3, atol=1e-8)

        size = n * (heads * dim * keys.itemsize + 8 + 2 * 4)
        return Case("attention mass", f"{n} keys", size, run, None, correct)

    return map(case, tokens)


def measure(cases: Sequence[Case], device: str, repeats: int, seed: int) -> list[Row]:
    """Check all cases, then time them: in each repetition all, in random order.

    Raises:
        BenchmarkError: a case computes something wrong; nothing is timed then.
    """
    for case in cases:
        if not case.correct():
            raise BenchmarkError(f"{case.workload}, {case.condition}: the result is wrong")
    rng = random.Random(seed)
    flush = torch.zeros(FLUSH if device == "cuda" else 0, device=device)
    rows: list[list[Row]] = [[] for _ in cases]
    for repeat in range(-1, repeats):  # -1 warms up
        for place in rng.sample(range(len(cases)), len(cases)):
            case = cases[place]
            row: Row = {"workload": case.workload, "condition": case.condition}
            row |= {"repeat": repeat, "bytes": case.bytes}
            for name, call in rng.sample([("rksc", case.run), ("baseline", case.baseline)], 2):
                if call is not None:
                    row[f"{name}_us"], host = _time(call, flush, case.waits)
                    if name == "rksc":
                        row["host_us"] = host
            if repeat >= 0:
                rows[place].append(row)
    flat = [row for some in rows for row in some]
    rate = _bytes_per_us(flat)
    return [{**row, "floor_us": row["bytes"] / rate} for row in flat]


def _bytes_per_us(rows: Sequence[Row]) -> float:
    """The device's memory bandwidth, reads and writes together."""
    copies = [row for row in rows if row["workload"] == "copy"]
    return float(np.median([row["bytes"] / row["rksc_us"] for row in copies]))


def _time(call: Callable[[], Any], flush: Tensor, waits: bool) -> tuple[float, float]:
    """Microseconds of the device, and of the host until the call came back."""
    if not flush.is_cuda:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return 1e6 * seconds, 1e6 * seconds
    flush.sum()  # reads only: what it leaves in the cache need not be written back
    if waits:
        torch.cuda.synchronize()
    else:  # private, but what keeps launches that the host is slow with out of the device's time
        torch.cuda._sleep(HEAD_START)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end), 1e6 * host


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By workload: floor over ours in its largest case, and the least of baseline over ours."""
    cases: dict[str, dict[tuple[int, str], list[Row]]] = {}
    for row in rows:
        if row["workload"] != "copy":
            some = cases.setdefault(row["workload"], {})
            some.setdefault((row["bytes"], row["condition"]), []).append(row)

    def ratio(some: Sequence[Row], above: str) -> float:
        return float(np.median([row[above] / row["rksc_us"] for row in some]))

    return {
        "bandwidth_gb_s": _bytes_per_us(rows) / 1e3,
        "floor_share": {name: ratio(some[max(some)], "floor_us") for name, some in cases.items()},
        "least_speedup": {
            name: min(ratio(same, "baseline_us") for same in some.values())
            for name, some in cases.items()
            if any("baseline_us" in same[0] for same in some.values())
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of data and orders (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    sizes, repeats = (QUICK, 5) if args.quick else (FULL, 20)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rows = measure(make_cases(sizes, device), device, repeats, args.seed)
    packages = ("torch", "triton") if device == "cuda" else ("torch",)
    result = make_result("benchmarks.kernels", args, rows, packages, repeats=repeats)
    result["machine"]["device"] = name
    report(result, args.json)


if __name__ == "__main__":
    main()
