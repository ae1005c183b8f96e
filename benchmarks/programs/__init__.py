"""Whole reasoning programs, each with RKSC and in the best form that SGLang alone allows.

What is generated is prompted by the same text in both forms. They differ in how much of it is
computed: a verification with a prompt of its own is in the plain form a further turn of its branch
where it can be, and prefixes are computed before they are forked.
"""

from benchmarks.programs import (
    beam_search,
    best_of_n,
    debate,
    document_qa,
    self_consistency,
    tree_of_thought,
)
from benchmarks.programs.interface import Mechanisms, Outcome, Program, Settings

__all__ = ["PROGRAMS", "Mechanisms", "Outcome", "Program", "Settings"]

PROGRAMS: dict[str, Program] = {
    module.PROGRAM.name: module.PROGRAM
    for module in (
        best_of_n,
        self_consistency,
        tree_of_thought,
        beam_search,
        debate,
        document_qa,
    )
}
