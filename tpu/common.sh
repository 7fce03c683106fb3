# shellcheck shell=bash
# What the scripts beside this file share: settings, help, dry runs, quoting. Sourced, not run; works with bash 3.2.
# The variables below are the settings of tpu/README.md.
set -euo pipefail

PROJECT=${PROJECT:-}
ZONE=${ZONE:-}
NAME=${NAME:-jaxcl}
ACCELERATOR=${ACCELERATOR:-v5litepod-4}
BUCKET=${BUCKET:-}
SPOT=${SPOT:-}
QUEUED=${QUEUED:-}
DRY_RUN=${DRY_RUN:-}
POLL_SECONDS=${POLL_SECONDS:-30}
BUCKET=${BUCKET%/}

say() { printf 'jaxcl-tpu: %s\n' "$*" >&2; }

refuse() { # one line, exit status 2: the request cannot be served
  say "$*"
  exit 2
}

need() { # each variable named must have a value
  local name example
  for name in "$@"; do
    [ -n "${!name}" ] && continue
    case $name in
      PROJECT) example=my-project ;;
      ZONE) example=us-west4-a ;;
      BUCKET) example=gs://my-bucket/runs ;;
      CLUSTER) example=my-cluster ;;
      *) example=... ;;
    esac
    refuse "$name is not set; for example: export $name=$example (tpu/README.md lists the settings)"
  done
}

usage() { # the comment at the top of the script
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

common_flag() { # what every script understands
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --spot) SPOT=1 ;;
    --queued) QUEUED=1 ;;
    *) refuse "unknown argument '$1'; $(basename "$0") --help shows what is accepted" ;;
  esac
}

quoted() { # the words as they would have to be typed
  local word out='' quote="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$quote}'" ;;
    esac
    out="$out${out:+ }$word"
  done
  printf '%s\n' "$out"
}

execute() { # says what it does, and does it unless this is a dry run
  printf '+ %s\n' "$(quoted "$@")" >&2
  [ -n "$DRY_RUN" ] || "$@"
}

node() { # a command on the TPU VM, for example: node delete NAME
  execute gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --project="$PROJECT"
}

on_worker() { # WORKER|all COMMAND: through ssh, which asks for a sign of life: a VM that was taken away closes nothing
  node ssh "$NAME" --worker="$1" --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 --command="$2"
}

queue() { # a command on the queued resource
  execute gcloud compute tpus queued-resources "$@" --zone="$ZONE" --project="$PROJECT"
}

version() { # the runtime that fits the accelerator, unless VERSION says otherwise
  case ${VERSION:+given}$ACCELERATOR in
    given*) echo "$VERSION" ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *) refuse "no runtime is known for ACCELERATOR=$ACCELERATOR; set VERSION (gcloud compute tpus tpu-vm versions list)" ;;
  esac
}

kept() { # the command, with --out in the bucket where it says no other place; sets the array `command`
  command=("$@")
  case " $* " in
    *' --out gs://'* | *' --out=gs://'*) ;;
    *' --out '* | *' --out='*) refuse "--out must be in a bucket here (gs://...): what is on the TPU VM is lost with it" ;;
    *) need BUCKET && command+=(--out "$BUCKET/$NAME") ;;
  esac
}

state() { # of the queued resource or the TPU VM: ABSENT, READY, ACTIVE, PREEMPTED, ...; UNREADABLE: gcloud itself failed
  local answer what=(tpu-vm describe "$NAME" '--format=value(state)')
  [ -z "$QUEUED" ] || what=(queued-resources describe "$NAME" '--format=value(state.state)')
  if answer=$(gcloud compute tpus "${what[@]}" --zone="$ZONE" --project="$PROJECT" 2>&1); then
    printf '%s\n' "$answer" | tail -n 1
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo ABSENT
  else
    say "${answer##*$'\n'}"
    echo UNREADABLE
  fi
}
