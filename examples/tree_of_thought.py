"""Tree of thought: each level grows the best thoughts by several more, and verifies them."""

from benchmarks.programs.tree_of_thought import PROGRAM
from examples.command import main

if __name__ == "__main__":
    main(PROGRAM, __doc__)
