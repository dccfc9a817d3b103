#!/bin/sh
# Set up what the tests need and run them: ruff, then pytest. `sh tests/run.sh -k scorer` passes flags on to pytest.
set -e
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_requirements requirements-dev.txt
export HF_HUB_OFFLINE=1  # nothing is fetched
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
