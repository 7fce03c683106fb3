#!/usr/bin/env bash
# Keep a run going until it is done: make the TPU, install jaxcl, run the command; after a preemption all of it again.
# The run directory is in a bucket, so the command continues where it was saved.
#
#   tpu/babysit.sh [--spot] [--queued] [--delete] [--source SOURCE] [--dry-run] COMMAND [WORDS ...]
#
# Exit status of the command: 0 done; 75 interrupted and saved, it is called again; 2 it cannot be served, which no
# repetition mends; anything else is tried MAX_FAILURES times in a row. Where creation fails (no capacity), MAX_CREATES
# times. Waits double from POLL_SECONDS to ten minutes. --delete: the TPU goes when the run is done or given up; without
# it, it stays and costs. A command without --out gets --out $BUCKET/$NAME.
# Needs PROJECT and ZONE, and BUCKET unless the command has --out gs://.... Reads what create.sh reads, MAX_FAILURES (5),
# MAX_CREATES (50), POLL_SECONDS (30). SOURCE: as for setup.sh.
#
# Example:
#   PROJECT=my-project ZONE=us-west4-a BUCKET=gs://my-bucket/runs tpu/babysit.sh --spot --delete jaxcl run olora_order1

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/common.sh"

remove='' place=''
while [ $# -gt 0 ] && [[ $1 == -* ]]; do
  case $1 in
    --delete) remove=1 ;;
    --source)
      [ $# -gt 1 ] || refuse "--source needs a wheel, a folder or a git URL"
      place=$2
      shift
      ;;
    *) common_flag "$1" ;;
  esac
  shift
done
need PROJECT ZONE
[ $# -gt 0 ] || refuse "no command; for example: tpu/babysit.sh --spot jaxcl run olora_order1"
command=()
kept "$@"
version >/dev/null
export PROJECT ZONE NAME ACCELERATOR BUCKET SPOT QUEUED DRY_RUN POLL_SECONDS

finish() { # with this exit status
  if [ -n "$remove" ]; then
    "$here/delete.sh" --yes
  else
    say "the TPU '$NAME' is still there; tpu/delete.sh deletes it"
  fi
  exit "$1"
}

if [ -n "$DRY_RUN" ]; then
  "$here/create.sh"
  "$here/setup.sh" ${place:+"$place"}
  "$here/run.sh" "${command[@]}"
  say "after exit status 75 the last command again; after a preemption:"
  "$here/delete.sh" --yes
  say "and from the start"
  exit 0
fi

failures=0
failed() { # WHAT STATUS LIMIT: waits longer each time, gives up at the limit
  failures=$((failures + 1))
  say "$1 failed with exit status $2 ($failures of $3 in a row)"
  if [ "$failures" -ge "$3" ]; then
    say "giving up"
    finish "$2"
  fi
  local wait=$((POLL_SECONDS * (1 << (failures < 9 ? failures - 1 : 8))))
  sleep $((wait < 600 ? wait : 600))
}

ready() { [ "$1" = READY ] || [ "$1" = ACTIVE ]; }

installed=
while :; do
  now=$(state)
  code=0
  case $now in
    READY | ACTIVE)
      if [ -z "$installed" ]; then
        "$here/setup.sh" ${place:+"$place"} || code=$?
        if [ "$code" -ne 0 ]; then
          failed setup "$code" "${MAX_FAILURES:-5}"
          continue
        fi
        installed=1
      fi
      "$here/run.sh" "${command[@]}" || code=$?
      case $code in
        0) say "the run is done" && finish 0 ;;
        2) say "the request cannot be served; no repetition mends that" && finish 2 ;;
        75) say "interrupted and saved; calling again" && failures=0 && sleep "$POLL_SECONDS" ;;
        *)
          now=$(state)
          if ready "$now"; then
            failed "the command" "$code" "${MAX_FAILURES:-5}"
          else
            say "the TPU is $now: the run was cut"
          fi
          ;;
      esac
      ;;
    ABSENT)
      installed=
      "$here/create.sh" || code=$?
      if [ "$code" -eq 0 ]; then failures=0; else failed creation "$code" "${MAX_CREATES:-50}"; fi
      ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED | HIDDEN)
      say "the TPU is $now; making it anew"
      installed=
      "$here/delete.sh" --yes || failed deletion $? "${MAX_FAILURES:-5}"
      ;;
    UNREADABLE) failed "asking for the state" 1 "${MAX_FAILURES:-5}" ;;
    *)
      say "the TPU is $now; waiting"
      sleep "$POLL_SECONDS"
      ;;
  esac
done
