#!/usr/bin/env bash
# Install jaxcl on all workers of the TPU, in ~/jaxcl-env (Python 3.12, through uv: the VM's own Python may be too old).
#
#   tpu/setup.sh [SOURCE] [--dry-run]
#
# SOURCE: a wheel, a folder with a git checkout (its last commit is taken; default: the one these scripts are in), or a
# git URL that the workers can reach. Running it again replaces what is installed.
# Needs PROJECT and ZONE. Reads NAME (jaxcl).
#
# Example:
#   PROJECT=my-project ZONE=us-west4-a tpu/setup.sh dist/jaxcl-0.1.0-py3-none-any.whl

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

place=
while [ $# -gt 0 ]; do
  case $1 in
    -*) common_flag "$1" ;;
    *) place=$1 ;;
  esac
  shift
done
need PROJECT ZONE
place=${place:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}

send() { # a file to the home folder of every worker, from where pip takes it
  node scp "$1" "$NAME:" --worker=all
  from="file://\$HOME/$(basename "$1")"
}

case $place in
  *.whl)
    [ -f "$place" ] || refuse "no wheel at '$place'; for example: python -m build --wheel"
    send "$place"
    ;;
  *://* | git@*) from="git+${place#git+}" ;;
  *)
    git -C "$place" rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
      refuse "'$place' is neither a wheel, nor a git URL, nor a folder with a git checkout"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    execute git -C "$place" archive --prefix=jaxcl/ --output="$folder/jaxcl.tar.gz" HEAD
    send "$folder/jaxcl.tar.gz"
    ;;
esac

on_worker all "set -e
python3 -m pip install --quiet --user --upgrade uv
python3 -m uv venv --quiet --allow-existing --python 3.12 ~/jaxcl-env
python3 -m uv pip install --quiet --python ~/jaxcl-env/bin/python --reinstall-package jaxcl \"jaxcl[tpu,bucket] @ $from\"
~/jaxcl-env/bin/jaxcl --version"
