#!/usr/bin/env bash
# Builds fastm3ae, runs the tests that need a GPU and every benchmark, and leaves the figures in a folder:
#
#     benchmarks/gpu_suite.sh [FOLDER [ops | steps]]    # FOLDER: $OUT, else benchmarks/results/suite
#
# With "ops", all but the benchmarks of whole steps; with "steps", these alone; without, both.
# report.md, results.json, plots.png, history.json (pytest-benchmark), tests.txt and benchmarks.txt come out. On an H200
# ops take less than 9 minutes; steps stop beginning anything new after 140 seconds, which leaves some that compile to
# "python benchmarks/gpu_step.py --check". Without a GPU it does the same at small sizes, with the tests of the kernels in
# place of those that need one. Nothing is downloaded: the packages must be there. A part that fails is said at the end
# and does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-${OUT:-benchmarks/results/suite}}
what=${2:-both}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
python=${PYTHON:-python}
failed=()

part() {  # part NAME LOG COMMAND...: runs it, with its output in the log, too
  local name=$1 log=$2 start=$SECONDS
  shift 2
  echo "== $name"
  if "$@" 2>&1 | tee -a "$folder/$log" | tail -n 25; then :; else failed+=("$name"); fi
  echo "== $name took $((SECONDS - start)) s"
}

rm -f "$folder"/{report.md,results.json,plots.png,history.json,tests.txt,benchmarks.txt}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

part build tests.txt "$python" -m pip install --no-deps --no-build-isolation --quiet -e .
part doctor tests.txt "$python" -m fastm3ae doctor
if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  has_gpu=1 batch_sizes="32 128" mpma_step=""
else
  has_gpu="" batch_sizes="4" mpma_step="--demo"
fi

ops() {
  if [ "$has_gpu" ]; then
    part tests tests.txt env FASTM3AE_REQUIRE_GPU=1 "$python" -m pytest -q -m gpu tests
    sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    for tool in memcheck racecheck; do
      part "compute-sanitizer $tool" tests.txt timeout 90 "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "$python" -m pytest -q -m gpu -k "odd or prime" tests/test_masked_pixel_loss.py \
        tests/test_masked_token_loss.py tests/test_gather_patches.py tests/test_restore_patches.py
    done
  else
    part tests tests.txt "$python" -m pytest -q tests/test_masked_pixel_loss.py tests/test_masked_token_loss.py \
      tests/test_gather_patches.py tests/test_restore_patches.py tests/test_random_patch_order.py
  fi
  for file in benchmarks/bench_*.py; do
    name=$(basename "$file" .py)
    # shellcheck disable=SC2086
    part "$name" benchmarks.txt "$python" "$file" --check --batch-sizes $batch_sizes --json "$work/$name.json"
  done
  part history benchmarks.txt "$python" -m pytest -q benchmarks --benchmark-json="$folder/history.json"
}

steps() {
  part gpu_step benchmarks.txt "$python" benchmarks/gpu_step.py --check --seconds 140 --json "$work/step_m3ae.json"
  # shellcheck disable=SC2086
  part mpma_step benchmarks.txt "$python" benchmarks/mpma_step.py --check $mpma_step --json "$work/step_mpma.json"
}

case $what in
  ops | steps) "$what" ;;
  both) ops; steps ;;
  *) echo "the second argument must be ops or steps, got $what" && exit 2 ;;
esac
part report benchmarks.txt "$python" benchmarks/report.py "$work"
for file in report.md results.json plots.png; do [ -e "$work/$file" ] && cp "$work/$file" "$folder"; done

echo "== in $folder: $(ls "$folder" | tr '\n' ' ')"
if [ ${#failed[@]} -gt 0 ]; then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "== everything passed"
