#!/usr/bin/env bash
# Delete the TPU VM, or the queued resource together with its VM. What is not in a bucket is lost.
#
#   tpu/delete.sh [--queued] [--yes] [--dry-run]
#
# Needs PROJECT and ZONE. Reads NAME (jaxcl), QUEUED. gcloud asks before it deletes, unless --yes is given.
#
# Example:
#   PROJECT=my-project ZONE=us-west4-a tpu/delete.sh --yes

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

yes=
while [ $# -gt 0 ]; do
  case $1 in
    --yes) yes=1 ;;
    *) common_flag "$1" ;;
  esac
  shift
done
need PROJECT ZONE
if [ -n "$QUEUED" ]; then
  queue delete "$NAME" --force ${yes:+--quiet}
else
  node delete "$NAME" ${yes:+--quiet}
fi
