#!/usr/bin/env bash
# From a fresh checkout to a running demo: installs into .venv, then runs the demo, which fetches
# the model, starts a server and stops it again. Every argument goes to the demo, see --help.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m rksc_sglang.demo "$@"
