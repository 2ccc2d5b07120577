#!/usr/bin/env bash
# ./test.sh        the tests
# ./test.sh all    and what is slower: every bad input, agreement with trl and transformers, every
#                  mutation
# ./test.sh tests/test_losses.py -k dpo        pytest's own arguments
# ./test.sh tests --device cuda                the kernel, losses and one rank's updates on a GPU
set -euo pipefail
cd "$(dirname "$0")"
export GOMP_SPINCOUNT=3000       # threads that wait for a shared core give it away: see run.sh
./install.sh
.venv/bin/ruff check --quiet .
pytest() { .venv/bin/python -m pytest -q --durations=5 "$@"; }
if [ "${1:-}" = all ]; then
  ./install.sh requirements-test.txt
  BAD_INPUTS=all pytest -n 2 --dist loadfile tests
  echo "tests: $SECONDS seconds"
  .venv/bin/python tests/mutations.py
  echo "and mutations: $SECONDS seconds"
elif [ $# != 0 ]; then
  pytest "$@"
else
  pytest -n 2 --dist loadfile tests --ignore tests/slow
fi
