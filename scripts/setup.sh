# Sourced by quickstart.sh and test.sh: makes .venv with the pinned packages, once, and activates it.
# A torch that the machine already has (>= 2.8, with torchvision) is kept: it was chosen for the machine's driver.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python >= 3.10 with venv found; install one, or name it: PYTHON=/path/to/python3 $0" >&2
    return 1
}

installed_torch() { # prints torch== and torchvision== lines if this Python has a usable pair
    "$1" - 2>/dev/null <<'PY'
import re, torch, torchvision
from importlib.metadata import version  # what pip compares: torch.__version__ may have a local part that it lacks
if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 8):
    print(f"torch=={version('torch')}\ntorchvision=={version('torchvision')}")
PY
}

install() {
    local python kept wanted
    wanted=$(cat constraints.txt pyproject.toml | cksum)
    if [ "$(cat .venv/.installed 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    kept=$(installed_torch "$python" || true)
    if [ ! -x .venv/bin/python ]; then
        echo "setting up .venv with $("$python" --version) ${kept:+and the torch that is installed}"
        "$python" -m venv ${kept:+--system-site-packages} .venv
    fi
    kept=$(installed_torch .venv/bin/python || true)
    if [ -n "$kept" ]; then
        { grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' constraints.txt; echo "$kept"; } >.venv/constraints.txt
    else
        cp constraints.txt .venv/constraints.txt
    fi
    echo "installing the pinned packages (a few minutes, several GB the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[all,dev]'
    echo "$wanted" >.venv/.installed
}

install
# shellcheck disable=SC1091
source .venv/bin/activate
