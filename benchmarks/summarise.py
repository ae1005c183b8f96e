"""``python -m benchmarks.summarise FILE``: compute the summary of a stored result again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.harness import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSON that a benchmark wrote with --json")
    parser.add_argument("--write", action="store_true", help="store the new summary in the file")
    args = parser.parse_args()
    report(json.loads(args.file.read_text()), args.file if args.write else None)


if __name__ == "__main__":
    main()
