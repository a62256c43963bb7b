#!/bin/bash
# What a hold of a machine without a network needs, made where there is one, in parcels small
# enough to travel with one call each; `hold.sh receive` takes them there.
#   bash experiments/study/carry.sh make TEXT   packages and prepared data; resumes what it began
#   bash experiments/study/carry.sh tasks       the paper's six tasks and lm-eval, 8 MB
#   bash experiments/study/carry.sh load N      parcel N, in the place of another: .carry/
# Parcels from 0 on: the packages, with results that go on, then the data. TEXT is the folder of
# classic_books.jsonl.zst and english_mixed-*.jsonl.zst. Run from the repository's root. CARRY names
# the folder of what is made, PYTHON an interpreter that has the project, TARGET one of the
# machine's version of Python, PARCEL the largest size of one: the repository travels with each.
set -eo pipefail
CARRY=${CARRY:-/tmp/carry}
PYTHON=${PYTHON:-python3}
TARGET=${TARGET:-$PYTHON}
PARCEL=${PARCEL:-24M}
SOURCES="classic_books more_books gutenberg novels old_spelling modern_prose abstracts law proposals manuals"
# The machine brings JAX with what it needs; pyarrow is large and reads Parquet alone. It brings
# transformers too, which refuses a newer huggingface_hub than its own, and what both rest on.
LEFT_OUT="jax jaxlib numpy scipy ml_dtypes opt_einsum pyarrow huggingface_hub hf_xet tokenizers
  safetensors sentencepiece filelock fsspec httpx2 httpcore2 truststore"
export JAX_PLATFORMS=cpu

packages() {
  test ! -f "$CARRY/site.tar.xz" || return 0
  rm -rf "$CARRY/site"
  "$TARGET" -m pip install -q --no-compile --only-binary :all: --target "$CARRY/site" .
  local name
  for name in $LEFT_OUT; do
    rm -rf "$CARRY/site/$name" "$CARRY/site/$name.libs" "$CARRY/site/$name"-*.dist-info
  done
  # Of the project only its commands' list: the code is the repository's.
  rm -rf "$CARRY/site/mmfree_jax" "$CARRY/site/bin"
  find "$CARRY/site" -type d -name tests -prune -exec rm -rf {} +
  tar c -C "$CARRY" site | xz -T0 -8 > "$CARRY/site.new"
  mv "$CARRY/site.new" "$CARRY/site.tar.xz"
}

data() { # TEXT
  test ! -f "$CARRY/data.tar.xz" || return 0
  if [ ! -d "$CARRY/text" ]; then
    rm -rf "$CARRY/text.new"
    "$PYTHON" -m mmfree_jax.experiments.study.corpus --text "$1" --out "$CARRY/text.new" --level 1
    mv "$CARRY/text.new" "$CARRY/text"
  fi
  local name
  for name in $SOURCES; do
    "$PYTHON" -m mmfree_jax data prepare --input "$CARRY/text/$name-*.jsonl.zst" \
      --tokenizer experiments/results/study2/tokenizer --heldout-fraction 0.03 \
      --out "$CARRY/data/study/$name"
  done
  "$PYTHON" -m mmfree_jax.experiments.study.check_data "$CARRY/data/study"
  tar c -C "$CARRY" data | xz -T0 -6 > "$CARRY/data.new"
  mv "$CARRY/data.new" "$CARRY/data.tar.xz"
}

# What lm-eval needs and the machine has not: it has pandas, pyarrow, scikit-learn, sacrebleu.
HARNESS="lm-eval datasets evaluate dill multiprocess pytablewriter DataProperty tabledata typepy
  mbstrdecoder pathvalidate tcolorpy chardet rouge-score nltk sqlitedict word2number more-itertools"

tasks() {
  mkdir -p "$CARRY/tasks-parcel/site"
  "$PYTHON" -m mmfree_jax eval fetch-tasks --tasks-dir "$CARRY/tasks-parcel/tasks"
  # All but chardet are pure Python.
  # shellcheck disable=SC2086
  "$TARGET" -m pip install -q --no-compile --no-deps --upgrade --target "$CARRY/tasks-parcel/site" \
    $HARNESS
  rm -rf "$CARRY/tasks-parcel/site/bin"
  tar c -C "$CARRY/tasks-parcel" site tasks | xz -T0 -8 > "$CARRY/tasks.new"
  mv "$CARRY/tasks.new" "$CARRY/tasks.tar.xz"
  ls -la "$CARRY/tasks.tar.xz"
}

make() { # TEXT
  mkdir -p "$CARRY"
  packages
  data "$1"
  rm -f "$CARRY"/packages-* "$CARRY"/part-*
  split -b "$PARCEL" -d "$CARRY/site.tar.xz" "$CARRY/packages-"
  split -b "$PARCEL" -d "$CARRY/data.tar.xz" "$CARRY/part-"
  ls -la "$CARRY"
}

load() { # N
  local packages=("$CARRY"/packages-*)
  local parcels=("${packages[@]}" "$CARRY"/part-*)
  rm -rf .carry
  mkdir .carry
  git rev-parse HEAD > .carry/commit
  echo "${#packages[@]}" > .carry/packages
  if [ "$1" = tasks ]; then
    cp "$CARRY/tasks.tar.xz" .carry/
  else
    cp "${parcels[$1]}" .carry/
  fi
  if [ "$1" = 0 ] && [ -f "$CARRY/state.tar.xz" ]; then cp "$CARRY/state.tar.xz" .carry/; fi
  ls -la .carry
  echo "parcel $1 of 0 to $((${#parcels[@]} - 1))"
}

"$@"
