#!/usr/bin/env bash
# Everything that needs a CUDA device, from a checkout: `bash benchmarks/gpu.sh OUT [PART ...]`.
#
#   tests     Triton kernels at the shapes of the 30B model against fp64, recorded cases on the device
#   speed     passes, decode steps and operators beside their floors and plain PyTorch
#   decoding  continuous decoding by profile, attention by context, a million seeded scans
#   fp8       the passes again with experts in 8 bits
#
# Each part takes at most ten minutes; without a PART all run. Needs Python with torch, triton,
# safetensors, tokenizers, transformers and pytest; matplotlib for the plots. Nothing is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder for the results}
shift
mkdir -p "$out"
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests speed decoding fp8)
export PYTHONPATH=. PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=0

bench() {
    "$python" -m twotower.bench --preset 30b --minutes 9 --out "$out/$1.json" \
        --table "$out/$1.md" --plot "$out/$1.png" "${@:2}" 2>&1 | tee "$out/$1.log"
}

for part in "${parts[@]}"; do
    case $part in
    tests)
        # Not the project's own pytest settings: they want plugins that only a full install has.
        "$python" -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider -m "not slow" \
            tests/kernels/test_*_triton.py tests/kernels/test_commit.py 2>&1 |
            tee "$out/tests.log" || failed=1
        "$python" - <<'PYTHON' 2>&1 | tee "$out/verify.log" || failed=1
import sys
from pathlib import Path

from twotower.towers.verify import verify_folder

folders = [Path("tests/golden") / name for name in ("tiny_a", "tiny_b")]
sys.exit(not all([verify_folder(folder, "cuda") for folder in folders]))
PYTHON
        ;;
    speed) bench speed --sections speed,baseline,operators || failed=1 ;;
    decoding) bench decoding --sections continuous,attention,scans,profiles,verified || failed=1 ;;
    fp8) bench fp8 --experts fp8 --sections speed,operators || failed=1 ;;
    *)
        echo "unknown part: $part" >&2
        exit 2
        ;;
    esac
done
exit $failed
