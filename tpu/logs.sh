#!/usr/bin/env bash
# Show the end of what run.sh's command printed on one worker, or on all.
#
#   tpu/logs.sh [--follow] [--worker N|all] [--dry-run]
#
# Needs PROJECT and ZONE. Reads NAME (jaxcl), LINES_SHOWN (100).
#
# Example:
#   PROJECT=my-project ZONE=us-west4-a tpu/logs.sh --worker 1 --follow

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

follow='' worker=0
while [ $# -gt 0 ]; do
  case $1 in
    --follow) follow=1 ;;
    --worker)
      [ $# -gt 1 ] || refuse "--worker needs a number, or all"
      worker=$2
      shift
      ;;
    *) common_flag "$1" ;;
  esac
  shift
done
need PROJECT ZONE
case $worker in
  all | [0-9] | [0-9]*[0-9]) ;;
  *) refuse "--worker '$worker'; accepted: a number, or all" ;;
esac
on_worker "$worker" "tail -n ${LINES_SHOWN:-100}${follow:+ -F} ~/jaxcl-run/log"
