"""Train the reasoner, a small Llama that solves problems and judges solutions, from scratch.

    python scripts/train_reasoner.py --out DIR [--tokens N] [--minutes M]

Ordinary next-token training on the dialogues of ``rksc_sglang.models.dialogues``, packed into
rows: on what the assistant ought to say, and lightly on what others say. Every
``--attempts-every`` tokens the model's own attempts at training problems are sampled: from then on
it learns to judge those.
A checkpoint in DIR is resumed; DIR/loss.jsonl is the curve and DIR/model the result. Batches are
functions of the seed and the step, so that an interrupted run goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rksc_sglang.models.dialogues import END, NO, START, YES, Turn, make_dialogue, prompt_of
from rksc_sglang.models.manifest import write_manifest
from rksc_sglang.models.problems import DIFFICULTIES, FAMILIES, Problem, check, problems

#: Of each sequence; the second is what long prompts need, a sixteenth of the batches.
ROW_LENGTHS = (512, 2048)
LONG_EVERY = 16
#: Of the dialogues, once there are attempts: about problems that the model has attempted.
KNOWN_SHARE = 0.25
#: In the loss, of what systems and users say: the facts and steps that they repeat teach copying,
#: but most of it cannot be foreseen.
CONTEXT_WEIGHT = 0.1
#: In the loss, of a verdict: one token, which takes more to learn than all of a solution.
VERDICT_WEIGHT = 8.0
#: Prompts sampled in one batch: a GPU takes as long for many.
AT_ONCE = {"cpu": 64, "cuda": 2048}
EOS = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(vocab_size: int, seed: int, dialogues: int = 6000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over training dialogues, digits apart: words of the problems are one token.

    Words bring the space in front of them, and the problems put one before each name: a name is the
    same token wherever it stands, and repeating it is plain copying.
    """
    rng = random.Random(seed)
    stream = itertools.islice(problems("train", seed), dialogues)
    texts = ("".join(map(str, make_dialogue(problem, rng))) for problem in stream)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(
    tokenizer: PreTrainedTokenizerFast, dialogue: Sequence[Turn]
) -> tuple[list[int], list[float]]:
    """Token ids of a dialogue, and the weight of each in the loss."""
    verdicts = verdict_tokens(tokenizer)
    ids: list[int] = []
    weights: list[float] = []
    pieces = [(f"{START}{turn.role}\n", f"{turn.text}{END}", "\n") for turn in dialogue]
    encoded = tokenizer(list(itertools.chain(*pieces)), add_special_tokens=False)["input_ids"]
    for turn, head, body, tail in zip(dialogue, encoded[::3], encoded[1::3], encoded[2::3]):
        ids += head + body + tail
        weight = float(turn.learn) if turn.role == "assistant" else CONTEXT_WEIGHT
        weights += [0.0] * len(head)
        if weight == 1.0:
            weights += [VERDICT_WEIGHT if token in verdicts else 1.0 for token in body]
        else:
            weights += [weight] * len(body)
        weights += [0.0] * len(tail)
    return ids, weights


@functools.cache
def verdict_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """At the start of a text, and behind a word."""
    texts = [space + label for space in ("", " ") for label in (YES, NO)]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return frozenset(tokens[0] for tokens in encoded if len(tokens) == 1)


class Attempts:
    """The model's own attempts at training problems, newest kept."""

    def __init__(self, limit: int = 20000) -> None:
        self.limit = limit
        self.texts: dict[str, tuple[Problem, list[str]]] = {}

    def add(self, problem: Problem, texts: list[str]) -> None:
        self.texts.pop(problem.question, None)
        self.texts[problem.question] = (problem, texts)
        while len(self.texts) > self.limit:
            del self.texts[next(iter(self.texts))]

    def __call__(self, problem: Problem) -> Sequence[str]:
        return self.texts.get(problem.question, (problem, []))[1]


@dataclass
class Batches(Dataset[tuple[Tensor, Tensor]]):
    """By step: ids, [rows, length] int64, and their weights, float32."""

    tokenizer: PreTrainedTokenizerFast
    attempts: Attempts
    seed: int
    tokens: int

    def __post_init__(self) -> None:
        self.known = [problem for problem, _ in self.attempts.texts.values()]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self.seed}/{step}")
        length = ROW_LENGTHS[step % LONG_EVERY == LONG_EVERY - 1]
        rows, row_weights = [], []
        for _ in range(max(self.tokens // length, 1)):
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) < length:
                dialogue = make_dialogue(self.draw(rng), rng, self.attempts)
                more, more_weights = encode(self.tokenizer, dialogue)
                ids += more
                weights += more_weights
            rows.append(ids[:length])
            row_weights.append(weights[:length])
        return torch.tensor(rows), torch.tensor(row_weights)

    def draw(self, rng: random.Random) -> Problem:
        """One that has been attempted, or a new one."""
        if self.known and rng.random() < KNOWN_SHARE:
            return rng.choice(self.known)
        family, difficulty = rng.choice(list(FAMILIES)), rng.choice(DIFFICULTIES)
        return next(problems("train", rng.getrandbits(40), [family], [difficulty]))


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of the next tokens, by weight; that of solutions, and that of verdicts."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    shares = weights[:, 1:].flatten()

    def mean(weight: float) -> Tensor:
        chosen = (shares == weight).float()
        return (losses.detach() * chosen).sum() / chosen.sum().clamp(min=1.0)

    return (losses * shares).sum() / shares.sum(), mean(1.0), mean(VERDICT_WEIGHT)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    temperature: float,
    max_tokens: int = 140,
) -> list[str]:
    """One answer to each prompt; greedy at temperature 0."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    choose: dict[str, Any] = {"do_sample": False}
    if temperature:
        choose = {"do_sample": True, "temperature": temperature, "top_k": 0}
    outputs = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **choose,
    )
    new = outputs[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def ask(problem: Problem) -> str:
    return prompt_of([Turn("user", problem.question)])


def gather_attempts(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    attempts: Attempts,
    seed: int,
    count: int,
    each: int = 4,
) -> float:
    """Sample ``each`` solutions of ``count`` training problems; returns the share that is right."""
    model.eval()
    right = total = 0
    drawn = sorted(itertools.islice(problems("train", seed), count), key=lambda p: len(p.question))
    together = AT_ONCE[model.device.type] // each
    for start in range(0, count, together):
        some = drawn[start : start + together]
        prompts = [ask(problem) for problem in some for _ in range(each)]
        texts = sample(model, tokenizer, prompts, temperature=0.9)
        for i, problem in enumerate(some):
            own = texts[i * each : (i + 1) * each]
            attempts.add(problem, own)
            right += sum(check(problem, text) for text in own)
            total += each
    model.train()
    return right / max(total, 1)


def greedy_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, float]:
    """By family, on problems of the calibration split."""
    model.eval()
    right: dict[str, list[bool]] = {}
    drawn = list(itertools.islice(problems("calibration", 0), count))
    together = AT_ONCE[model.device.type]
    for start in range(0, count, together):
        some = drawn[start : start + together]
        for problem, text in zip(
            some, sample(model, tokenizer, [ask(p) for p in some], temperature=0)
        ):
            right.setdefault(problem.family, []).append(check(problem, text))
    model.train()
    return {family: sum(values) / len(values) for family, values in right.items()}


def learning_rate(done: float) -> float:
    """Share of the full rate at a share of the run: warm-up, constant, then down to nothing."""
    return min(1.0, done / 0.01 + 0.01, max((1.0 - done) / 0.3, 0.0))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices (Muon, https://kellerjordan.github.io/posts/muon).

    As ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, but for all matrices of a shape
    at once, and in bfloat16 only where it is asked for: most CPUs emulate it, and a step takes 8 s
    there and not 0.2.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, some in shapes.items():
                updates = []
                for parameter in some:
                    momentum = self.state[parameter].setdefault(
                        "momentum", torch.zeros_like(parameter)
                    )
                    momentum.lerp_(parameter.grad, 0.05)
                    updates.append(parameter.grad.lerp(momentum, 0.95))
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                matrices = torch.stack(updates).to(self.dtype)
                for parameter, update in zip(some, orthogonalise(matrices)):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """About ``U V^T`` of each of [n, rows, columns], by five steps of Newton and Schulz."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        product = x @ x.mT
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x.mT if tall else x


def make_optimizers(
    model: nn.Module, rate: float, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else rest).append(parameter)
    return [
        Muon(matrices, lr=rate, weight_decay=0.05, dtype=dtype),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--out", type=Path, required=True, help="directory of checkpoint, curve and model")
    add(
        "--init",
        type=Path,
        metavar="MODEL",
        help="begin with this model, of as many layers or fewer",
    )
    add("--tokens", type=float, default=100e6, help="to train on in all")
    add("--minutes", type=float, help="stop after so long, to be resumed")
    add("--batch-tokens", type=int, default=2048, help="of one step")
    add("--layers", type=int, default=12)
    add("--width", type=int, default=192, help="a multiple of 32, the width of a head")
    add("--vocab-size", type=int, default=1280)
    add("--learning-rate", type=float, default=4e-3)
    add("--attempts-every", type=float, default=4e6, help="tokens between samplings of attempts")
    add("--attempts", type=int, default=600, help="problems sampled each time")
    add("--bfloat16", action="store_true", help="compute in it: faster where the processor has it")
    add("--compile", action="store_true", help="half as fast again, after a minute or two")
    add("--workers", type=int, default=0, help="processes beside this one that make the batches")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return result


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        num_key_value_heads=args.width // 32,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).to(args.device)


@torch.no_grad()
def grow(trained: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    """Copy a model into one of as many layers or more, whose last ones do nothing yet."""
    model.load_state_dict(trained.state_dict(), strict=False)
    for layer in model.model.layers[len(trained.model.layers) :]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    folder = args.out / "model"
    if checkpoint.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    elif args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        tokenizer.save_pretrained(folder)
    else:
        tokenizer = train_tokenizer(args.vocab_size, args.seed)
        tokenizer.save_pretrained(folder)
    model = make_model(args, tokenizer)
    if args.init and not checkpoint.exists():
        grow(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32), model)
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    optimizers = make_optimizers(model, args.learning_rate, dtype)
    if args.compile:
        for layer in model.model.layers:  # all alike: compiled once for each length of rows
            layer.compile(dynamic=False)
    attempts, step, sampled = Attempts(), 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        attempts.texts, step, sampled = state["attempts"], state["step"], state["sampled"]
    total = int(args.tokens // args.batch_tokens)
    began = saved_at = time.monotonic()
    curve = (args.out / "loss.jsonl").open("a")

    def write_down(**values: Any) -> None:
        print(json.dumps({"tokens": step * args.batch_tokens, **values}), file=curve, flush=True)

    def checkpoint_now() -> None:
        save(
            checkpoint,
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "attempts": attempts.texts,
                "step": step,
                "sampled": sampled,
            },
        )

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        """Until attempts are sampled again."""
        stop = int(-(-(sampled + args.attempts_every) // args.batch_tokens))
        return DataLoader(
            Batches(tokenizer, attempts, args.seed, args.batch_tokens),
            sampler=range(step, min(stop, total)),
            batch_size=None,
            num_workers=args.workers,
        )

    def late() -> bool:
        return bool(args.minutes) and time.monotonic() - began > 60 * args.minutes

    model.train()
    losses: list[tuple[float, float]] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=total, completed=step)
        while step < total and not (losses and late()):
            if step * args.batch_tokens - sampled >= args.attempts_every:
                sampled = step * args.batch_tokens
                right = gather_attempts(model, tokenizer, attempts, 10**6 + step, args.attempts)
                accuracy = greedy_accuracy(model, tokenizer, min(150, 5 * args.attempts))
                write_down(right=right, greedy=accuracy)
                model.save_pretrained(folder)
            for ids, weights in batches():
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = args.learning_rate * learning_rate(step / total)
                with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
                    loss, *parts = loss_of(model, ids.to(args.device), weights.to(args.device))
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                step += 1
                losses.append(tuple(torch.stack(parts).tolist()))
                rate = args.batch_tokens * len(losses) / (time.monotonic() - began)
                description = f"loss {losses[-1][0]:.3f}, {rate:.0f} tokens/s"
                progress.update(bar, completed=step, description=description)
                if step % 20 == 0:
                    loss, verdicts = (statistics.fmean(x) for x in zip(*losses[-20:]))
                    write_down(loss=loss, verdicts=verdicts, rate=round(rate))
                if time.monotonic() - saved_at > 300:
                    checkpoint_now()
                    saved_at = time.monotonic()
                if late():
                    break
    checkpoint_now()
    model.half().save_pretrained(folder)  # half the size; it is computed in float32 all the same
    write_manifest(folder, {"trained_tokens": step * args.batch_tokens, "seed": args.seed})


def main() -> None:
    args = parser().parse_args()
    if args.width % 32:
        sys.exit("--width: must be a multiple of 32")
    run(args)


if __name__ == "__main__":
    main()
