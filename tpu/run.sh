#!/usr/bin/env bash
# Run one command on all workers of the TPU, show its output, and end with its exit status.
#
#   tpu/run.sh [--dry-run] COMMAND [WORDS ...]
#   tpu/run.sh --stop [--dry-run]
#
# The command runs in ~/jaxcl-run and goes on when the connection breaks; the same line again then follows it. On every
# worker JAXCL_DISTRIBUTED=1 makes jaxcl call jax.distributed.initialize; where BUCKET is set, compiled programs are kept
# in $BUCKET/compiled. Further variables: tpu/run.sh env A=b jaxcl run ... Exit status 75: interrupted and saved, call
# again. --stop asks the command to save and end, as a preemption does.
# Needs PROJECT and ZONE. Reads NAME (jaxcl), BUCKET.
#
# Example:
#   PROJECT=my-project ZONE=us-west4-a tpu/run.sh jaxcl run olora_order1 --out gs://my-bucket/runs/first

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stop=
while [ $# -gt 0 ] && [[ $1 == -* ]]; do
  case $1 in
    --stop) stop=1 ;;
    *) common_flag "$1" ;;
  esac
  shift
done
need PROJECT ZONE
if [ -n "$stop" ]; then
  # shellcheck disable=SC2016 # the workers expand this
  on_worker all 'kill -TERM -- "-$(cat ~/jaxcl-run/pid)"'
  exit
fi
[ $# -gt 0 ] || refuse "no command; for example: tpu/run.sh jaxcl doctor"

# A shell of its own waits for the command and writes down how it ended; `trap :` lets it outlive the signal that asks
# the command to save.
set -- env JAXCL_DISTRIBUTED=1 ${BUCKET:+"JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled"} "$@"
waiting="trap : TERM; $(quoted "$@"); echo \$? > status"
on_worker all "mkdir -p ~/jaxcl-run && cd ~/jaxcl-run || exit 1
from=\$(stat -c %s log 2>/dev/null || echo 0)
if [ -s pid ] && kill -0 \"\$(cat pid)\" 2>/dev/null; then
  echo following the command that runs already
else
  rm -f status
  PATH=~/jaxcl-env/bin:\$PATH nohup setsid bash -c $(quoted "$waiting") >> log 2>&1 < /dev/null &
  echo \$! > pid
fi
tail -c +\$((from + 1)) -s 0.2 -F --pid=\"\$(cat pid)\" log 2>/dev/null
exit \"\$(cat status 2>/dev/null || echo 1)\""
