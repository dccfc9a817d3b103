#!/bin/sh
cd "$(dirname "$0")" || exit 1
python=python3
[ -n "$VIRTUAL_ENV" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
exec "$python" scripts/launch.py validation.py "$@"
