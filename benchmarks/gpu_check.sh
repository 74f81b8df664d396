#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than nine minutes and without network:
#
#   benchmarks/gpu_check.sh [--dry-run] [WHEELS]
#
# builds the compiled parts in place, runs the operators' tests on the GPU, compute-sanitizer and the
# benchmarks. Needs a CUDA build of torch >= 2.11, nvcc of the same major version, pytest, hypothesis,
# jaxtyping and mpmath; not SAELens.
#
#   OUT      folder for gpu-check.log, summary.json and benchmarks-cuda.json (build/gpu-check)
#   WHEELS   folder of wheels to use on top of what is installed (also the argument)
#   PYTHON   interpreter                                         (python3)
#   SECONDS_IN_ALL   time for all steps                          (520)
#
# A step that fails or runs out of time does not stop those after it. The exit status is 0 if every
# step passed. Without a GPU nothing can pass; --dry-run then does what is possible all the same: build
# for CUDA, and the tests on the emulated kernels.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu-check}"
SECONDS_IN_ALL="${SECONDS_IN_ALL:-520}"
DRY=0
WHEELS="${WHEELS:-}"
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY=1 ;;
    -*) echo "unknown option $argument; see the top of $0" >&2; exit 2 ;;
    *) WHEELS="$argument" ;;
  esac
done
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
LOG="$OUT/gpu-check.log"
TABLE="$OUT/.steps"
: >"$LOG"
: >"$TABLE"
SECONDS=0

export PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# The numbers compared are those of the CPU operators: the same on every machine, at any speed.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# step NAME BUDGET COMMAND...: run it within its budget and what is left of the whole time.
step() {
  local name="$1" budget="$2" left start status outcome
  shift 2
  left=$((SECONDS_IN_ALL - SECONDS))
  if ((left < 10)); then
    echo "$name|left out|0|no time left" >>"$TABLE"
    return
  fi
  ((budget > left)) && budget=$left
  printf '\n##### %s (%s s at most)\n' "$name" "$budget" | tee -a "$LOG"
  start=$SECONDS
  timeout --kill-after=5 "$budget" "$@" >"$OUT/.output" 2>&1
  status=$?
  cat "$OUT/.output" >>"$LOG"
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="timed out" ;;
    *) outcome=failed ;;
  esac
  if [[ $outcome == passed ]]; then tail -n 3 "$OUT/.output"; else tail -n 25 "$OUT/.output"; fi
  local last
  last="$(grep -v '^[[:space:]]*$' "$OUT/.output" | tail -n 1 | tr -d '|' | cut -c1-160)"
  echo "$name|$outcome|$((SECONDS - start))|$last" >>"$TABLE"
}

leave_out() { echo "$1|left out|0|$2" >>"$TABLE"; }

# find_tool NAME: on PATH or beside nvcc.
find_tool() {
  local folder
  command -v "$1" && return
  for folder in "${CUDA_HOME:-/nowhere}" /usr/local/cuda; do
    [[ -x "$folder/bin/$1" ]] && echo "$folder/bin/$1" && return
  done
  return 1
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv || true
  "$PYTHON" - <<'PY'
import platform, sys, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
sys.path.insert(0, "build_support")
from cuda_toolkit import find_toolkit
print(find_toolkit())
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
p = torch.cuda.get_device_properties(0)
print(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, "multiprocessors", p.total_memory)
PY
}

build() {
  rm -f saelens_certify/_C.*.so saelens_certify/_cuda.*.so
  SAELENS_CERTIFY_CUDA=1 SAELENS_CERTIFY_REQUIRE_EXTENSION=1 \
    "$PYTHON" setup.py build_ext --inplace || return
  "$PYTHON" - "$DRY" <<'PY'
import json, sys
from saelens_certify import build_info, ops
info = build_info()
print(json.dumps({k: v for k, v in info.items() if k != "build"}))
sys.exit(0 if info["cuda_operators"] or sys.argv[1] == "1" else info["cuda_reason"])
PY
}

# A race put there on purpose: a racecheck that does not report it has checked nothing.
planted_race() {
  cat >"$OUT/.race.cu" <<'CU'
namespace saelens_certify {
__global__ void planted(int* out) {
  __shared__ int slot[64];
  slot[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = slot[63 - threadIdx.x];
}
}  // namespace saelens_certify
int main() {
  int* out;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 3;
  saelens_certify::planted<<<1, 64>>>(out);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 4;
}
CU
  "$1" -arch=native -o "$OUT/.race" "$OUT/.race.cu" || return
  "$2" --tool racecheck --kernel-name kns=saelens_certify --error-exitcode 99 "$OUT/.race"
  local status=$?
  echo "racecheck on the planted race: status $status, expected 99"
  [[ $status == 99 ]]
}
export -f environment build planted_race
export PYTHON OUT DRY

if [[ -n "$WHEELS" ]]; then
  step wheels 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$OUT/.site" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$OUT/.site"
fi

HAVE_GPU=0
"$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null && HAVE_GPU=1
if ((HAVE_GPU == 0)); then
  echo "no GPU: $("$PYTHON" -c 'import torch; print("torch", torch.__version__, "sees none")' 2>&1 | tail -n 1)"
  if ((DRY == 0)); then
    echo "nothing was checked; --dry-run builds for CUDA and tests the emulated kernels" >&2
    exit 2
  fi
fi

step environment 30 bash -c environment
step build 240 bash -c build
TESTS=("$PYTHON" -m pytest -q -p no:cacheprovider)
OPS_TESTS=(tests/ops)
if ! "$PYTHON" -c "import sae_lens" 2>/dev/null; then
  while read -r file; do
    echo "no SAELens: without $file"
    OPS_TESTS+=("--ignore=$file")
  done < <(grep -lE '^(from|import) (sae_lens|transformer_lens)' tests/ops/*.py)
fi
# Several processes at a time where pytest-xdist is installed.
SPREAD=()
"$PYTHON" -c "import xdist" 2>/dev/null && SPREAD=(-n 6)
if ((HAVE_GPU)); then
  SANITIZER="$(find_tool compute-sanitizer)"
  NVCC="$(find_tool nvcc)"
  CALLS=("${TESTS[@]}" --device cuda tests/cuda/test_cuda_registration.py -k every_operator)
  step "opcheck on the GPU" 60 "${TESTS[@]}" --device cuda tests/cuda/test_cuda_registration.py
  step "tests/cuda on the GPU" 150 "${TESTS[@]}" --device cuda tests/cuda "${SPREAD[@]}"
  if [[ -n "$SANITIZER" ]]; then
    # Without torch's pool every tensor is an allocation of its own, with checked ends.
    step memcheck 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool memcheck \
      --error-exitcode 99 "${CALLS[@]}"
    step "racecheck sees a planted race" 40 bash -c 'planted_race "$0" "$1"' "$NVCC" "$SANITIZER"
    step racecheck 90 "$SANITIZER" --tool racecheck --racecheck-report all \
      --kernel-name kns=saelens_certify --error-exitcode 99 "${CALLS[@]}"
  else
    leave_out memcheck "compute-sanitizer is neither on PATH nor in the CUDA toolkit"
    leave_out racecheck "compute-sanitizer is neither on PATH nor in the CUDA toolkit"
  fi
  step "tests/ops on the CPU" 90 "${TESTS[@]}" "${OPS_TESTS[@]}" "${SPREAD[@]}"
  step benchmarks 240 "$PYTHON" -m benchmarks cuda --json "$OUT/benchmarks-cuda.json"
else
  step "tests/cuda emulated" 150 "${TESTS[@]}" tests/cuda
  step "tests/ops on the CPU" 100 "${TESTS[@]}" "${OPS_TESTS[@]}" "${SPREAD[@]}"
  for name in "opcheck on the GPU" "tests/cuda on the GPU" memcheck racecheck benchmarks; do
    leave_out "$name" "no GPU"
  done
fi

"$PYTHON" - "$TABLE" "$OUT/summary.json" "$SECONDS" <<'PY'
import json, sys
import torch

table, path, seconds = sys.argv[1:]
rows = [line.rstrip("\n").split("|", 3) for line in open(table, encoding="utf-8")]
steps = [dict(zip(("step", "outcome", "seconds", "last_line"), row)) for row in rows]
for entry in steps:
    entry["seconds"] = int(entry["seconds"])
passed = bool(steps) and all(entry["outcome"] == "passed" for entry in steps)
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
summary = {
    "passed": passed,
    "device": device,
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "seconds": int(seconds),
    "steps": steps,
}
with open(path, "w", encoding="utf-8") as file:
    json.dump(summary, file, indent=2)
print()
for entry in steps:
    print(f"{entry['step']:32} {entry['outcome']:10} {entry['seconds']:4d} s  {entry['last_line'][:90]}")
print(f"{'passed' if passed else 'NOT PASSED'} on {device or 'no GPU'} after {seconds} s")
sys.exit(0 if passed else 1)
PY
STATUS=$?
rm -rf "$OUT/.output" "$TABLE" "$OUT/.race" "$OUT/.race.cu" "$OUT/.site"
exit $STATUS
