#!/usr/bin/env bash
# Make .venv and install the exact pins, once for every requirements.txt. run.sh and test.sh call it.
set -euo pipefail
cd "$(dirname "$0")"
key="$(cat requirements.txt) ${TORCH_INDEX:-}"
[ "$(cat .venv/installed 2>/dev/null)" != "$key" ] || exit 0
echo "installing into .venv (once)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check \
  ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.txt
printf '%s' "$key" > .venv/installed
