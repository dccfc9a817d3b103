#!/bin/sh
# Install what the tests need, then run ruff, the demo and pytest. Flags go on to pytest:
#   sh tests/run.sh -k scorer        the tests with this word in their name
#   sh tests/run.sh --reuse-demo     temp/demo as `sh demo/run.sh` left it, instead of running the demo again
#   sh tests/run.sh -m slow          the slow tests, which the other commands leave out
set -e
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_requirements requirements-dev.txt
if [ "$CI" = true ] && [ "$(id -u)" = 0 ] && ! command -v chromium > /dev/null; then
    # The tests of the pages need a browser. On other machines they are skipped if there is none.
    { apt-get update && apt-get install --yes chromium; } > /dev/null 2>&1 || echo "no chromium: its tests are skipped"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m pytest --numprocesses 2 "$@"
