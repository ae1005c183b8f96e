"""Write docs/results.md from the results that are committed in benchmarks/results.

    python scripts/results_page.py

Nothing on the page is written by hand but the sentences below: each figure comes from a JSON's
``summary``, which ``python -m benchmarks.summarise FILE`` computes from its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"


class Section(NamedTuple):
    """One result.

    Attributes:
        name: of its JSON, without the ending.
        text: what was measured, and what to make of it.
        figures: keys of the summary, "a/b" for a key of a mapping in it, each with what was wanted
            of it; empty where nothing was.
        tables: keys of mappings in the summary that are a table each, with what is in it.
    """

    name: str
    title: str
    text: str
    figures: Mapping[str, str]
    tables: Mapping[str, str] = {}


SPLICE_BARS = {
    "ttft_speedup_1k": "at least 7",
    "ttft_speedup_1k_new_context": "at least 5",
    "fanout8_speedup": "at least 10",
    "fanout8_cold_speedup": "at least 4",
    "coverage": "at least 0.6",
    "top1_agreement": "at least 0.99",
    "kl_mean": "at most 0.01",
    "adversarial_agreement": "at least 0.99",
    "judge_consistency": "at least 0.99",
    "overhead_f": "at least 0.98",
    "gate_auc": "at least 0.7",
}

SECTIONS = (
    Section(
        "throughput",
        "Whole programs",
        "Six reasoning programs on SmolLM2, one and four problems at a time, problems a second: "
        "mode balanced against stock SGLang without a radix cache (`no_kv`), with the same "
        "program (`sglang`), and with its best flags and the best form of the program that it "
        "allows (`sglang_best`). All generate the same number of tokens, and are measured in "
        "turns of a second on servers that are started anew: three times for the ratios against "
        "`sglang` and `sglang_best`, twice for the others.\n\n"
        "By what a pass and a token cost there, prefill is 10 to 44 % of the time under "
        "`sglang_best`, 9 to 58 % under `sglang`, and decoding, which all have in common, is the "
        "rest: were all prefill free, the ratio against the first would be 1.37, against the "
        "second 1.44.\n\n"
        "RKSC does not pay where prompts are short and what they have in common is cached anyway, "
        "as in large votes; nothing is lost there by leaving it off. It pays the more, the longer "
        "the text is that several contexts have in common.",
        {
            "speedup_vs_no_kv": "at least 3",
            "speedup_vs_sglang": "at least 1.66",
            "speedup_vs_sglang_best": "low end above 1",
            "worst_program_ratio": "at least 0.98",
            "paper_setting_vs_no_kv": "at least 3",
        },
        {
            "models/smollm2/programs": "By program, against each.",
            "models/smollm2/growth": "Against `sglang_best`, by samples of a vote and by words of "
            "a document.",
            "models/smollm2/without": "What was gained by what: RKSC over RKSC without one of its "
            "mechanisms, four problems at a time, one round of four problems each on one start of "
            "servers, so that some percent are a server's luck.",
            "models/smollm2/open_loop": "Seconds a problem, of all six programs, where problems "
            "arrive at 0.7 of the rate that `sglang_best` reaches four at a time, on one start of "
            "servers (debate on two, of different days). Documents take half as long as under "
            "`sglang_best` in the median (on an earlier start 26 seconds in the place of 34), the "
            "others are within 7 % of it, as equal servers are of each other.",
            "models/smollm2/paper": "The paper's setting: 8 branches, 1,024 tokens that they "
            "share, 8 or 32 new ones, batched verdicts; the paper had 3.01, 1.81 and 1.66 there. "
            "Verdicts that RKSC skips are not generated.",
        },
    ),
    Section(
        "throughput_accuracy",
        "Accuracy of whole programs",
        "Six programs on 1,008 problems each of the reasoner (best-of-N and tree of thought on "
        "2,016, self-consistency on 3,024), mode balanced with all that is calibrated for it "
        "against SGLang at its best: points of accuracy gained, in the mean over programs. In "
        "self-consistency nothing is approximate. SmolLM2 solves next to none of the problems at "
        "the lengths that it is given.",
        {"accuracy_delta": "low end at least -1.5, high end at least 0"},
        {"models/reasoner/accuracy": "Share of right answers, by program."},
    ),
    Section(
        "cpu_attention",
        "The ground: attention on a CPU",
        "Our attention backend against SGLang's `torch_native`, the same server work. All other "
        "results, the baselines' too, stand on ours.",
        {
            "cached_extend_speedup": "at least 3",
            "decode_speedup_b16": "at least 1.5",
            "fork_decode_speedup": "at least 2",
            "worst_speedup": "at least 0.98",
            "max_logprob_difference": "at most 1e-4",
        },
    ),
    Section(
        "overhead",
        "What RKSC costs where there is nothing to gain",
        "Mode exact against stock SGLang on work with nothing in common, on SmolLM2 and on a "
        "random model of two layers, where scheduler and cache are what is timed.",
        {
            "throughput_ratio": "at least 0.98",
            "ttft_ratio": "at most 1.02",
            "worst_throughput_ratio": "at least 0.96",
            "tiny_throughput_ratio": "at least 0.95",
        },
    ),
    Section(
        "splice",
        "Splicing: the same text behind another context",
        "Mode balanced on SmolLM2, against full recompute on the same server, on a machine where a "
        "pass takes as long as 126 tokens: short runs do not pay there, and are left alone. 6 of "
        "12 timed requests each were near ties, and computed again; without them the first two "
        "figures are 6.1 and 5.4. What splicing changes in which kind of prompt is in "
        "[sharing.md](sharing.md#splicing).",
        SPLICE_BARS,
    ),
    Section(
        "splice_two_passes",
        "Splicing before head and tail shared a pass",
        "The run before, two passes a splice and without the shift, on a machine where a pass "
        "takes as long as 57 tokens.",
        SPLICE_BARS,
    ),
    Section(
        "verify",
        "Verification: gates and early exit",
        "The reasoner verifies 8 branches of each of 1,000 hard problems. Thresholds come from "
        "other problems, for the stated risk that a problem loses its right answer; decisions of "
        "all conditions are on the same samples, times are live. More branches are the same tokens "
        "spent on further samples and a majority vote. The picture has all conditions, the paper's "
        "constants among them. Exits and skips find the same groups. More in "
        "[verification.md](verification.md).",
        {
            "exit_speedup": "at least 1.26",
            "exit_speedup_wall": "",
            "verdict_agreement": "at least 0.99",
            "mean_exit_layer": "",
            "num_layers": "",
            "skip_rate": "at least 0.4",
            "skip_rate_split": "at least 0.2",
            "cgee_error_rate": "at most 0.0037",
            "cgee_error_upper95": "at most 0.01",
            "cgee_error_rate_split": "at most 0.01",
            "mended": "",
            "accuracy_vs_more_branches": "",
            "phase_speedup_all": "",
            "layers_saved": "",
            "tokens_saved": "",
            "calibration_held": "1",
        },
    ),
    Section(
        "kernels",
        "The tensor code on a GPU",
        "Our own tensor code alone, on a Llama-8B's shapes; its tests pass there too. A splice is "
        "one launch for all layers and comes close to the time in which the memory can be read and "
        "written (`floor_share`); `least_speedup` is over the same in torch's own operations. A "
        "check of layer exit took about a millisecond there, most of it the host's waiting: as "
        "much as projecting the whole vocabulary would. It waits less since: not measured.",
        {
            "bandwidth_gb_s": "",
            "floor_share/splice 8b bfloat16": "",
            "floor_share/splice 8b float32": "",
            "least_speedup/splice 8b bfloat16": "",
            "least_speedup/splice 8b float32": "",
            "least_speedup/exit projection": "",
            "least_speedup/exit check": "",
            "floor_share/attention mass": "",
        },
    ),
    Section(
        "eviction",
        "Eviction",
        "Recorded programs and a public trace, replayed on SGLang's real tree and allocator: how "
        "much of the distance from LRU to a policy that knows the future is closed, in prompt "
        "tokens that are computed again. More in [eviction.md](eviction.md).",
        {
            "gap_closed": "at least 0.5",
            "gap_closed_by_best_stock": "less than ours",
            "gap_closed_by_lru_freeing": "less than ours",
            "worst_regret": "at most 1",
            "evict_us_per_token": "",
        },
    ),
    Section(
        "eviction_server",
        "Eviction on a live server",
        "The same programs on servers with a small pool that differ in nothing but the policy.",
        {"server_speedup_vs_best_stock": "", "mass_overhead": "at most 0.01"},
    ),
    Section(
        "merge",
        "Merging branches that thought the same",
        "Recorded branches of the reasoner's first weights (3.8 million parameters), replayed with "
        "merging and without. At the risk of 5 % that was asked for, the calibrated threshold "
        "merges next to nothing, so none is shipped. "
        "What bolder merging saves and costs is in the picture and in "
        "[sharing.md](sharing.md#what-merging-is-worth). The speedup is of self-consistency on a "
        "live server where equal results are merged.",
        {
            "tokens_saved": "0.3",
            "accuracy_delta": "low end at least -1.5",
            "vs_fewer_branches": "above 0",
            "majority_changed_rate": "",
            "kv_peak_ratio": "",
            "speedup": "",
        },
    ),
    Section(
        "reasoner",
        "The reasoner",
        "Our small model on hard problems that it has not seen, its verdicts within problems.",
        {
            "greedy_accuracy": "0.4 to 0.9",
            "majority8_gain": "at least 0.03",
            "verdict_auc": "at least 0.75",
            "best_of_8_gain": "above 0",
            "yes_share": "at least 0.2",
            "no_share": "at least 0.2",
            "fact_sheet_accuracy": "at least 0.4",
            "tokens_per_s": "at least 400",
            "calibration_error": "",
        },
    ),
)


def figure(value: Any) -> str:
    """A number, or a mapping of one with its interval, as text."""
    if not isinstance(value, Mapping):
        return number(value)
    center = next(value[name] for name in ("ratio", "value", "mean") if name in value)
    of = f" (`{value['policy']}`)" if "policy" in value else ""
    return f"{number(center)} [{number(value['low'])}, {number(value['high'])}]{of}"


def table(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Rows by name; of a mapping of mappings, whose keys are columns, by the names in these."""
    nested = all(isinstance(one, Mapping) and "low" not in one for one in values.values())
    columns = values if nested else {title: values}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    yield f"| | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for name in names:
        cells = (figure(column[name]) if name in column else "" for column in columns.values())
        yield f"| {name} | {' | '.join(cells)} |"


def number(value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, float) and 1 <= abs(value) < 10:
        return f"{value:.2f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def found(result: Mapping[str, Any], key: str) -> Any:
    return reduce(lambda at, name: at.get(name), key.split("/"), result["summary"])


def machines(result: Mapping[str, Any]) -> str:
    """What a result was taken on; its parts by name where they were on several machines."""
    parts: dict[str, set[str]] = {}
    for run in result["config"].get("runs", []):
        where = machine(run.get("machine", result["machine"]))
        parts.setdefault(where, set()).update(run.get("parts") or [run["part"]])
    if len(parts) < 2:
        return machine(result["machine"])
    if len(set.union(*parts.values())) < 2:
        return " and ".join(parts)
    return "; ".join(f"{', '.join(sorted(names))} on {where}" for where, names in parts.items())


def machine(facts: Mapping[str, Any]) -> str:
    return facts.get("device") or f"{facts['processor']}, {facts['cores']} cores"


def lines() -> Iterator[str]:
    yield "# Results\n"
    yield (
        "Made by `python scripts/results_page.py` from the JSON files in `benchmarks/results/`, "
        "which hold every measurement, the machine and the versions. Wanted is what was set before "
        "anything was measured; what is not reached stays in the table.\n"
    )
    for section in SECTIONS:
        path = RESULTS / f"{section.name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        kind = "a quick run" if result["config"]["quick"] else "a full run"
        yield f"## {section.title}\n"
        yield f"{section.text}\n"
        yield f"`python -m {result['benchmark']}`: {kind}, {machines(result)}.\n"
        yield "| figure | measured | wanted |\n|---|---|---|"
        for name, wanted in section.figures.items():
            yield f"| `{name}` | {figure(found(result, name))} | {wanted} |"
        yield ""
        for name, caption in section.tables.items():
            yield f"{caption}\n"
            yield from table(name.split("/")[-1], found(result, name))
            yield ""
        if path.with_suffix(".png").exists():
            yield f"![{section.title}](../benchmarks/results/{section.name}.png)\n"


def page() -> str:
    return "\n".join(lines()).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
