#!/usr/bin/env bash
# Everything that is checked: style, types, unit tests, end-to-end tests on real servers.
# Arguments go to pytest, which then runs what they select: scripts/test.sh tests/unit -k contract
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ $# -gt 0 ]; then
    .venv/bin/mypy
    exec .venv/bin/python -m pytest "$@"
fi
# Servers that start leave a core idle for most of the time: the rest runs beside them.
beside=$(mktemp)
trap 'kill 0' INT # what runs in the background hears no Ctrl-C
{ .venv/bin/mypy && OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/unit; } >"$beside" 2>&1 &
units=$!
failed=0
.venv/bin/python -m pytest tests/e2e || failed=$?
wait "$units" || failed=$?
cat "$beside"
rm "$beside"
exit "$failed"
