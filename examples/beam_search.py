"""Beam search over steps: a beam's score is the chance that all of its steps are right."""

from benchmarks.programs.beam_search import PROGRAM
from examples.command import main

if __name__ == "__main__":
    main(PROGRAM, __doc__)
