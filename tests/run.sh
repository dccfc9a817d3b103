#!/bin/sh
# Set up what the tests need and run them: ruff, then the demo, then pytest. `sh tests/run.sh -k scorer` passes flags on
# to pytest; `--reuse-demo` takes temp/demo as it is.
set -e
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_requirements requirements-dev.txt
if [ "$CI" = true ] && [ "$(id -u)" = 0 ] && ! command -v chromium > /dev/null; then
    # for the report's tests in a real browser; elsewhere they are skipped where there is none
    { apt-get update && apt-get install --yes chromium; } > /dev/null 2>&1 || echo "no chromium: its tests are skipped"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest --numprocesses 2 "$@"
