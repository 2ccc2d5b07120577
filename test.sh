#!/usr/bin/env bash
# The tests: ./test.sh, or with pytest's own arguments: ./test.sh tests/test_losses.py -k dpo
set -euo pipefail
cd "$(dirname "$0")"
./install.sh
[ "${1:-}" != all ] || shift     # "all" is every test; nothing slower exists yet
exec .venv/bin/python -m pytest -q --durations=5 "${@:-tests}"
