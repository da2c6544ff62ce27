# ci/quickstart and ci/test source this file at the root of the checkout. It makes or reuses .venv with fusemlp in it.
# PYTHON names the interpreter of a new .venv; pip's own settings (pip.conf, PIP_*) apply.

# Modules of an activated environment or of another search path must not leak into .venv.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV MYPYPATH

script=ci/${0##*/}

say() { printf '%s: %s\n' "$script" "$*"; }

fail() {
    printf '%s: %s\n' "$script" "$*" >&2
    exit 2
}

# Prints "VERSION STATE", STATE one of ready, old, incomplete; prints nothing if the interpreter does not run.
probe() {
    "$1" -c '
import sys
state = "old" if sys.version_info < (3, 11) else "ready"
if state == "ready":
    try:
        import ensurepip, venv
    except ImportError:
        state = "incomplete"
print(".".join(map(str, sys.version_info[:3])) + " " + state)
' 2>/dev/null || true
}

explain() {
    local name=$1 version=${2% *}
    case $2 in
        *old) echo "$name is Python $version" ;;
        *incomplete) echo "$name is Python $version and lacks the modules venv or ensurepip, which make" \
            "virtual environments; on Debian and Ubuntu: apt install python3-venv" ;;
        *ready) echo "$name is Python $version" ;;
        *) echo "$name is no Python that runs here" ;;
    esac
}

# Sets `python` to the first interpreter that can make the environment.
choose_python() {
    local found reasons=""
    local nothing=$'\n  No python3 was found.'
    if [[ -n ${PYTHON:-} ]]; then
        found=$(probe "$PYTHON")
        [[ $found == *ready ]] || fail "Python 3.11 or later is needed; PYTHON: $(explain "$PYTHON" "$found")"
        python=$PYTHON
        return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 python; do
        found=$(probe "$python")
        [[ $found == *ready ]] && return
        [[ -z $found ]] || reasons+=$'\n  '$(explain "$python" "$found")
    done
    fail "Python 3.11 or later is needed: install one, or name it in front of the command," \
        "PYTHON=/path/to/python3 $script.${reasons:-$nothing}"
}

# make_environment EXTRA: .venv with `pip install -e .[EXTRA]` in it.
make_environment() {
    local extra=$1 found wanted stamp=.venv/installed-$1
    if [[ -e .venv && ! -e .venv/pyvenv.cfg ]]; then
        fail ".venv is there and is no virtual environment: move it away"
    fi
    found=$(probe .venv/bin/python)
    if [[ $found == *old ]]; then
        fail "Python 3.11 or later is needed; .venv has ${found% *}: remove .venv and start again"
    elif [[ -n $found ]]; then
        if [[ -n ${PYTHON:-} ]]; then
            wanted=$(probe "$PYTHON")
            [[ ${wanted% *} == "${found% *}" ]] ||
                fail ".venv is Python ${found% *}; PYTHON: $(explain "$PYTHON" "$wanted"); remove .venv"
        fi
        say "reusing .venv (Python ${found% *}; remove it to start afresh)"
    else
        choose_python
        say "making .venv with $python"
        "$python" -m venv --clear .venv || fail "$python -m venv failed, for the reason above"
    fi
    # pip is missing if .venv was made without it, or if an earlier run was cut off.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null ||
        fail "pip cannot be put into .venv: remove .venv and start again"

    # Skip the installation if it is newer than dependencies and version: no network is needed.
    if [[ $stamp -nt pyproject.toml && $stamp -nt engine/fusemlp/_version.py ]] &&
        [[ $(<"$stamp") == "$PWD" ]]; then
        return
    fi
    say "installing fusemlp[$extra] (the first time this downloads its dependencies)"
    # Modules are compiled when they are imported; pip would compile those of all packages, on one core.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$extra]" ||
        fail "pip install failed, for the reason above"
    printf '%s\n' "$PWD" >"$stamp"
}
