#!/bin/sh
# Set up what the tests need and run them: ruff, then pytest. `sh tests/run.sh -k scorer` passes flags on to pytest.
set -e
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_requirements requirements-dev.txt
if [ "$(id -u)" = 0 ] && ! command -v chromium > /dev/null && command -v apt-get > /dev/null; then
    apt-get install --quiet --quiet --yes chromium > /dev/null 2>&1 || true  # for the page's tests, else they are skipped
fi
export HF_HUB_OFFLINE=1  # nothing is fetched
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest "$@"
