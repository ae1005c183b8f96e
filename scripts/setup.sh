#!/usr/bin/env bash
# Make .venv and install this package into it: scripts/setup.sh [EXTRAS], for instance "test,bench".
# Does nothing when the same requirements are installed there already.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}

fail() {
    echo "rksc: error: $*" >&2
    exit 1
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "Python 3.10 or newer is needed, and $python is not; set PYTHON to one that is"

# The package is installed in editable form, so only its requirements can be out of date.
stamp=.venv/rksc-$(echo "$extras" | cat - pyproject.toml | cksum | cut -d' ' -f1)
if [ -e "$stamp" ]; then exit 0; fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    "$python" -m venv .venv || fail "could not create .venv with $python -m venv"
fi
echo "Installing into .venv: the first time this takes about 7 minutes and 11 GB ..." >&2
.venv/bin/python -m pip install -qq --disable-pip-version-check -e ".${extras:+[$extras]}" ||
    fail "the installation failed, see the message of pip above"
touch "$stamp"
