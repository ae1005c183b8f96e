"""Real text for prompts, from what every machine has, or from a file of questions.

Documentation strings of Python's standard library, and licences and READMEs of installed packages.
Repeated templates would be no text: caches and models treat them in ways of their own.
"""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

_MIN_CHARACTERS = 400
_STANDARD_LIBRARY_FILES = 150


def machine_texts() -> list[str]:
    """Passages of prose of at least 400 characters, each once, in an order that does not vary."""
    passages: dict[str, None] = {}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py"))[:_STANDARD_LIBRARY_FILES]:
        tree = ast.parse(path.read_text(errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                passages.setdefault(ast.get_docstring(node) or "")
    for distribution in sorted(distributions(), key=lambda d: d.name or ""):
        for file in distribution.files or []:
            if file.name.upper().startswith(("LICENSE", "README", "COPYING")):
                path = Path(str(distribution.locate_file(file)))
                if path.is_file():
                    passages.setdefault(path.read_text(errors="replace"))
    return [text for text in passages if len(text) >= _MIN_CHARACTERS]


def question_texts(path: Path) -> list[str]:
    """The ``question`` of each JSON line."""
    return [json.loads(line)["question"] for line in path.read_text().splitlines() if line.strip()]


class Passages:
    """Passages drawn without repetition; ``take`` gives text of about a wanted length.

    Args:
        texts: where passages are cut from.
        seed: two objects of the same texts and seed give the same passages.
    """

    def __init__(self, texts: list[str], seed: int) -> None:
        rng = random.Random(seed)
        words = [word for text in rng.sample(texts, len(texts)) for word in text.split()]
        self._words = words
        self._next = 0

    def take(self, words: int) -> str:
        """The next ``words`` words; one word is 1.3 to 2 tokens of SmolLM2.

        Raises:
            ValueError: the machine's text is used up.
        """
        start, self._next = self._next, self._next + words
        if self._next > len(self._words):
            raise ValueError("out of text: give more with --questions, or measure less")
        return " ".join(self._words[start : self._next])
