#!/usr/bin/env bash
# Make .venv and install the exact pins, once for every version of the file; run.sh and test.sh call
# it. ./install.sh requirements-test.txt adds what only the slow tests compare with.
set -euo pipefail
cd "$(dirname "$0")"
file="${1:-requirements.txt}"
key="$(cat requirements.txt "$file") ${TORCH_INDEX:-}"
[ "$(cat ".venv/installed-$file" 2>/dev/null)" != "$key" ] || exit 0
echo "installing $file into .venv (once)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check \
  ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "$file"
printf '%s' "$key" > ".venv/installed-$file"
