"""Best-of-N: the solution that a verifier, with words of its own, finds most probably right."""

from benchmarks.programs.best_of_n import PROGRAM
from examples.command import main

if __name__ == "__main__":
    main(PROGRAM, __doc__)
