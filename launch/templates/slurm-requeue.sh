# A restart mends the end of a process that was killed or lost, of a host, of the time. It does not
# mend success (0), what somebody must put right (2), a command that is not there (126, 127), nor
# somebody's Ctrl-C or hang-up (129, 130). A cancelled job is no longer running.
finish() { # EXIT_CODE
  local code=$1 failures="$SLURM_JOB_NAME-$SLURM_JOB_ID.failures"
  case $code in
  0 | 2 | 126 | 127 | 129 | 130)
    rm -f "$failures"
    exit "$code"
    ;;
  esac
  if ! scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    exit "$code"
  fi
  if [ "$code" -ne 143 ] && [ "$SECONDS" -lt 600 ]; then # 143: told to stop, and saved
    echo "exit code $code after $SECONDS s" >> "$failures"
  else
    rm -f "$failures"
  fi
  if [ -f "$failures" ] && [ "$(wc -l < "$failures")" -ge @{failures} ]; then
    echo "job: failed @{failures} times in a row, each soon after its start: not requeued" >&2
    rm -f "$failures"
  elif [ "${SLURM_RESTART_COUNT:-0}" -ge @{restarts} ]; then
    echo "job: restarted @{restarts} times: not requeued" >&2
  else
    echo "job: exit code $code after $SECONDS s: requeued" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
