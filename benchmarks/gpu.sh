#!/usr/bin/env bash
# On a machine with a CUDA GPU: build, test, check memory accesses, benchmark, in under ten minutes. Needs torch with CUDA, pytest and
# nvcc; installs nothing, and leaves out peers that are not installed.
# usage: benchmarks/gpu.sh [--quick] [--no-build] [BENCHMARK...]
#   --quick     two minutes, fewer cases
#   --no-build  the libraries that are in flowkernels/ already, built elsewhere for this GPU (CONTRIBUTING.md)
# Results go to $OUT, or to benchmarks/results: gpu.jsonl, and what each step printed.
set -uo pipefail
cd "$(dirname "$0")/.."

py="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
quick=""
build=1
total=590
while [[ "${1:-}" == --* ]]; do
  case "$1" in
    --quick) quick=--quick total=120 ;;
    --no-build) build=0 ;;
    *) echo "gpu.sh: no option $1"; exit 2 ;;
  esac
  shift
done

"$py" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
  echo "gpu.sh: torch sees no CUDA GPU here ($("$py" -c 'import torch; print("torch", torch.__version__)' 2>/dev/null || echo "$py has no torch")); nothing was run"
  exit 1
}

mkdir -p "$out"
table="$out/gpu_steps.txt"
: >"$table"
failed=0

# step NAME SECONDS COMMAND...: runs it for so long at most, keeps its output in $out/NAME.txt, and adds a line to the table.
step() {
  local name="$1" limit="$2" left=$((total - SECONDS)) start=$SECONDS rc=0
  shift 2
  if [ "$left" -lt 5 ]; then
    note "$name" 0 "left out: the $total seconds are over"
    return
  fi
  if [ "$limit" -gt "$left" ]; then limit="$left"; fi
  echo "== $name: $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt" || rc=$?
  if [ "$rc" -eq 5 ] && [ "$name" != build ]; then rc=0; fi  # pytest: no test with the marker
  if [ "$rc" -eq 124 ]; then
    note "$name" "$rc" "stopped after $limit s"
  else
    note "$name" "$rc" "$((SECONDS - start)) s, $(tail -n 1 "$out/$name.txt" | cut -c 1-90)"
  fi
}

note() {
  local outcome="ok"
  if [ "$2" -ne 0 ]; then
    outcome="FAILED ($2)"
    failed=1
  fi
  printf '%-26s %-13s %s\n' "$1" "$outcome" "$3" >>"$table"
}

arch="$("$py" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')"
[ "$build" -eq 0 ] || step build 240 env FORCE_CUDA=1 FLOWKERNELS_TESTS="$([ -n "$quick" ] || echo 1)" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$arch}" "$py" setup.py -q build_ext --inplace
step info 30 "$py" -m flowkernels info
[ -n "$quick" ] || step check 90 "$py" -m flowkernels check --device cuda
# most of a test is compiling, which several processes do at once where pytest-xdist is there
jobs=$(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))
"$py" -c 'import xdist' 2>/dev/null && parallel="-n $jobs --dist worksteal" || parallel=""
step tests 150 "$py" -m pytest -v --tb=short $parallel -m gpu -k "$([ -n "$quick" ] && echo sanitizer || echo gpu)" python_tests

# Small cases. Every allocation of its own, or an access beyond a tensor stays inside torch's block. Races and barriers are looked for in our
# own CUDA C++ alone: Triton's compiler places those of its kernels.
compiled="sanitizer and (autoregressive or training or slogdet)"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    step "$tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 99 \
      "$py" -m pytest -q -m "gpu and not slow" -k "$([ -z "$quick" ] && [ "$tool" = memcheck ] && echo sanitizer || echo "$compiled")" python_tests
  done
else
  note sanitizer 0 "left out: compute-sanitizer is not installed"
fi

# the most wanted first, as the clock may stop the last
benchmarks=("$@")
if [ "${#benchmarks[@]}" -eq 0 ]; then
  benchmarks=(limits maf autoregressive sampling gradient training masked_linear coupling lu flows conv1x1 glow_step glow tasks)
  if [ -n "$quick" ]; then benchmarks=(limits maf autoregressive); fi
fi
for name in "${benchmarks[@]}"; do
  step "bench_$name" 90 "$py" -m benchmarks "$name" --device cuda ${quick:+"$quick"} --seconds 0.25 --out "$out/gpu.jsonl"
  if [ -s "$out/gpu.jsonl.unfinished" ]; then  # the clock stopped it: the cases that it finished count
    cat "$out/gpu.jsonl.unfinished" >>"$out/gpu.jsonl"
    rm "$out/gpu.jsonl.unfinished"
  fi
done

echo
if [ -s "$out/gpu.jsonl" ]; then "$py" -m benchmarks --show --out "$out/gpu.jsonl" | grep -E '^==|^targets|^  .*(must|aim|MISSED|wrong|not measured)$' | grep -v -- '->'; fi
echo
# by their lines, as a run that the clock stopped has no summary
grep -aoE '(FAILED|ERROR) python_tests/[^ ]+' "$out/tests.txt" | sort -u | head -n 40
cat "$table"
exit "$failed"
