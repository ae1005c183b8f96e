#!/usr/bin/env bash
# Make .venv and install this package into it: scripts/setup.sh [EXTRAS], for instance "test,bench".
# Does nothing when the same requirements are installed there already.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "rksc: error: Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2
    exit 1
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv

# The package is installed in editable form, so only its requirements can be out of date.
stamp=.venv/rksc-$("$python" -c 'import hashlib, sys
print(hashlib.sha256(open("pyproject.toml", "rb").read() + sys.argv[1].encode()).hexdigest()[:16])' "$extras")
[ -e "$stamp" ] && exit 0
echo "Installing into .venv: SGLang and what it needs, about 11 GB and 7 minutes ..." >&2
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
touch "$stamp"
