#!/usr/bin/env bash
# Everything that needs a GPU, in one command: benchmarks/gpu_check.sh [--dry-run]
#
# The CUDA tests, compute-sanitizer where it is installed, every benchmark on the GPU, and whether a
# step makes the host wait. Offline, with the torch and Triton that are there, in less than ten
# minutes. Results go to ${OUT:-benchmarks/results} as JSON. A part that fails is named and stops no
# other; the exit status is 0 if all passed.
#
# Without a GPU, or with --dry-run, the same parts run on the CPU at tiny sizes, into a folder that is
# thrown away unless OUT names one, to see that the script works; NO_COMPILE=1 leaves torch.compile
# out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 MPLBACKEND=Agg
scratch=$(mktemp -d "${TMPDIR:-/tmp}/global_kd_gpu.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

dry=0
case ${1:-} in
--dry-run) dry=1 ;;
"") "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || dry=1 ;;
*)
    printf 'usage: %s [--dry-run]\n' "$0" >&2
    exit 2
    ;;
esac
if ((dry)); then
    out=${OUT:-$scratch/results} device=cpu quick=(--quick) patience=4
    printf 'no GPU is used: every part runs on the CPU, at tiny sizes\n'
else
    out=${OUT:-benchmarks/results} device=cuda quick=() patience=1
fi
[[ -z ${NO_COMPILE:-} ]] || quick+=(--no-compile)
mkdir -p "$out"

DEADLINE=$((580 * patience)) # seconds for everything
summary=()
failed=0
part() { # part NAME SECONDS COMMAND...: run it, remember how it ended
    local name=$1 limit=$2 started=$SECONDS status left=$((DEADLINE - SECONDS))
    shift 2
    if ((left < 15)); then
        failed=1
        summary+=("$(printf '%5s    %-28s FAILED: no time was left' - "$name")")
        return
    fi
    limit=$((limit * patience))
    ((limit <= left)) || limit=$left
    printf '\n==> %s\n' "$name"
    timeout --kill-after=10 "$limit" "$@"
    status=$?
    local said=passed
    case $status in
    0) ;;
    5) [[ $* == *pytest* ]] && said="FAILED: no test ran" || said="FAILED ($status)" ;;
    124 | 137) said="FAILED: longer than $limit s" ;;
    *) said="FAILED ($status)" ;;
    esac
    ((status == 0)) || failed=1
    summary+=("$(printf '%5d s  %-28s %s' $((SECONDS - started)) "$name" "$said")")
}
skip() { # skip NAME REASON
    printf '\n==> %s: skipped, %s\n' "$1" "$2"
    summary+=("$(printf '%5s    %-28s skipped: %s' - "$1" "$2")")
}

measure() { # measure NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "benchmark ${name}" "$limit" "$python" -m benchmarks "${name%% *}" --device "$device" \
        "${quick[@]+"${quick[@]}"}" --output "$out/${name// /_}_$device.json" "$@"
}

if ((!dry)); then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.draw --format=csv || true
fi
"$python" -c 'import torch; print("torch", torch.__version__)'
"$python" -c 'import triton; print("triton", triton.__version__)' 2>/dev/null || printf 'no Triton\n'

# The numbers that only a GPU can give come first, should the time run out.
measure waits 60
measure step 120
measure ops 150
measure methods 120 --seconds 1
if "$python" -c 'import torchvision' 2>/dev/null; then
    measure training 90
else
    skip "benchmark training" "torchvision is not installed"
fi

if "$python" -c 'import pytest, hypothesis' 2>/dev/null; then
    pytest=("$python" -m pytest -q -p no:cacheprovider -m "not slow and not compatibility")
    others=(tests/test_pool_boxes.py tests/test_robust.py tests/ops/test_dispatch.py tests/losses)
    if ((dry)); then
        part "kernel tests, found only" 60 env TRITON_INTERPRET=1 "${pytest[@]}" --collect-only \
            tests/ops/triton_kernels.py
        part "other tests, some" 60 "${pytest[@]}" tests/losses/test_released.py
    else
        part "kernel tests" 150 "${pytest[@]}" tests/ops/triton_kernels.py
        part "other tests" 90 "${pytest[@]}" "${others[@]}"
    fi
else
    skip tests "pytest or hypothesis is not installed"
fi

kernels='
import torch
from benchmarks.cases import with_gradient
from benchmarks.scene import QUICK, make_scene
from global_kd import PAPER, RobustDistillLoss

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
scene = make_scene(QUICK, device)
loss = RobustDistillLoss(scene.strides, **PAPER)
values = with_gradient(lambda: list(loss(bank=scene.bank, **scene.inputs()).values()), scene.leaves())()
assert all(x.isfinite().all() for x in values)
print("a step of every kernel:", [round(float(x), 4) for x in values[:4]])
'
if command -v compute-sanitizer >/dev/null && ((!dry)); then
    # torch keeps freed memory to itself; the tool sees every allocation without that.
    for tool in memcheck racecheck; do
        part "compute-sanitizer $tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
            --tool "$tool" --error-exitcode 9 "$python" -c "$kernels"
    done
else
    ((dry)) && why="needs a GPU" || why="it is not installed"
    skip compute-sanitizer "$why"
    part "kernels" 60 "$python" -c "$kernels"
fi

measure scaling 120
measure "ops bfloat16" 90 --dtype bfloat16 --no-compile
if "$python" -c 'import matplotlib' 2>/dev/null; then
    cp docs/benchmarks.md "$scratch/benchmarks.md"
    part report 60 "$python" -m benchmarks report --results "$out" --page "$scratch/benchmarks.md"
else
    skip report "matplotlib is not installed"
fi

printf '\n==> %s\n' "$( ((failed)) && printf 'something failed' || printf 'all passed')"
printf '%s\n' "${summary[@]}"
printf '%d s in all\n' "$SECONDS"
exit "$failed"
