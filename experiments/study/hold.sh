#!/bin/bash
# One hold of a machine, in commands of at most ten minutes each (docs/scaling-study-plan.md).
# What travels is made and loaded by carry.sh beside this.
#   bash experiments/study/hold.sh receive                 what travelled in .carry/ is moved aside
#   bash experiments/study/hold.sh data                    the data from their parts, compared
#   bash experiments/study/hold.sh sweep NAME MINUTES ...  mmfree sweep run on configs/NAME.yaml
#   bash experiments/study/hold.sh rates                   report of the rates, the rule put in place
#   bash experiments/study/hold.sh model NAME PRESET RATE  a run of configs/model-61M.yaml; goes on too
#   bash experiments/study/hold.sh measure NAME TWIN ...   all that is measured of both; goes on too
#   bash experiments/study/hold.sh collect                 all that leaves, in $OUT: 8 files of 16 MiB
# Run from the repository's root. HOLD names the folder that is kept between the commands, PYTHON
# the interpreter. The same `sweep` command goes on where the one before was cut off.
set -eo pipefail
REPO=$PWD
HOLD=${HOLD:-/tmp/hold}
PYTHON=${PYTHON:-python3}
mkdir -p "$HOLD"
if [ -d "$HOLD/site" ]; then
  export PYTHONPATH=$HOLD/site:$REPO
else
  export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
fi
test ! -f "$HOLD/commit" || MMFREE_CODE_VERSION=$(cat "$HOLD/commit")
export MMFREE_CODE_VERSION PYTHONUNBUFFERED=1
read -ra SOURCES <<< "classic_books more_books gutenberg novels old_spelling modern_prose abstracts law proposals manuals"
# Paths in the configs are relative to the folder in which sweeps run.
mkdir -p "$HOLD/experiments/results/study2"
ln -sfn "$REPO/experiments/configs" "$HOLD/experiments/configs"
tar c -C "$REPO/experiments/results/study2" . |
  tar x --skip-old-files -C "$HOLD/experiments/results/study2"

receive() {
  mkdir -p "$HOLD/parts"
  test ! -f .carry/tasks.tar.xz || tar xJf .carry/tasks.tar.xz -C "$HOLD"
  test ! -f .carry/commit || cp .carry/commit "$HOLD/commit"
  local parcel
  for parcel in .carry/packages-* .carry/part-*; do
    test ! -f "$parcel" || mv "$parcel" "$HOLD/parts/"
  done
  # Packages are unpacked as soon as all of their parcels are here.
  local there=("$HOLD"/parts/packages-*)
  if [ -f "${there[0]}" ] && [ "${#there[@]}" = "$(cat .carry/packages)" ]; then
    cat "${there[@]}" | tar xJ -C "$HOLD"
    rm "${there[@]}"
  fi
  # Tables of earlier holds: their runs are not made again.
  test ! -f .carry/state.tar.xz || tar xJf .carry/state.tar.xz -C "$HOLD"
  ls "$HOLD" "$HOLD/parts"
}

data() {
  cd "$HOLD"
  cat parts/part-* | tar xJ
  "$PYTHON" -m mmfree_jax.experiments.study.check_data data/study
}

sweep() {
  cd "$HOLD"
  local name=$1 minutes=$2
  shift 2
  "$PYTHON" -m mmfree_jax sweep run "experiments/configs/$name.yaml" --max-minutes "$minutes" "$@"
}

rates() {
  cd "$HOLD"
  "$PYTHON" -m mmfree_jax sweep report experiments/configs/study2-rates.yaml --no-plot "$@"
  cp sweeps/study2-rates/rate_rule.json experiments/results/study2/rate_rule.json
}

model() {
  cd "$HOLD"
  "$PYTHON" -m mmfree_jax train --preset "$2" --config experiments/configs/model-61M.yaml \
    --run-dir "runs/$1" --optimizer.learning-rate "$3"
}

# Packing, held-out losses, agreement, needle, tasks, samples of runs/NAME and its twin: into after/.
measure() { # NAME TWIN [--minutes M] [--jobs N] ...
  cd "$HOLD"
  local name=$1 twin=$2
  shift 2
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOLD/compiled}
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.1}
  "$PYTHON" -m mmfree_jax.experiments.study.measure_model --run "runs/$name" --twin "runs/$twin" "$@"
}

collect() {
  cd "$HOLD"
  local sweep
  mkdir -p sweeps runs
  for sweep in sweeps/study2-rates sweeps/study2; do
    test -f "$sweep/results.csv" || continue
    "$PYTHON" -m mmfree_jax.experiments.study.document_losses "$sweep" \
      --data "${SOURCES[@]/#/data/study/}" --out "$sweep/documents.npz"
  done
  # What goes on elsewhere: tables, failures, the rule. Kept small, it also travels to the next hold.
  find sweeps experiments/results/study2 \( -name results.csv -o -name 'failures' -o \
    -name 'rate_rule.json' -o -name 'documents.npz' \) -print > state.txt
  test ! -s state.txt || tar cJf "$OUT/state.tar.xz" -T state.txt
  # What is looked at: metrics, summaries, settings, ends of logs.
  find sweeps runs -path '*/cache' -prune -o \( -name metrics.jsonl -o -name summary.json -o -name 'config.yaml' \
    -o -name '*.log' -o -name 'rates.csv' -o -name 'best.csv' \) -print > records.txt
  tar c -T records.txt | xz -T0 -6 | split -b 15M - "$OUT/records.tar.xz."
  # Exports can be made again, and are large.
  test ! -d after || tar c --exclude after/scratch after | split -b 15M - "$OUT/after.tar."
  ls -la "$OUT"
}

"$@"
