# Read by the *.sh files. Sets $python: that of the active environment, else that of .venv, else python3.
if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    python=python
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
else
    python=python3
fi

# install_requirements FILE: install into the active environment, or into .venv, which is made if needed. Once per FILE.
install_requirements() {
    if [ "$python" = python3 ]; then
        python3 -m venv .venv
        python=.venv/bin/python
    fi
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/installed-$1"
    if ! cmp -s "$1" "$stamp"; then
        "$python" -m pip install --quiet -r "$1"
        cp "$1" "$stamp"
    fi
}
