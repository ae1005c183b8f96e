#!/usr/bin/env bash
# Everything that is checked: style, types, unit tests, end-to-end tests on real servers.
# Further arguments go to pytest: scripts/test.sh tests/unit -k contract
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy &
types=$!
.venv/bin/python -m pytest "$@"
wait "$types" # fails where mypy has failed
