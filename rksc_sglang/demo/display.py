"""What the demo prints: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from rksc_sglang.demo.program import Outcome
from rksc_sglang.demo.questions import Question

#: Column, width, alignment. The first one gives way on a narrow terminal.
_COLUMNS = (
    ("question", 30, "<"),
    ("answer", 14, "<"),
    ("votes", 5, ">"),
    ("verdict", 7, ">"),
    ("shared", 6, ">"),
    ("computed", 8, ">"),
    ("seconds", 7, ">"),
    ("", 5, "<"),
)
_NOTES = """\
Shared and computed are prompt tokens: of the prefix of the branches, which is computed once a \
question, of the branches, and of the verifications. Generated are the tokens of the answers.
The verdict is the branch that the model prefers when asked about each, and how sure it is. The \
votes choose the answer, and verdicts only break ties: neither model is a verifier. "By verdict" \
are the questions that would be answered rightly if the verdict chose."""


@dataclass(frozen=True)
class Pass:
    """All questions, answered on one server."""

    name: str
    model: str
    outcomes: Sequence[Outcome]
    seconds: float

    @property
    def right(self) -> int:
        return sum(outcome.right for outcome in self.outcomes)

    @property
    def verdict_right(self) -> int:
        return sum(outcome.verdict_right for outcome in self.outcomes)

    @property
    def shared(self) -> int:
        return sum(outcome.shared for outcome in self.outcomes)

    @property
    def computed(self) -> int:
        return sum(outcome.computed for outcome in self.outcomes)

    @property
    def generated(self) -> int:
        return sum(outcome.generated for outcome in self.outcomes)


@contextlib.contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """A spinner around something slow; one line where there is no terminal."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        _print_line(console, f"{what} ...")
        yield


@contextlib.contextmanager
def outcome_table(
    console: Console, title: str, questions: Sequence[Question]
) -> Iterator[Callable[[int, Outcome], None]]:
    """Show the questions; yields a function that shows what became of one of them."""
    outcomes: dict[int, Outcome] = {}

    def table() -> Table:
        result = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        rest = sum(width + 1 for _, width, _ in _COLUMNS[1:])
        for column, (name, width, align) in enumerate(_COLUMNS):
            result.add_column(
                name,
                justify="right" if align == ">" else "left",
                no_wrap=True,
                width=width if column else max(8, min(width, console.width - rest - 1)),
            )
        for number, question in enumerate(questions):
            result.add_row(*map(escape, _cells(question, outcomes.get(number))))
        return result

    if console.is_terminal:
        with Live(table(), console=console, refresh_per_second=4) as live:

            def show(number: int, outcome: Outcome) -> None:
                outcomes[number] = outcome
                live.update(table())

            yield show
    else:
        _print_line(console, title)
        _print_line(console, _plain([name for name, _, _ in _COLUMNS]))
        yield lambda number, outcome: _print_line(
            console, _plain(_cells(questions[number], outcome))
        )


def print_summary(console: Console, passes: Sequence[Pass]) -> None:
    """The passes side by side, and what SmolLM2's second one cost in terms of its first."""
    table = Table(title="\nSummary", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("", "right", "by verdict", "shared", "computed", "generated", "seconds"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for run in passes:
        asked = len(run.outcomes)
        table.add_row(
            run.name,
            f"{run.right}/{asked} = {run.right / asked:.0%}",
            f"{run.verdict_right}/{asked}",
            f"{run.shared} = {run.shared / (run.shared + run.computed):.0%}",
            str(run.computed),
            str(run.generated),
            f"{run.seconds:.1f}",
        )
    console.print(table)
    for first, run in pairwise(passes):
        if first.model != run.model:
            continue
        console.print(
            "With the radix cache off, the same work computed "
            f"{run.computed / first.computed:.1f} times the prompt tokens and took "
            f"{run.seconds / first.seconds:.1f} times the seconds. This is not SGLang's default: "
            "SGLang shares equal prefixes by itself. It shows what that sharing is worth."
        )
    console.print(_NOTES)


def _cells(question: Question, outcome: Outcome | None) -> list[str]:
    texts = [question.text, *[""] * (len(_COLUMNS) - 1)]
    if outcome is not None:
        winner = outcome.verdict.winner
        score = None if winner is None else outcome.verdict.scores[winner]
        texts[1:] = [
            outcome.answer or "-",
            f"{outcome.votes}/{outcome.branches}",
            f"#{winner} {score:.2f}" if score is not None else "none",
            str(outcome.shared),
            str(outcome.computed),
            f"{outcome.seconds:.1f}",
            "right" if outcome.right else "wrong",
        ]
    return [_shorten(text, width) for text, (_, width, _) in zip(texts, _COLUMNS)]


def _plain(cells: Sequence[str]) -> str:
    pairs = zip(cells, _COLUMNS)
    return "  ".join(f"{cell:{align}{width}}" for cell, (_, width, align) in pairs).rstrip()


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _print_line(console: Console, text: str) -> None:
    """One line as it is: neither markup nor wrapping, and at once, also into a pipe."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()
