#!/usr/bin/env bash
# Make .venv and install the exact pins, once for every version of the file; run.sh and test.sh call
# it. ./install.sh requirements-test.txt adds what only the slow tests compare with.
#   PYTHON=python3.12 ./install.sh       another Python than python3; 3.11 to 3.14 will do
set -euo pipefail
cd "$(dirname "$0")"
stop() { echo "error: $1" >&2; exit 2; }

file="${1:-requirements.txt}"
[ -f "$file" ] || stop "$file is missing: name a file of requirements"
for folder in RL DPO data; do
  for name in model answers frame flops; do
    [ -L $folder/$name.py ] || stop "$folder/$name.py is no symbolic link, so this \
checkout was made without them: git config core.symlinks true && git checkout -- $folder"
  done
done
key="$(cat requirements.txt "$file") ${TORCH_INDEX:-}"
[ "$(cat ".venv/installed-$file" 2>/dev/null)" != "$key" ] || exit 0

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; }
if ! fits .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14} none; do
    ! fits "$python" || break
  done
  [ "$python" != none ] || stop "Python 3.11 to 3.14 is needed, and ${PYTHON:-python3} is \
$("${PYTHON:-python3}" --version 2>/dev/null || echo none): install one, then PYTHON=/its/path $0"
  "$python" -m venv --clear .venv || stop "$python cannot make .venv (Debian: apt install python3-venv)"
fi
echo "installing $file into .venv (once)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
  ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "$file" ||
  stop "pip could not install $file; its lines above say why. The same command tries again"
printf '%s' "$key" > ".venv/installed-$file"
