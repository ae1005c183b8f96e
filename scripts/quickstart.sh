#!/usr/bin/env bash
# From a fresh checkout to a running demo: installs into .venv, then runs the demo, which fetches
# the model, starts a server and stops it again. Every argument goes to the demo, see --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$venv/rksc-installed

fail() {
  echo "quickstart: $*" >&2
  exit 1
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
  fail "Python 3.10 or newer is needed, and $python is not; set PYTHON to one that is"

# What an installation is made from; an equal stamp means that there is nothing to do.
sources=$(
  cd "$root"
  {
    "$python" --version
    find pyproject.toml rksc_sglang -type f -not -path '*/__pycache__/*' -print0 |
      sort -z | xargs -0 cksum
  } | cksum
)
if [ "$(cat "$stamp" 2>/dev/null)" != "$sources" ]; then
  rm -f "$stamp"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || {
      rm -rf "$venv"
      fail "could not create $venv with $python -m venv"
    }
  fi
  echo "Installing into $venv: the first time this takes about 6 minutes and 11 GB ..."
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$root" ||
    fail "the installation failed, see the message of pip above"
  echo "$sources" >"$stamp"
fi

exec "$venv/bin/python" -m rksc_sglang.demo "$@"
