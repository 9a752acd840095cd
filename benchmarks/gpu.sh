#!/usr/bin/env bash
# On a machine with a CUDA GPU: build, test, check memory accesses, benchmark. Needs torch with CUDA, pytest and nvcc; installs nothing.
# usage: benchmarks/gpu.sh [ARGUMENTS OF python -m benchmarks]
# Results go to $OUT, or to benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."

py="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
mkdir -p "$out"
table="$out/gpu_steps.txt"
: >"$table"
failed=0

# step NAME COMMAND...: runs it, keeps its output in $out/NAME.txt, and adds a line to the table.
step() {
  local name="$1" start=$SECONDS rc=0
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.txt" || rc=$?
  note "$name" "$rc" "$((SECONDS - start)) s, $(tail -n 1 "$out/$name.txt" | cut -c 1-100)"
}

note() {
  local outcome="ok"
  if [ "$2" -ne 0 ]; then
    outcome="FAILED ($2)"
    failed=1
  fi
  printf '%-12s %-12s %s\n' "$1" "$outcome" "$3" >>"$table"
}

tests() {  # no test with the marker is not a failure
  "$py" -m pytest -q -m gpu python_tests "$@" || [ $? -eq 5 ]
}

sanitizer() {  # every allocation of its own, or an access beyond a tensor stays inside torch's block
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 99 \
    "$py" -m pytest -q -m "gpu and not slow" -k "sanitizer or beyond_a_tile or equals_float64" python_tests || [ $? -eq 5 ]
}

"$py" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA GPU here"; exit 1; }

arch="$("$py" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')"
if compgen -G "csrc/cuda/*.cu" >/dev/null; then export FORCE_CUDA=1; fi
step build env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" "$py" setup.py -q build_ext --inplace
step info "$py" -m flowkernels info
step tests tests
if command -v compute-sanitizer >/dev/null; then
  step sanitizer sanitizer
else
  note sanitizer 0 "left out: compute-sanitizer is not installed"
fi
step benchmarks "$py" -m benchmarks --device cuda --out "$out/gpu.jsonl" "$@"

echo
cat "$table"
exit "$failed"
