#!/usr/bin/env bash
# Run a command with another version of Triton, installed into a throwaway folder:
#     tests/kernels/with_triton.sh 3.6.0 python benches/ahead_of_time.py --out rows.jsonl
# In the interpreter Triton 3.6 needs NumPy below 2.4; add it after the version: "3.6.0 numpy<2.4".
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 'VERSION [PACKAGE...]' COMMAND [ARGUMENT...]" >&2
  exit 2
fi
read -r version packages <<<"$1"
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# shellcheck disable=SC2086 # a list of packages
python -m pip install -qq --no-deps --target "$folder" "triton==$version" $packages
PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" TRITON_CACHE_DIR="$folder/cache" "$@"
