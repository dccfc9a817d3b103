#!/bin/sh
# Kill training runs 20 times at random moments, also while they save, and compare the final weights bit for bit.
set -e
cd "$(dirname "$0")/../.."
. scripts/environment.sh
install_requirements requirements-dev.txt
"$python" -m pytest tests/test_survive.py -k same_bits --kills 20 "$@"
