"""The command line of the examples: a program, a server, a question."""

from __future__ import annotations

import argparse

import sglang as sgl

from benchmarks.programs import Program, Settings

QUESTION = "Ben has 7 pencils. He gives away 2 and buys 4. How many pencils does he have?"
#: Small models imitate a solution better than they follow an instruction.
EXAMPLES = (
    (
        "A box holds 6 eggs. How many eggs are in 3 boxes and 2 eggs?",
        "3 * 6 = 18\n18 + 2 = 20\nAnswer: 20",
    ),
    (
        "Ann is 9. Tom is 4 years younger. How old are they together?",
        "9 - 4 = 5\n9 + 5 = 14\nAnswer: 14",
    ),
)


def main(program: Program, doc: str | None, question: str = QUESTION) -> None:
    """Run a program as the command line says, and print what it answers.

    Args:
        doc: what the program does, for ``--help``.
        question: asked where the command line has none.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--url", default="http://localhost:30000", help="default: %(default)s")
    parser.add_argument("--question", default=question, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--plain", action="store_true", help="the form that needs no RKSC")
    args = parser.parse_args()
    backend = sgl.RuntimeEndpoint(args.url, chat_template_name="chatml")
    settings = Settings(max_tokens=args.max_tokens, examples=EXAMPLES)
    form = program.solve_plain if args.plain else program.solve
    outcome = form.run(args.question, settings, backend=backend).ret_value
    for number, candidate in enumerate(outcome.candidates):
        print(f"--- candidate {number}\n{candidate}")
    print(f"--- votes: {outcome.votes}\nanswer: {outcome.answer or outcome.text}")
