"""SGLang's ``torch_native`` attention against ours, ``rksc_cpu``: the same server work on a CPU.

Stock SGLang otherwise (``--rksc-mode off``), SmolLM2, float32, everything else as on our CPU
platform for both. Speed-ups are torch_native's seconds over ours, medians of paired ratios. What is
decoded is timed without the pass that precedes it, which is ``cached_extend`` and ``fork_extend``.

How much decoding gains depends on what there is to attend to. ``decode_speedup_b16`` is of prompts
of 150 words (about 240 tokens), as a word problem behind a few worked ones has; the same is there
for 20 words, where the layers' products are nearly all of the time, and for 300.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Case, Condition, Row, generate, together
from benchmarks.statistics import paired_ratio
from benchmarks.text import Passages, machine_texts, question_texts

BACKENDS = ("torch_native", "rksc_cpu")
#: Words of prose that make about 1,000 tokens of SmolLM2.
THOUSAND_TOKENS = 620
SHORT = 20

Texts = Callable[[random.Random], Passages]


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _logprobs(answers: Any) -> list[float]:
    """Log-probabilities of the generated tokens, of one answer or of several."""
    answers = answers if isinstance(answers, list) else [answers]
    return [entry[0] for a in answers for entry in a["meta_info"]["output_token_logprobs"]]


def _measured(answers: Any, seconds: float) -> Mapping[str, Any]:
    return {"seconds": seconds, "logprobs": _logprobs(answers)}


def make_cases(texts: Texts) -> list[Case]:
    def cached_extend(url: str, rng: random.Random) -> Mapping[str, Any]:
        """First token of a short suffix behind 1,000 cached tokens."""
        passages = texts(rng)
        prefix = passages.take(THOUSAND_TOKENS)
        generate(url, prefix, 1)
        answer, seconds = _timed(
            lambda: generate(url, f"{prefix} {passages.take(SHORT)}", 1, return_logprob=True)
        )
        if answer["meta_info"]["cached_tokens"] < 800:
            raise harness.BenchmarkError("the prefix was not cached")
        return _measured(answer, seconds)

    def prefill(count: int, words: int) -> Callable[..., Mapping[str, Any]]:
        """First tokens of unrelated prompts that arrive as one batch."""

        def case(url: str, rng: random.Random) -> Mapping[str, Any]:
            passages = texts(rng)
            prompts = [passages.take(words) for _ in range(count)]
            return _measured(*_timed(lambda: generate(url, prompts, 1, return_logprob=True)))

        return case

    def decode(count: int, words: int, shared: int, steps: int) -> Callable[..., Mapping[str, Any]]:
        """``steps`` of decoding behind prompts of which the first ``shared`` words are the same."""

        def case(url: str, rng: random.Random) -> Mapping[str, Any]:
            passages = texts(rng)
            prefix = passages.take(shared) if shared else ""
            prompts = [f"{prefix} {passages.take(words)}" for _ in range(count)]
            if prefix:
                generate(url, prefix, 1)
            generate(url, prompts, 1)
            # The prompts are cached now: all but their last tokens.
            _, first = _timed(lambda: generate(url, prompts, 1, return_logprob=True))
            answers, all_ = _timed(lambda: generate(url, prompts, 1 + steps, return_logprob=True))
            return _measured(answers, all_ - first)

        return case

    def fork_extend(url: str, rng: random.Random) -> Mapping[str, Any]:
        """First tokens of 8 branches behind 1,000 cached tokens."""
        passages = texts(rng)
        prefix = passages.take(THOUSAND_TOKENS)
        generate(url, prefix, 1)
        prompts = [f"{prefix} {passages.take(SHORT)}" for _ in range(8)]
        return _measured(*_timed(lambda: generate(url, prompts, 1, return_logprob=True)))

    def mixed(url: str, rng: random.Random) -> Mapping[str, Any]:
        """Prompts that arrive while others decode."""
        passages = texts(rng)
        long = [passages.take(60) for _ in range(4)]
        late = [passages.take(200) for _ in range(2)]

        def later(text: str) -> Any:
            time.sleep(0.3)
            return generate(url, text, 8, return_logprob=True)

        calls = [partial(generate, url, text, 24, return_logprob=True) for text in long]
        calls += [partial(later, text) for text in late]
        (answers, _), seconds = _timed(lambda: together(calls))
        return _measured(answers, seconds)

    return [
        Case("cached_extend", cached_extend),
        Case("fork_extend", fork_extend),
        Case("decode_b16", decode(16, 150, 0, 24)),
        Case("decode_b16_20_words", decode(16, SHORT, 0, 32)),
        Case("decode_b16_300_words", decode(16, 300, 0, 16)),
        Case("fork_decode", decode(8, SHORT, THOUSAND_TOKENS, 24)),
        Case("decode_b1", decode(1, SHORT, 0, 32)),
        Case("decode_b1_1k", decode(1, THOUSAND_TOKENS, 0, 24)),
        Case("prefill_1k", prefill(1, THOUSAND_TOKENS)),
        Case("prefill_16x", prefill(16, 40)),
        Case("mixed", mixed),
    ]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    stock, ours = BACKENDS
    speedups = {
        workload: paired_ratio(*harness.pairs(rows, workload, "seconds", stock, ours))
        for workload in dict.fromkeys(row["workload"] for row in rows)
    }
    differences = [
        # Behind a tie of the top two tokens the continuations are different texts.
        np.abs(np.subtract(a, b))[: _same(a, b)].max(initial=0.0)
        for workload in speedups
        for a, b in zip(*harness.pairs(rows, workload, "logprobs", stock, ours))
    ]
    return {
        "cached_extend_speedup": speedups["cached_extend"]["ratio"],
        "decode_speedup_b16": speedups["decode_b16"]["ratio"],
        "fork_decode_speedup": speedups["fork_decode"]["ratio"],
        "worst_speedup": min(speedup["ratio"] for speedup in speedups.values()),
        "max_logprob_difference": float(max(differences)),
        "speedups": speedups,
    }


def _same(a: Sequence[float], b: Sequence[float]) -> int:
    return len(a) if len(a) == len(b) else 0


def main() -> None:
    args = harness.parser(__doc__ or "").parse_args()
    source = question_texts(args.questions) if args.questions else machine_texts()

    def texts(rng: random.Random) -> Passages:
        return Passages(source, rng.getrandbits(32))

    flags = ["--rksc-mode", "off", "--max-total-tokens", "32768", "--dtype", "float32"]
    conditions = [
        Condition(backend, [*flags, "--attention-backend", backend]) for backend in BACKENDS
    ]
    repeats = 2 if args.quick else 6
    harness.run("benchmarks.cpu_attention", args, conditions, make_cases(texts), repeats)


if __name__ == "__main__":
    main()
