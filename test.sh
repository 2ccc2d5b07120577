#!/usr/bin/env bash
# ./test.sh        the tests
# ./test.sh all    and what is slower: agreement with trl's losses, and every mutation
# ./test.sh tests/test_losses.py -k dpo        pytest's own arguments
set -euo pipefail
cd "$(dirname "$0")"
export GOMP_SPINCOUNT=3000       # threads that wait for a shared core give it away: see run.sh
./install.sh
if [ "${1:-}" = all ]; then
  ./install.sh requirements-test.txt
  .venv/bin/python -m pytest -q --durations=5 -n 2 --dist loadfile tests
  exec .venv/bin/python tests/mutations.py
fi
[ $# != 0 ] || set -- -n 2 --dist loadfile tests --ignore tests/slow
exec .venv/bin/python -m pytest -q --durations=5 "$@"
