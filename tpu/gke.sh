#!/usr/bin/env bash
# Run one command on a GKE cluster of TPUs through xpk (pip install xpk), which has made the cluster.
#
#   tpu/gke.sh [--dry-run] COMMAND [WORDS ...]
#   tpu/gke.sh --delete [--dry-run]
#
# GKE starts the command again whenever it ends with another status than 0, 75 included, at most MAX_RESTARTS times; the
# run directory is in a bucket, so it continues. Without IMAGE the local checkout is put into BASE_IMAGE and installed
# when the workload starts. Spot capacity is a property of the cluster (xpk cluster create --spot).
# Needs PROJECT, ZONE and CLUSTER, and BUCKET unless the command has --out gs://.... Reads NAME (jaxcl), ACCELERATOR
# (v5litepod-4), SLICES (1), IMAGE, BASE_IMAGE (python:3.12), MAX_RESTARTS (50).
#
# Example:
#   PROJECT=my-project ZONE=us-west4-a CLUSTER=mine BUCKET=gs://my-bucket/runs tpu/gke.sh jaxcl run olora_order1

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

CLUSTER=${CLUSTER:-} IMAGE=${IMAGE:-} delete=
while [ $# -gt 0 ] && [[ $1 == -* ]]; do
  case $1 in
    --delete) delete=1 ;;
    *) common_flag "$1" ;;
  esac
  shift
done
need PROJECT ZONE CLUSTER
where=(--cluster="$CLUSTER" --workload="$NAME" --project="$PROJECT" --zone="$ZONE")
if [ -n "$delete" ]; then
  execute xpk workload delete "${where[@]}"
  exit
fi
[ $# -gt 0 ] || refuse "no command; for example: tpu/gke.sh jaxcl run olora_order1"
command=()
kept "$@"
line=$(quoted "${command[@]}")
image=(--docker-image="$IMAGE")
if [ -z "$IMAGE" ]; then
  image=(--base-docker-image="${BASE_IMAGE:-python:3.12}"
    --script-dir="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)")
  line="pip install --quiet '.[tpu,bucket]' && $line"
fi
execute xpk workload create "${where[@]}" --tpu-type="$ACCELERATOR" --num-slices="${SLICES:-1}" "${image[@]}" \
  --max-restarts="${MAX_RESTARTS:-50}" --env JAXCL_DISTRIBUTED=1 \
  ${BUCKET:+--env "JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled"} --command "$line"
