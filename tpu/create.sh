#!/usr/bin/env bash
# Make a TPU VM or slice: on demand, from spot capacity, or through the queue.
#
#   tpu/create.sh [--spot] [--queued] [--dry-run] [-- FLAGS OF GCLOUD]
#
# Needs PROJECT and ZONE. Reads NAME (jaxcl), ACCELERATOR (v5litepod-4), VERSION (fits the accelerator), SPOT, QUEUED,
# POLL_SECONDS. With --queued it waits until the request is served; that can take hours, and stopping the script leaves
# the request in the queue.
#
# Example:
#   PROJECT=my-project ZONE=us-west4-a ACCELERATOR=v5litepod-16 tpu/create.sh --spot -- --network=mine

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [ $# -gt 0 ] && [ "$1" != -- ]; do
  common_flag "$1"
  shift
done
shift $(($# > 0))
need PROJECT ZONE
runtime=$(version)
flags=(--accelerator-type="$ACCELERATOR" ${SPOT:+--spot} "$@")

if [ -z "$QUEUED" ]; then
  node create "$NAME" --version="$runtime" "${flags[@]}"
  exit
fi

queue create "$NAME" --node-id="$NAME" --runtime-version="$runtime" "${flags[@]}"
[ -z "$DRY_RUN" ] || exit 0
while now=$(state) && [ "$now" != ACTIVE ]; do
  case $now in
    FAILED | SUSPENDED | ABSENT) say "the request is $now; tpu/delete.sh --queued removes it" && exit 1 ;;
  esac
  say "the request is $now"
  sleep "$POLL_SECONDS"
done
