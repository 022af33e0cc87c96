# Sourced by quickstart.sh and test.sh: makes .venv with the pinned packages, once, and activates it.
# A torch that the machine already has (>= 2.8, with torchvision) is kept if NVIDIA's driver, where there is one, is new
# enough for it. The pinned torch is built for CUDA 13, which needs driver 580; beside an older driver the newest torch that
# is built for CUDA 12 is installed in its place, which needs 525.

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

OLDER_TORCH='torch==2.10.0
torchvision==0.25.0'

driver() { # the major version of NVIDIA's driver; nothing without one that runs
    nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n '1s/^\([0-9][0-9]*\)\..*/\1/p'
}

installed_torch() { # prints torch== and torchvision== lines if this Python has a usable pair; $2 is the driver
    "$1" - "${2:-}" 2>/dev/null <<'PY'
import re, sys, torch, torchvision
from importlib.metadata import version  # what pip compares: torch.__version__ may have a local part that it lacks
driver, cuda = sys.argv[1], (torch.version.cuda or "").partition(".")[0]
fits = not driver or int(driver) >= {"13": 580, "12": 525, "11": 450}.get(cuda, 0)
if fits and tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 8):
    print(f"torch=={version('torch')}\ntorchvision=={version('torchvision')}")
PY
}

fitting_torch() { # prints the lines of a torch for a driver that is too old for the pinned one; $1 is the driver
    if [ -z "$1" ] || [ "$1" -ge 580 ]; then
        return
    elif [ "$1" -ge 525 ]; then
        echo "$OLDER_TORCH"
    else
        echo "warning: NVIDIA's driver $1 is too old for any torch from 2.8 on: update it to 525 or newer (580 for the" \
            "pinned torch); until then commands compute on the CPU, with ACCELERATE_USE_CPU=true" >&2
    fi
}

install() {
    local python kept wanted own
    own=$(driver || true)
    wanted="$(cat constraints.txt pyproject.toml | cksum) $(fitting_torch "$own" 2>/dev/null | tr '\n' ' ')"
    if [ "$(cat .venv/.installed 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python)
    kept=$(installed_torch "$python" "$own" || true)
    if [ ! -x .venv/bin/python ]; then
        echo "setting up .venv with $("$python" --version) ${kept:+and the torch that is installed}"
        "$python" -m venv ${kept:+--system-site-packages} .venv
    fi
    kept=$(installed_torch .venv/bin/python "$own" || true)
    kept=${kept:-$(fitting_torch "$own")}
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
