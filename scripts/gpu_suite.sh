#!/usr/bin/env bash
# Build the CUDA kernel for the GPU at hand, prove it against float64, and time it. Needs only torch and nvcc.
#   scripts/gpu_suite.sh [--out FILE] [--quick]    everything else: --help. PYTHON names another python3.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$root:$root/scripts${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu_suite "$@"
