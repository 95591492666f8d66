#!/usr/bin/env bash
# What to measure when there is a GPU, the most important first, in 26 minutes:
#
#     OUT=/tmp/on_gpu bash tests/benchmarks/on_gpu.sh            # all, or by name, in parts:
#     bash tests/benchmarks/on_gpu.sh row                        # goes on where it stopped
#
# Each part has its own time limit, and the next one starts when it fails. README.md, here, says what comes out.
set -u
export PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
OUT=${OUT:-/tmp/on_gpu}                      # results
RUNS=${RUNS:-logs/on_gpu}                    # folder of the runs
DATA=${DATA:-data/cifar10}                   # the JPEG copy of CIFAR-10
BEST=${BEST:---dtype bfloat16}               # options of the runs; on a GPU they compile and record by default
SEEDS=${SEEDS:-5} JOBS=${JOBS:-4} REPEATS=${REPEATS:-5} EPOCHS=${EPOCHS:-200} FRACTION=${FRACTION:-1}
IMAGENET=${IMAGENET:---batch_size 256}       # options of images.py
mkdir -p "$OUT"

timed() {  # NAME SECONDS COMMAND…: its output, and how it ended, go to $OUT/results.txt
  local name=$1 limit=$(($2 * ${SLOWER:-1})) start=$SECONDS status
  shift 2
  echo "$(date +%T) $name: $*" | tee -a "$OUT/results.txt"
  timeout -k 30 "$limit" "$@" >>"$OUT/results.txt" 2>&1
  status=$?
  echo "$(date +%T) $name: status $status, $((SECONDS - start)) s of $limit" | tee -a "$OUT/results.txt"
}
table() {  # NAME SECONDS OPTIONS…: a part of table 1; logs and table are kept, and, in a file for each seed, the
           # checkpoints of WRN-16, to go on from on another machine
  timed "$1" "$2" "$PYTHON" tables.py 1 --folder "$RUNS" --seeds "$SEEDS" --jobs "$JOBS" --dataset folder \
    --dataroot "$DATA" --epochs "$EPOCHS" --train_fraction "$FRACTION" $BEST "${@:3}"
  tar -C "$RUNS" --exclude=model.pt7 --exclude=.lock -czf "$OUT/runs.tar.gz" .
  for seed in $(seq 0 $((SEEDS - 1))); do
    (cd "$RUNS" && find . -path "*_seed$seed/model.pt7" ! -path '*40*' -print0 |
      tar --null -czf "$OUT/checkpoints_seed$seed.tar.gz" -T -)
  done
}

tests() { timed tests 180 "$PYTHON" -m pytest -m gpu -q tests/test_speed.py; }
step() {
  for options in '150 --dtype bfloat16 --compile' '150 --dtype float --compile --no-start_up' \
                 '60 --dtype bfloat16 --no-compile --no-start_up' '60 --dtype float --no-compile --no-start_up'; do
    timed "step${options// /}" "${options%% *}" "$PYTHON" tests/benchmarks/step.py --repeats "$REPEATS" \
      --run WRN-16-1 --run WRN-16-1_AT_WRN-16-2 --train_fraction "$FRACTION" ${options#* }
  done
}
row() {
  table row_at 380 --row WRN-16-1:WRN-16-2 --method student --method AT
  table row 150 --row WRN-16-1:WRN-16-2
}
images() { timed images 150 "$PYTHON" tests/benchmarks/images.py --repeats "$REPEATS" --dtype bfloat16 $IMAGENET; }
seeds() { timed seeds 120 "$PYTHON" tests/benchmarks/seeds.py --repeats "$REPEATS" --seeds "$SEEDS" \
  --train_fraction "$FRACTION" $BEST; }
profile() { timed profile 60 "$PYTHON" tests/benchmarks/step.py --run WRN-16-1_AT_WRN-16-2 --profile $BEST; }
rows() { table rows "${ROWS_SECONDS:-100}" --row WRN-16-1:WRN-40-1 --row WRN-16-2:WRN-40-2; }

for part in ${*:-tests step row images seeds profile rows}; do $part; done
