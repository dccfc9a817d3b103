#!/bin/sh
# Kill a training run ten times at random moments, on two ranks, and compare the weights bit for bit. About 15 minutes.
set -e
cd "$(dirname "$0")/.."
. scripts/environment.sh
install_requirements requirements-dev.txt
export HF_HUB_OFFLINE=1
"$python" -m pytest tests/test_survive.py -k same_bits --kills 10 "$@"
