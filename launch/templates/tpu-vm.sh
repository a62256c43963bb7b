#!/bin/bash
# Rendered by `mmfree launch render tpu-vm`. Usage: SCRIPT create|setup|train|logs|stop|delete|keep
set -euo pipefail

NAME=@{name}
WHERE=(--project=@{project} --zone=@{zone})
SPOT=(@{spot})
QUEUED=@{queued}

on() { gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --command="$2"; }

create() {
  if [ "$QUEUED" = yes ]; then # waits in Google's queue until there are such machines
    gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" --node-id="$NAME" \
      --accelerator-type=@{accelerator_type} --runtime-version=@{runtime_version} "${SPOT[@]}"
  else
    gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" \
      --accelerator-type=@{accelerator_type} --version=@{runtime_version} "${SPOT[@]}"
  fi
}

delete() {
  if [ "$QUEUED" = yes ]; then # with its machines
    gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force "$@"
  else
    gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}" "$@"
  fi
}

state() { # of the machines; nothing where there are none
  if [ "$QUEUED" = yes ]; then
    gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)'
  else
    gcloud compute tpus tpu-vm describe "$NAME" "${WHERE[@]}" --format='value(state)'
  fi
}

# A Python of 3.11 or newer, packages, and the file system of data and runs, on every host.
setup() { on all @{setup_command}; }

# Goes on in the background on every host; again, it resumes.
train() { on all @{train_command}; }

# Every process saves the same step and leaves.
# shellcheck disable=SC2016
stop() { on all 'kill -TERM "$(cat mmfree.pid)"'; }

# new, running, lost (its host was started anew), or the exit code of a run that has ended.
# shellcheck disable=SC2016
status() {
  on 0 'if [ -f mmfree.code ]; then cat mmfree.code
elif [ ! -f mmfree.pid ]; then echo new
elif kill -0 "$(cat mmfree.pid)" 2> /dev/null; then echo running
else echo lost; fi'
}

# Until the run has ended: makes the machines anew when they were taken away, and starts the run
# again, but where somebody must put something right (2), told it to stop, or it fails at once.
keep() {
  local started=0 failures=0 now
  while true; do
    case "$(state 2> /dev/null || true)" in
    ACTIVE | READY)
      now=$(status || echo unreachable)
      case "$now" in
      running | unreachable) ;;
      0 | 2 | 126 | 127 | 129 | 130 | 143) exit "$now" ;;
      new)
        setup
        train
        started=$SECONDS
        ;;
      *)
        if [ $((SECONDS - started)) -lt 600 ]; then failures=$((failures + 1)); else failures=0; fi
        if [ "$failures" -ge 3 ]; then
          echo "failed 3 times in a row, each soon after its start, last with: $now" >&2
          exit 1
        fi
        train
        started=$SECONDS
        ;;
      esac
      ;;
    "") create ;;
    FAILED | SUSPENDED | PREEMPTED | TERMINATED | STOPPED) delete --quiet ;;
    esac
    sleep 60
  done
}

case "${1:-}" in
create) create ;;
setup) setup ;;
train) train ;;
logs) on 0 'tail -n 100 -F mmfree.log' ;;
stop) stop ;;
delete) delete ;;
keep) keep ;;
*)
  echo "usage: $0 create|setup|train|logs|stop|delete|keep" >&2
  exit 2
  ;;
esac
