#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than nine minutes and without network:
#
#   benchmarks/gpu_check.sh [--dry-run] [WHEELS]
#
# builds the compiled parts in place, runs the operators' tests on the GPU, the benchmarks and
# compute-sanitizer. Needs a CUDA build of torch >= 2.11, nvcc of the same major version, setuptools
# >= 77, pybind11, ninja, tqdm, pytest, hypothesis, jaxtyping and mpmath; not SAELens.
#
#   OUT      folder for gpu-check.log, summary.json and benchmarks-cuda.json (build/gpu-check)
#   WHEELS   folder of wheels to use on top of what is installed (also the argument)
#   PYTHON   interpreter                                         (python3)
#   SECONDS_IN_ALL   time for all steps                          (520)
#   SAELENS_CERTIFY_COMMIT   what the results name as their commit, where git cannot tell
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
# What a command prints may be in no encoding at all once it is cut short.
export PYTHONIOENCODING=utf-8:replace
# The numbers compared are those of the CPU operators: the same on every machine, at any speed.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# An image may set these: they would make float32 products coarser than torch says, change what is built,
# or choose other instructions.
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE NVIDIA_TF32_OVERRIDE TORCH_CUDA_ARCH_LIST
unset SAELENS_CERTIFY_NO_EXTENSION SAELENS_CERTIFY_ISA

# The benchmarks are what nothing else can give: the steps before them leave them this time.
FOR_BENCHMARKS=$((SECONDS_IN_ALL * 6 / 13))
KEPT=0

# step NAME BUDGET COMMAND...: run it within its budget and what is left of the whole time. Its status.
step() {
  local name="$1" budget="$2" left start status outcome
  shift 2
  left=$((SECONDS_IN_ALL - KEPT - SECONDS))
  if ((left < 10)); then
    echo "$name|left out|0|no time left" >>"$TABLE"
    return 1
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
  last="$(grep -av '^[[:space:]]*$' "$OUT/.output" | tail -n 1 | tr -d '|' | cut -c1-160)"
  echo "$name|$outcome|$((SECONDS - start))|$last" >>"$TABLE"
  return "$status"
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
import setuptools
print("setuptools", setuptools.__version__)
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"setuptools {setuptools.__version__} cannot read pyproject.toml: put a wheel of "
             "setuptools >= 77 among WHEELS")
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

# planted_faults NVCC SANITIZER OPTIONS...: a tool that does not report a fault put there on purpose has
# checked nothing, and one that reports an error where there is none says nothing either.
planted_faults() {
  local nvcc="$1" sanitizer="$2" tool fault wanted status result=0
  shift 2
  cat >"$OUT/.planted.cu" <<'CU'
namespace saelens_certify {
__global__ void race(int* out) {
  __shared__ int slot[64];
  slot[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = slot[63 - threadIdx.x];
}
__global__ void overrun(int* out) { out[threadIdx.x + 64] = 1; }
}  // namespace saelens_certify
int main(int argc, char** argv) {
  int* out;
  if (argc != 2 || cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 3;
  if (argv[1][0] == 'r') saelens_certify::race<<<1, 64>>>(out);
  else saelens_certify::overrun<<<1, 64>>>(out);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 4;
}
CU
  "$nvcc" -arch=native -o "$OUT/.planted" "$OUT/.planted.cu" || return
  while read -r tool fault wanted; do
    "$sanitizer" --tool "$tool" "$@" "$OUT/.planted" "$fault" </dev/null
    status=$?
    echo "$tool on a planted $fault: status $status, expected $wanted"
    [[ $status == "$wanted" ]] || result=1
  done <<'CASES'
racecheck race 99
memcheck overrun 99
memcheck race 0
CASES
  return "$result"
}

export -f environment build planted_faults
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

if ((HAVE_GPU)); then
  KEPT=$FOR_BENCHMARKS
  # One architecture is half the compiler's work.
  TORCH_CUDA_ARCH_LIST="$("$PYTHON" -c \
    'import torch; print("%d.%d" % torch.cuda.get_device_capability())')"
  export TORCH_CUDA_ARCH_LIST
fi
step environment 30 bash -c environment
step build 240 bash -c build
BUILT=$?
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
OPS=("tests/ops on the CPU" 100 "${TESTS[@]}" "${OPS_TESTS[@]}" "${SPREAD[@]}")
ON_GPU=("opcheck on the GPU" "tests/cuda on the GPU" benchmarks "sanitizers see planted faults"
  racecheck memcheck)
if ((HAVE_GPU && BUILT == 0)); then
  SANITIZER="$(find_tool compute-sanitizer)"
  NVCC="$(find_tool nvcc)"
  ON_DEVICE=("${TESTS[@]}" --device cuda)
  step "opcheck on the GPU" 60 "${ON_DEVICE[@]}" tests/cuda/test_cuda_registration.py
  # The tests of the emulation itself have no business on a device.
  step "tests/cuda on the GPU" 150 "${ON_DEVICE[@]}" tests/cuda \
    --ignore=tests/cuda/test_cuda_shim.py "${SPREAD[@]}"
  KEPT=0
  step benchmarks "$FOR_BENCHMARKS" "$PYTHON" -m benchmarks cuda --json "$OUT/benchmarks-cuda.json"
  if [[ -n "$SANITIZER" ]]; then
    # Only this package's kernels: those of torch and cuBLAS would take the whole time. And no errors of
    # CUDA's own functions: torch asks on purpose for what may not be there, and the operators check theirs.
    SANITIZED=(--kernel-name kns=saelens_certify --report-api-errors no --error-exitcode 99)
    CALLS=("${ON_DEVICE[@]}" tests/cuda/test_cuda_registration.py -k "every_operator or larger")
    step "sanitizers see planted faults" 60 bash -c 'planted_faults "$@"' bash \
      "$NVCC" "$SANITIZER" "${SANITIZED[@]}"
    step racecheck 90 "$SANITIZER" --tool racecheck --racecheck-report all "${SANITIZED[@]}" \
      "${CALLS[@]}"
    # Without torch's pool every tensor is an allocation of its own, with checked ends.
    step memcheck 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool memcheck \
      "${SANITIZED[@]}" "${CALLS[@]}"
  else
    for name in "${ON_GPU[@]:3}"; do
      leave_out "$name" "compute-sanitizer is neither on PATH nor in the CUDA toolkit"
    done
  fi
  # Last, as these run wherever there is a CPU.
  step "${OPS[@]}"
else
  KEPT=0
  # Without the CUDA operators torch would be tested and measured against itself.
  WHY="no GPU"
  ((HAVE_GPU)) && WHY="the build did not pass"
  ((HAVE_GPU)) || step "tests/cuda emulated" 150 "${TESTS[@]}" tests/cuda "${SPREAD[@]}"
  step "${OPS[@]}"
  for name in "${ON_GPU[@]}"; do
    leave_out "$name" "$WHY"
  done
fi

"$PYTHON" - "$TABLE" "$OUT/summary.json" "$SECONDS" <<'PY'
import json, sys
import torch

table, path, seconds = sys.argv[1:]
rows = [line.rstrip("\n").split("|", 3) for line in open(table, encoding="utf-8", errors="replace")]
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
rm -rf "$OUT/.output" "$TABLE" "$OUT/.planted" "$OUT/.planted.cu" "$OUT/.site"
exit $STATUS
