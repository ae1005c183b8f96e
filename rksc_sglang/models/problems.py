"""Problems with worked steps and checkable answers, for training and judging the reasoner.

Four families: arithmetic chains and counting legs come from ``reasoning-gym``; ordering people and
looking up facts are made here. Difficulty goes from 1 to 5.
A problem's split is a function of its text, so that no problem is in two of them.

    >>> problem = next(problems("test", seed=0, families=("chain",)))
    >>> check(problem, f"Let me think.\\n{problem.solution}")
    True
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

Split = Literal["train", "calibration", "test"]

DIFFICULTIES = (1, 2, 3, 4, 5)
#: Those that the reasoner does not all solve: votes and verdicts have something to decide.
HARD = (4, 5)
NAMES = (
    "Ada Ali Amy Ana Ben Bo Cai Cara Dan Dora Eli Emma Eva Finn Gus Ian Ida Ivy Jack Jane Jon Kai "
    "Kim Lea Leo Lily Liv Lou Max Mara Mia Ned Nina Noah Olga Otis Pam Paul Pia Raj Ron Rosa Sam "
    "Sara Sid Tara Ted Tim Tom Una Uma Vera Vic Will Yan Zoe"
).split()
CITIES = "Oslo Rome Paris Lima Cairo Delhi Tokyo Bern Riga Quito Accra Dakar Turin Kyoto".split()
JOBS = "baker nurse pilot farmer judge cook singer tailor guard miner painter clerk".split()
PETS = "goat cat dog horse parrot rabbit turtle snake hamster duck pony fish".split()
#: The one who has more of it, and who has most and least of it.
COMPARISONS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("heavier", "heaviest", "lightest"),
    ("richer", "richest", "poorest"),
)


class Work(NamedTuple):
    """Steps, one a line, and the answer that they lead to."""

    steps: tuple[str, ...]
    answer: str

    @property
    def text(self) -> str:
        return "\n".join([*self.steps, f"Answer: {self.answer}"])


@dataclass(frozen=True)
class Problem:
    """A question, how it is worked out, and its answer.

    Attributes:
        data: what the family made the question from.
    """

    family: str
    difficulty: int
    question: str
    data: Any
    work: Work

    @property
    def solution(self) -> str:
        return self.work.text

    @property
    def answer(self) -> str:
        return self.work.answer

    def works(self) -> list[Work]:
        """The right solutions: one for each order in which its steps can be taken."""
        family = FAMILIES[self.family]
        return [family.work(data, None) for data in family.orders(self.data)]

    def slip(self, rng: random.Random) -> Work:
        """A solution with one slip, and what follows from it; its answer is wrong."""
        return self.slip_beside(rng)[1]

    def slip_beside(self, rng: random.Random) -> tuple[Work, Work]:
        """A right solution, and the same with one slip and what follows from it."""
        family = FAMILIES[self.family]
        while True:
            data = rng.choice(family.orders(self.data))
            wrong = family.work(data, rng)
            if wrong.answer != self.answer:
                return family.work(data, None), wrong


class Family(NamedTuple):
    """How a family makes problems and works them out.

    Attributes:
        draw: a question and the data behind it, of a difficulty.
        work: the solution that data leads to; with one slip where it is given a chance.
        orders: of the data, such that the same answer is reached by steps in another order.
    """

    draw: Callable[[random.Random, int], tuple[str, Any]]
    work: Callable[[Any, random.Random | None], Work]
    orders: Callable[[Any], Sequence[Any]]


def split_of(question: str) -> Split:
    """The only split that this question can be in: a twentieth each is test and calibration."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 20
    return {0: "test", 1: "calibration"}.get(place, "train")  # type: ignore[return-value]


def problems(
    split: Split,
    seed: int,
    families: Sequence[str] = (),
    difficulties: Sequence[int] = DIFFICULTIES,
) -> Iterator[Problem]:
    """Problems of a split without end, families and difficulties in turn.

    Raises:
        ValueError: a family or difficulty that there is not.
    """
    families = families or tuple(FAMILIES)
    unknown = [f for f in families if f not in FAMILIES]
    if unknown or not set(difficulties) <= set(DIFFICULTIES) or not difficulties:
        raise ValueError(f"expected families of {list(FAMILIES)}, difficulties of {DIFFICULTIES}")
    rng = random.Random(f"{split}/{seed}")
    while True:
        for difficulty in difficulties:
            for family in families:
                yield _draw(rng, split, family, difficulty)


def distinct(stream: Iterable[Problem]) -> Iterator[Problem]:
    """Each question once: of easy ones there are not many."""
    seen: set[str] = set()
    for problem in stream:
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def hard_problems(split: Split, seed: int) -> Iterator[Problem]:
    """Those of :data:`HARD` difficulties, each once: what benchmarks and calibration ask."""
    return distinct(problems(split, seed, difficulties=HARD))


def _draw(rng: random.Random, split: Split, family: str, difficulty: int) -> Problem:
    while True:
        question, data = FAMILIES[family].draw(rng, difficulty)
        if split_of(question) == split:
            return Problem(family, difficulty, question, data, FAMILIES[family].work(data, None))


def extract_answer(text: str) -> str | None:
    """What stands behind the last "Answer:" of a text; None where there is none."""
    found = re.findall(r"Answer:[ ]*([^\n]*)", text)
    return found[-1].strip() if found else None


def check(problem: Problem, text: str) -> bool:
    """Whether a text ends in the problem's answer."""
    return extract_answer(text) == problem.answer


def _gym(name: str, rng: random.Random, **config: Any) -> dict[str, Any]:
    import reasoning_gym  # of the extras "train" and "bench": a server needs no problems

    return reasoning_gym.create_dataset(name, seed=rng.getrandbits(31), size=1, **config)[0]


# Arithmetic chains


def _draw_chain(rng: random.Random, difficulty: int) -> tuple[str, Any]:
    terms = (3, 4, 5, 5, 6)[difficulty - 1]
    item = _gym(
        "chain_sum",
        rng,
        min_terms=terms,
        max_terms=terms,
        min_digits=(1, 1, 1, 2, 3)[difficulty - 1],
        max_digits=(1, 2, 2, 3, 3)[difficulty - 1],
    )
    return item["question"], item["metadata"]["expression"]


def _work_chain(expression: str, slip: random.Random | None) -> Work:
    first, *rest = re.findall(r"([+-]?) ?(\d+)", expression)
    total, steps = int(first[1]), []
    bad = slip.randrange(len(rest)) if slip else None
    for i, (sign, number) in enumerate(rest):
        value = total + int(number) * (-1 if sign == "-" else 1)
        if i == bad:
            value = _near(value, slip)
        steps.append(f"{total} {sign} {number} = {value}")
        total = value
    return Work(tuple(steps), str(total))


def _orders_of_chain(expression: str) -> Sequence[str]:
    """From the first number on, and round the others from any of them."""
    first, *rest = re.findall(r"[+-]? ?\d+", expression)
    return [" ".join([first, *terms]) for terms in _rotations(rest)]


def _rotations(terms: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(*terms[i:], *terms[:i]) for i in range(len(terms))]


def _near(value: int, rng: random.Random | None) -> int:
    """A wrong result as slips make them: a carry forgotten, one too many, a sign lost."""
    assert rng is not None
    return rng.choice([value + 1, value - 1, value + 10, value - 10, value + 2, value - 2, -value])


# Counting legs


def _draw_legs(rng: random.Random, difficulty: int) -> tuple[str, Any]:
    item = _gym(
        "leg_counting",
        rng,
        min_animals=(1, 2, 3, 3, 4)[difficulty - 1],
        max_animals=(2, 2, 3, 4, 5)[difficulty - 1],
        min_instances=(1, 1, 1, 5, 10)[difficulty - 1],
        max_instances=(4, 6, 9, 20, 60)[difficulty - 1],
    )
    return item["question"].strip(), tuple(item["metadata"]["animals"].items())


def _work_legs(animals: Sequence[tuple[str, int]], slip: random.Random | None) -> Work:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    bad = slip.randrange(2 * len(animals) - 1) if slip else None
    steps, total = [], 0
    for i, (animal, count) in enumerate(animals):
        legs = ANIMALS[animal]
        if i == bad and slip and slip.random() < 0.5:
            legs = slip.choice([n for n in (0, 2, 4, 6, 8) if n != legs])
            product = count * legs
        else:
            product = count * legs
            if i == bad:
                product = _near(product, slip)
        steps.append(f"{count} {animal}s: {count} * {legs} = {product}")
        if i:
            value = total + product
            if bad == len(animals) + i - 1:
                value = _near(value, slip)
            steps.append(f"{total} + {product} = {value}")
            total = value
        else:
            total = product
    return Work(tuple(steps), str(total))


# Ordering people


def _draw_order(rng: random.Random, difficulty: int) -> tuple[str, Any]:
    names = tuple(rng.sample(NAMES, (3, 5, 8, 11, 13)[difficulty - 1]))
    more, most, least = rng.choice(COMPARISONS)
    wanted = rng.choice((most, least))
    facts = [f"{a} is {more} than {b}." for a, b in pairwise(names)]
    rng.shuffle(facts)
    return f"Known: {' '.join(facts)} Who is the {wanted}?", (names, more, wanted == most, False)


def _work_order(data: tuple[Sequence[str], str, bool, bool], slip: random.Random | None) -> Work:
    names, more, most, upwards = data
    pairs = list(pairwise(names))
    if slip:
        i = slip.randrange(len(pairs))
        pairs[i] = pairs[i][::-1]
    steps = [f"- {a} is {more} than {b}." for a, b in pairs]
    answer = pairs[0][0] if most else pairs[-1][1]
    return Work(tuple(steps[::-1] if upwards else steps), answer)


def _orders_of_order(data: tuple[Sequence[str], str, bool, bool]) -> Sequence[Any]:
    """From the one who has most of it downwards; upwards."""
    return [(*data[:3], upwards) for upwards in (False, True)]


# Looking up facts

_RELATIONS = {
    "city": (CITIES, "lives in {value}"),
    "job": (JOBS, "works as a {value}"),
    "pet": (PETS, "keeps a {value}"),
}
_ASK = {"city": "Where does {who} live?", "pet": "Which animal does {who} keep?"}


def _draw_facts(rng: random.Random, difficulty: int) -> tuple[str, Any]:
    people = (8, 8, 9, 10, 12)[difficulty - 1]
    names = rng.sample(NAMES, people)
    columns = [rng.sample(values, people) for values, _ in _RELATIONS.values()]
    rows = tuple(zip(names, *columns))
    lines = []
    for name, *values in rows:
        city, job, pet = (
            text.format(value=value) for (_, text), value in zip(_RELATIONS.values(), values)
        )
        lines.append(f"{name} {city}, {job} and {pet}.")
    ask, data = _ask_facts(rows, rng, hops=1 if difficulty == 1 else 2)
    return f"Facts: {' '.join(lines)}\n{ask}", data


def _ask_facts(rows: Sequence[Sequence[str]], rng: random.Random, hops: int) -> tuple[str, Any]:
    kind, person = rng.choice(list(_ASK)), rng.randrange(len(rows))
    name, job = rows[person][0], rows[person][2]
    who = name if hops == 1 else f"the {job}"
    return _ASK[kind].format(who=who), (rows, kind, person, hops)


def follow_up(problem: Problem, rng: random.Random) -> Problem | None:
    """Another question about the same fact sheet, without the sheet; None in other families."""
    if problem.family != "facts":
        return None
    question, data = _ask_facts(problem.data[0], rng, problem.data[3])
    return Problem("facts", problem.difficulty, question, data, _work_facts(data, None))


def _work_facts(
    data: tuple[Sequence[Sequence[str]], str, int, int], slip: random.Random | None
) -> Work:
    rows, kind, person, hops = data
    found = person
    if slip:
        found = slip.choice([i for i in range(len(rows)) if i != person])
    name, kinds = rows[found][0], list(_RELATIONS)
    value = rows[found][1 + kinds.index(kind)]
    if slip and (hops == 1 or slip.random() < 0.5):
        name = rows[person][0]  # the right person, with what another one has
    steps = [f"- {name} {_RELATIONS[kind][1].format(value=value)}."]
    if hops == 2:
        steps.insert(0, f"- {name} {_RELATIONS['job'][1].format(value=rows[person][2])}.")
    return Work(tuple(steps), value)


def _one_order(data: Any) -> Sequence[Any]:
    return [data]


FAMILIES: dict[str, Family] = {
    "chain": Family(_draw_chain, _work_chain, _orders_of_chain),
    "legs": Family(_draw_legs, _work_legs, _rotations),
    "order": Family(_draw_order, _work_order, _orders_of_order),
    "facts": Family(_draw_facts, _work_facts, _one_order),
}
