"""``python -m rksc_sglang.asks.calibrate``: find tau and margin for a model, and write its profile.

Starts a server that splices without a gate, and compares splices with full recompute: persona
against persona in front of the same text, the text in another order, one word of it changed. The
profile's tau is the smallest at which the mean KL divergence of the first tokens stays below the
limit with 95 % confidence, tested from the most similar pairs downwards (fixed-sequence testing, as
in Learn-then-Test, arXiv 2110.01052). Its margin is what 19 of 20 of them move the lead of the
first token by, or less.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from rich.console import Console
from rich.progress import track

from rksc_sglang.asks.profile import DEFAULT_TAU, SpliceProfile, fingerprint
from rksc_sglang.models import ensure_model
from rksc_sglang.server_process import ServerFailedError, ServerProcess

MIN_PAIRS = 20
#: Of the accepted splices, those that move a lead by less than the margin.
MARGIN_QUANTILE = 0.95
RESAMPLES = 4000

PERSONAS = (
    "You are a helpful assistant.",
    "You are a strict examiner who answers from the text only.",
    "You review documentation before a release. Say what a reader could misunderstand.",
    "You explain things to beginners, in short sentences and without technical terms.",
    "You are the second of two reviewers. The first looked at the style; you look at the content.",
    "Answer in one sentence.",
)
QUESTIONS = (
    "What is the text about?",
    "Who is this text written for?",
    "What is the most important thing to know?",
    "Name one condition that the text mentions.",
)


class Prompts(NamedTuple):
    donor: str
    prompt: str


@dataclass(frozen=True)
class Pair:
    """One splice against full recompute."""

    similarity: float
    kl: float
    lead_change: float
    same_first_token: bool
    spliced_tokens: int
    prompt_tokens: int


def own_texts() -> list[str]:
    """Prose that every Python has: the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    blocks = (re.sub(r"\s+", " ", b) for t in topics.values() for b in t.split("\n\n"))
    return [block.strip() for block in blocks if len(block.split()) >= 40]


def make_prompts(texts: Sequence[str], rng: random.Random) -> Iterator[Prompts]:
    """Without end: pairs of a donor and a prompt that repeats its text behind something else."""

    def chat(system: str, text: str, question: str) -> str:
        return (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{text}\n\n{question}"
            "<|im_end|>\n<|im_start|>assistant\n"
        )

    while True:
        one, two = rng.sample(PERSONAS, 2)
        texts_ = rng.sample(texts, 3)
        first, second, question = *texts_[:2], rng.choice(QUESTIONS)
        text = f"{first}\n\n{second}"
        yield Prompts(chat(one, text, question), chat(two, text, question))
        yield Prompts(
            chat(one, text, question), chat(one, f"{second}\n\n{texts_[2]}\n\n{first}", question)
        )
        words = text.split(" ")
        words[rng.randrange(len(words) // 2)] = rng.choice(["seven", "never", "Berlin", "less"])
        yield Prompts(chat(one, text, question), chat(one, " ".join(words), question))


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url
        self.status = requests.get(f"{url}/rksc/status", timeout=60).json()
        self._salt = 0

    def new_salt(self) -> str:
        self._salt += 1
        return f"calibration-{self._salt}"

    def first_token(self, prompt: str, share: str, salt: str, top: int) -> dict[str, Any]:
        params = {
            "max_new_tokens": 1,
            "temperature": 0,
            "custom_params": {"rksc": {"share": share, "tau": 0}},
        }
        body: dict[str, Any] = {"text": prompt, "sampling_params": params, "cache_salt": salt}
        if top:
            body |= {"return_logprob": True, "top_logprobs_num": top}
        answer = requests.post(f"{self.url}/generate", json=body, timeout=600)
        answer.raise_for_status()
        return answer.json()["meta_info"]

    def compare(self, prompts: Prompts, vocab_size: int) -> Pair | None:
        """None where nothing was spliced."""
        salt = self.new_salt()
        self.first_token(prompts.donor, "exact", salt, 0)
        spliced = self.first_token(prompts.prompt, "similar", salt, vocab_size)
        used = spliced["rksc"]
        if not used["spliced_tokens"] or used["similarity"] is None:
            return None
        exact = self.first_token(prompts.prompt, "exact", self.new_salt(), vocab_size)
        p, q = (_logprobs(meta, vocab_size) for meta in (exact, spliced))
        return Pair(
            similarity=used["similarity"],
            kl=float(np.sum(np.exp(p) * (p - q))),
            lead_change=_lead_change(p, q),
            same_first_token=bool(p.argmax() == q.argmax()),
            spliced_tokens=used["spliced_tokens"],
            prompt_tokens=spliced["prompt_tokens"],
        )


def _logprobs(meta: dict[str, Any], vocab_size: int) -> np.ndarray:
    row = np.full(vocab_size, -np.inf)
    for logprob, token, _ in meta["output_top_logprobs"][0]:
        row[token] = logprob
    return row


def _lead_change(exact: np.ndarray, spliced: np.ndarray) -> float:
    """Nats by which splicing moved the lead of the token that it put first over its second."""
    second, first = spliced.argsort()[-2:]
    return float(abs(spliced[first] - spliced[second] - exact[first] + exact[second]))


def upper_mean(values: np.ndarray, seed: int = 0) -> float:
    """Upper end of a one-sided 95 % bootstrap interval for the mean."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return float(np.quantile(values[picks].mean(1), 0.95))


def choose_tau(pairs: Sequence[Pair], limit_kl: float) -> float | None:
    """The smallest tau whose splices are good enough, None where not even the closest are.

    Candidates are the measured similarities. The test stops at the first that fails, so that
    trying many does not raise the chance of an error.
    """
    ordered = sorted(pairs, key=lambda pair: -pair.similarity)
    kls = np.array([pair.kl for pair in ordered])
    tau = None
    for count in range(MIN_PAIRS, len(ordered) + 1):
        if upper_mean(kls[:count]) > limit_kl:
            break
        tau = ordered[count - 1].similarity
    return tau


def rank_auc(pairs: Sequence[Pair]) -> float:
    """How well the similarity tells the better half of the splices from the worse; 0.5: not."""
    middle = np.median([pair.kl for pair in pairs])
    good = [pair.similarity for pair in pairs if pair.kl <= middle]
    bad = [pair.similarity for pair in pairs if pair.kl > middle]
    return float(np.mean([(g > b) + 0.5 * (g == b) for g in good for b in bad]))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m rksc_sglang.asks.calibrate",
        description="Measure splices of a model against full recompute, choose the similarity "
        "threshold tau and the margin of first tokens, and write a profile for --rksc-profile. "
        "Takes a few minutes.",
    )
    result.add_argument("--output", type=Path, required=True, help="the profile, a JSON file")
    result.add_argument("--model-path", help="checkpoint directory (default: the embedded model)")
    result.add_argument("--pairs", type=int, default=90, help="splices to measure (default: 90)")
    result.add_argument(
        "--limit-kl",
        type=float,
        default=0.007,
        help="nats that the mean KL divergence of first tokens shall stay below (default: 0.007)",
    )
    result.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="JSON lines whose 'text' or 'question' is used; default: Python's own documentation",
    )
    result.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    result.add_argument(
        "server_flags", nargs="*", metavar="-- FLAG", help="further flags for the server"
    )
    return result


def read_texts(path: Path | None) -> list[str]:
    if path is None:
        return own_texts()
    items = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [item.get("text") or item["question"] for item in items]


def measure(args: argparse.Namespace) -> tuple[list[Pair], dict[str, int]]:
    """The pairs, and the settings that they were measured with."""
    flags = ["--rksc-mode", "balanced", "--rksc-guard-share", "0", *args.server_flags]
    if args.model_path:
        flags += ["--model-path", args.model_path]
    prompts = make_prompts(read_texts(args.texts), random.Random(args.seed))
    pairs: list[Pair] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(flags, log=Path(folder) / "server.log") as process,
    ):
        process.wait_ready()
        server = _Server(process.url)
        splice = server.status["ranks"][0]["splice"]
        if splice is None:
            reason = server.status["ranks"][0]["features"]["splice"]["reason"]
            raise ServerFailedError(f"this server does not splice: {reason}")
        console = Console(stderr=True)
        for _ in track(range(args.pairs), "comparing", console=console):
            pair = server.compare(next(prompts), splice["vocab_size"])
            if pair is not None:
                pairs.append(pair)
    return pairs, {name: splice[name] for name in ("head", "tail", "min_tokens")}


def main() -> None:
    args = parser().parse_args()
    try:
        pairs, settings = measure(args)
    except ServerFailedError as error:
        sys.exit(f"rksc: error: {error}")
    tau = choose_tau(pairs, args.limit_kl)
    if tau is None:
        sys.exit(
            f"rksc: error: the closest {MIN_PAIRS} of {len(pairs)} pairs are not below "
            f"{args.limit_kl} nats for sure: measure more with --pairs, or allow more with "
            f"--limit-kl. Without a profile tau is {DEFAULT_TAU}"
        )
    model = Path(args.model_path) if args.model_path else ensure_model("smollm2")
    taken = [pair for pair in pairs if pair.similarity >= tau]
    margin = float(np.quantile([pair.lead_change for pair in taken], MARGIN_QUANTILE))
    evidence = {
        "pairs": len(pairs),
        "accepted": len(taken),
        "mean_kl_accepted": float(np.mean([pair.kl for pair in taken])),
        "upper_mean_kl_accepted": upper_mean(np.array([pair.kl for pair in taken])),
        "same_first_token_accepted": float(np.mean([pair.same_first_token for pair in taken])),
        "auc": rank_auc(pairs),
        "rows": [asdict(pair) for pair in pairs],
    }
    SpliceProfile(fingerprint(model), tau, margin, args.limit_kl, settings, evidence).save(
        args.output
    )
    Console().print_json(
        json.dumps(
            {"tau": tau, "margin": margin, **{k: v for k, v in evidence.items() if k != "rows"}}
        )
    )


if __name__ == "__main__":
    main()
