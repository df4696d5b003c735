#!/usr/bin/env bash
# Makes VENV a virtual environment with torch, the packages of requirements/LOCK.lock and, for "project", this
# repository in editable form. Says and does nothing when VENV is that already; an interrupted run is begun anew.
#
#   scripts/install.sh VENV LOCK [project]        scripts/install.sh .venv cpu project
#
# PYTHON chooses the interpreter (3.11 or 3.12); without it an environment keeps its own, and a new one gets the first
# of python3.11, python3.12 and python3 that suits.
set -euo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

venv=$1 lock=requirements/$2.lock project=${3:-}
torch=$(sed -n 's/^torch==//p' "requirements/$2.in")
torch_cpu_index=https://download.pytorch.org/whl/cpu

die() { echo "error: $*" >&2; exit 1; }
run() { "$venv/bin/python" "$@"; }
pip_install() { run -m pip install -qq --no-input --disable-pip-version-check "$@"; }
digest() { { pwd && echo "$venv $torch" && cat "$1"; } | sha256sum; }
holds() { [ "$(cat "$venv/$1" 2>/dev/null)" = "$2" ]; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

suits() {
    case $(version "$1") in 3.11 | 3.12) return 0 ;; *) return 1 ;; esac
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or 3.12; name one that is, as in: make PYTHON=python3.12"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or 3.12 was found; install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
        "or name it, as in: make PYTHON=/path/to/python3.12"
}

install_torch() {
    echo "Installing torch $torch into $venv ..."
    pip_install --no-deps "torch==$torch+cpu" 2>/dev/null && return
    pip_install --no-deps --timeout 10 --retries 1 --index-url "$torch_cpu_index" "torch==$torch+cpu" 2>/dev/null && return
    echo "The CPU build of torch is out of reach; installing the ordinary one, which brings CUDA packages (several GB) ..."
    pip_install "torch==$torch" || die "pip could not install torch $torch; its own message is above"
}

install_packages() {
    local python
    [ ! -L "$venv" ] || die "$venv is a link, and what it points to would be emptied; remove the link"
    python=$(find_python)
    "$python" -m venv --clear "$venv" ||
        die "$python cannot make a virtual environment; install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
    install_torch
    echo "Installing the packages of $lock into $venv ..."
    pip_install --require-hashes --no-deps --only-binary :all: -r "$lock" ||
        die "pip could not install $lock; its own message is above"
    run -c "import torch; assert torch.__version__.partition('+')[0] == '$torch', torch.__version__" ||
        die "$venv should hold torch $torch but holds another or a broken one; remove $venv and run this again"
}

other_python() { [ -n "${PYTHON:-}" ] && [ "$(version "$PYTHON")" != "$(version "$venv/bin/python")" ]; }

# One installation of a lock at a time; a file system that cannot tell must do without.
exec 9<"$lock"
flock 9 2>/dev/null || true

packages=$(digest "$lock")
if ! holds installed-packages "$packages" || ! suits "$venv/bin/python" || other_python; then
    install_packages
    echo "$packages" >"$venv/installed-packages"
fi

if [ "$project" = project ]; then
    sources=$(digest pyproject.toml)
    if ! holds installed-project "$sources"; then
        pip_install --no-deps --no-build-isolation -e . || die "pip could not install this repository into $venv"
        echo "$sources" >"$venv/installed-project"
    fi
fi
