"""Questions about a document: personas read it, a verifier reads it again and thinks about each."""

from benchmarks.programs.document_qa import PROGRAM
from examples.command import main

QUESTION = """The library opens at 9 and closes at 17, on Saturdays at 12. Members borrow up to 6
books for 4 weeks, guests up to 2 books for 1 week. A book that is late costs 20 cents a day.

How many books may a guest borrow?"""

if __name__ == "__main__":
    main(PROGRAM, __doc__, QUESTION)
