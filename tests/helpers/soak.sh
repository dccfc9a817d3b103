#!/bin/sh
# Kill a training run ten times at random moments, on one and on two ranks; compare the weights bit for bit.
set -e
cd "$(dirname "$0")/../.."
. scripts/environment.sh
install_requirements requirements-dev.txt
"$python" -m pytest tests/test_survive.py -k same_bits --kills 10 "$@"
