"""Debate: agents of different personas read in each round what all have said, and then vote."""

from benchmarks.programs.debate import PROGRAM
from examples.command import main

if __name__ == "__main__":
    main(PROGRAM, __doc__)
