#!/usr/bin/env bash
# All that is worth doing on a GPU that can be had for 15 minutes, in two parts or by name:
#
#     OUT=/tmp/on_gpu bash benchmarks/on_gpu.sh a      # warm, profile, steps: for 240 s
#     OUT=/tmp/on_gpu bash benchmarks/on_gpu.sh b      # unpack, row: for 540 s; goes on where it stopped
#     bash benchmarks/on_gpu.sh both                   # all modes beside the numeric check, 140 s on an H200
#
# In the project's root it takes, where they are there: .whl, wheels to install; .cifar_a and .cifar_b, halves of
# CIFAR-10 as WebP strips, with unpack_cifar10.py in the second; or $DATA with train/ and test/. Each step has its own
# time limit, and the next one starts when it fails. $OUT gets results.txt, logs.tar.gz, and of the row, every 20 s,
# runs.tar.gz (logs, table) and checkpoints_seedN.tar.gz: unpacked into $RUNS, the row goes on from them elsewhere.
# A trial without a GPU: EPOCHS=1 FRACTION=0.01 SEEDS=2 STEPS='--steps 1 --repeats 1 --batch_size 8'.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-4}
PYTHON=${PYTHON:-python3} OUT=${OUT:-/tmp/on_gpu} W=${W:-/tmp/on_gpu_work}
DATA=${DATA:-data/cifar10} RUNS=${RUNS:-logs/gpu}
DTYPE=${DTYPE:-bfloat16}                # compiling and capturing are the default on a GPU
SEEDS=${SEEDS:-3} EPOCHS=${EPOCHS:-200} FRACTION=${FRACTION:-1} JOBS=${JOBS:-2} ROW_SECONDS=${ROW_SECONDS:-470}
METHODS=${METHODS---method student --method AT --method KD} MORE=${MORE-} STEPS=${STEPS---steps 100 --repeats 3}
mkdir -p "$OUT" "$W/log" "$W/strips"
export PYTHONPATH=$W/site${PYTHONPATH:+:$PYTHONPATH}

part() {  # NAME SECONDS COMMAND…: the end of its output, and how it ended, go to results.txt
  local name=$1 limit=$(($2 * ${SLOWER:-1})) start=$SECONDS status; shift 2
  timeout -k 15 "$limit" "$@" >"$W/log/$name" 2>&1; status=$?
  { echo "== $(date +%T) $name: status $status, $((SECONDS - start)) s of $limit"
    tail -n "${LINES_OF:-4}" "$W/log/$name"; } | tee -a "$OUT/results.txt"
}

modes() {  # side by side, on digits and on noise
  local C="$PYTHON cifar.py --dataset ClutteredDigits --epochs 3 --train_fraction $FRACTION" pids=()
  local B="$C --dtype $DTYPE" T="--teacher_id $W/wrn" S="--save $W/runs"
  rm -rf "$W/runs"
  $PYTHON - "$W" <<'P'
import sys, cv2, numpy as np, torch
from pathlib import Path
from utils import new_network
for net, settings, n in (('wrn', {'width': 2}, 10), ('nin', {}, 10), ('resnet', {'depth': 34}, 6)):
    _, params, network = new_network(net, settings, n, 1)
    Path(sys.argv[1], net).mkdir(exist_ok=True)
    torch.save({'params': params, 'network': network}, Path(sys.argv[1], net, 'model.pt7'))
for part, n in (('train', 16), ('val', 4)):
    for c in range(6):
        folder = Path(sys.argv[1], 'images', part, f'c{c}')
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            cv2.imwrite(str(folder / f'{i}.jpg'), np.random.default_rng(i).integers(0, 256, (250, 300, 3), np.uint8))
P
  mode() { part "$1" 120 "${@:2}" & pids+=($!); }
  mode alone $B $S/alone
  mode at_kd $B $T --alpha 0.9 --beta 1e+3 --beta_decay step $S/at_kd
  mode factt $B $T --factt 1e+3 --beta_decay cosine $S/factt
  mode late $B $T --beta 1e+3 --at_epochs 1,2 $S/late
  mode half $C $T --beta 1e+3 --dtype half $S/half
  mode deterministic $B $T --beta 1e+3 --deterministic $S/deterministic
  mode seeds $B $T --beta 1e+3 --seed 0,1,2 --save "$W/runs/seeds{seed}"
  mode nin_at $B --net nin --width 0.5 --teacher_id "$W/nin" --beta 1e+3 $S/nin_at
  mode gradient $C --net nin --no-batch_norm --width 0.5 --teacher_id "$W/nin" --grad_at 1 --lr 0.01 $S/gradient
  mode imagenet $PYTHON imagenet.py --dataset folder --dataroot "$W/images" --batch_size 16 --epochs 2 --dtype "$DTYPE" \
    --teacher_params "$W/resnet" --beta 1e+3 --no-check_teacher --nthread 2 $S/imagenet
  wait "${pids[@]}"
}

check() { LINES_OF=40 part check 150 $PYTHON -m pytest -s --tb=short --show-capture=no -m gpu tests/test_gpu.py; }

run_of() {
  case $1 in teacher) echo --width 2;; at) echo --teacher=--width=2 --beta 1e+3;; kd) echo --teacher=--width=2 --alpha 0.9;; esac
}
step="$PYTHON benchmarks/step.py --dtype $DTYPE $STEPS"

warm() {  # side by side, so that the inductor's cache has what the others compile
  local run pids=()
  for run in alone teacher at kd; do part "warm_$run" 90 $step --steps 1 --repeats 1 $(run_of $run) & pids+=($!); done
  wait "${pids[@]}"
}

profile() {
  local run; for run in alone at; do LINES_OF=60 part "profile_$run" 40 $step --profile $(run_of $run); done
}

steps() {
  local s; for s in 'alone 1' 'at 1' 'alone 3' 'at 3' 'teacher 1' 'kd 1' 'alone 5'; do  # run, seeds in one process
    LINES_OF=1 part "step_${s/ /_}" 40 $step --seeds ${s#* } $(run_of ${s% *})
  done
}

unpack() {
  [ -d "$DATA/test" ] || part unpack 120 $PYTHON .cifar_b/unpack_cifar10.py --from "$W/strips" "$DATA"
}

keep() {
  local seed to
  tar -C "$RUNS" --exclude=model.pt7 --exclude=.lock --exclude='*.tmp' -czf "$W/runs.tar.gz" .; cp "$W/runs.tar.gz" "$OUT/"
  for seed in $(seq 0 $((SEEDS - 1))); do
    to=checkpoints_seed$seed.tar.gz
    (cd "$RUNS" && find . -path "*_seed$seed/model.pt7" -print0 | tar --null -czf "$W/$to" -T -); cp "$W/$to" "$OUT/"
  done
}

row() {
  mkdir -p "$RUNS"
  (while sleep 20; do keep; done) & local keeper=$!
  LINES_OF=40 part row "$ROW_SECONDS" $PYTHON tables.py 1 --row WRN-16-1:WRN-16-2 $METHODS --seeds "$SEEDS" --jobs "$JOBS" \
    --folder "$RUNS" --dataset folder --dataroot "$DATA" --dtype "$DTYPE" --epochs "$EPOCHS" --train_fraction "$FRACTION" $MORE
  kill "$keeper"; keep
}

[ -d "$W/site" ] || [ ! -d .whl ] || $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$W/site" .whl/*.whl
for half in .cifar_a .cifar_b; do [ ! -d $half ] || cp -r $half/. "$W/strips/"; done
{ nvidia-smi -L; $PYTHON -c 'import torch; print(torch.__version__, torch.version.cuda)'; } 2>&1 | tee -a "$OUT/results.txt"
both() { check & modes; wait; }
words=" ${*:-a b} "; words=${words/ a / warm profile steps }; words=${words/ b / unpack row }
for name in $words; do
  $name
  tar -C "$W/log" -czf "$W/logs.tar.gz" . && cp "$W/logs.tar.gz" "$OUT/"
done
