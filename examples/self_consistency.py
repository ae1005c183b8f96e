"""Self-consistency: the most frequent answer of several samples, known before all have ended."""

from benchmarks.programs.self_consistency import PROGRAM
from examples.command import main

if __name__ == "__main__":
    main(PROGRAM, __doc__)
