#!/bin/bash
# Rendered by `mmfree launch render tpu-vm`. Usage: SCRIPT create|setup|train|logs|stop|delete
set -euo pipefail

NAME=@{name}
WHERE=(--project=@{project} --zone=@{zone})

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"; }

case "${1:-}" in
create)
  gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" \
    --accelerator-type=@{accelerator_type} --version=@{runtime_version}
  ;;
setup) # Python packages, and the file system that holds data and runs, on every host.
  on_all @{setup_command}
  ;;
train) # Goes on in the background on every host; run it again to resume.
  on_all @{train_command}
  ;;
logs)
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=0 --command='tail -n 100 -F mmfree.log'
  ;;
stop) # Every process saves the same step and leaves.
  on_all 'kill -TERM "$(cat mmfree.pid)"'
  ;;
delete)
  gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}"
  ;;
*)
  echo "usage: $0 create|setup|train|logs|stop|delete" >&2
  exit 2
  ;;
esac
