#!/usr/bin/env bash
# What a borrowed GPU machine is to show in fifteen minutes, as three calls, each cut into steps with a time limit.
#
#     bash benchmarks/gpu/plan.sh A     what is there, the tests marked gpu, the step's throughput, the loss
#     bash benchmarks/gpu/plan.sh B     configs/pretrain/cifar10_gpu.yaml and its evaluation
#     bash benchmarks/gpu/plan.sh C     configs/pretrain/cifar10_cpu.yaml and its evaluation, the step in other ways
#
# Anyone with one GPU can run it like that, after `make setup` and with CIFAR-10 in datasets/ (README). On a borrowed
# machine that has PyTorch but no network, the rest travels with the checkout, in two folders that git ignores: .whl/
# with wheels of the packages that are missing there and a setup.sh that installs them and sets PYTHONPATH, and .data/
# with the two CIFAR .beton files,
#
#     mkdir -p .data && tar -C datasets -czf .data/cifar10.tgz cifar10-{train,test}.beton{,.json}
#
# The commands, one straight after the other while the machine is warm, are then (without `. .whl/setup.sh &&` where all
# packages are installed)
#
#     . .whl/setup.sh && SECONDS_LEFT=230 bash benchmarks/gpu/plan.sh A
#     . .whl/setup.sh && SECONDS_LEFT=400 bash benchmarks/gpu/plan.sh B
#     . .whl/setup.sh && bash benchmarks/gpu/plan.sh parts                    where B has paused, before C
#     . .whl/setup.sh && SECONDS_LEFT=N bash benchmarks/gpu/plan.sh C         N: what is left of the loan, less 30
#
# SECONDS_LEFT is how long the call may take in all; a step that no time is left for is left out. B measures a step and
# takes as many epochs as fit, at most the config's. Where it says all the same that its run is not finished, four parts
# of 15 MiB of its checkpoint come with B, and `parts` brings the rest back: after C a machine may be gone.
#
# Later, the parts of all calls and the .sha256 in one folder, RESUME=FOLDER before `bash` has B resume that run. Where
# they are more than one call can carry, some go into .data each time, and `RESUME=.data bash benchmarks/gpu/plan.sh
# gather` keeps them on the machine until B, with RESUME=.data again, finds all.
#
# Results go to $OUT (benchmarks/results/gpu/CALL by default) as they come, at most eight files a call:
#     A      A.log there.json gpu-tests.xml step-cifar.json step-imagenet.json loss-tiled.json loss-triton.json A.txt
#     B      B.log B.txt run.tgz, and encoder.safetensors.part00 … and .sha256 where the run is finished, else
#            step-N.pt.part00 … .part03 and .sha256
#     C      C.log C.txt run.tgz variants.json
#     parts  parts.log, step-N.pt.part04 … .part07 and .sha256
# CALL.log holds all output, CALL.txt what was measured beside what benchmarks/gpu/predictions.json says. A step that
# fails, or is cut off, leaves what it has written; all of its processes are killed, and the next one follows. The last
# lines give the verdict and the seconds of each step; the exit status is 0 if all passed, or paused.
#
# DEVICE=cpu     all of it at tiny size, without a GPU: the rehearsal that the tests run
# STATE=FOLDER   what stays on the machine between calls, runs and what was compiled: /tmp/simclr_gpu_plan by default
# EPOCHS=100     so many in B, whether they fit or not
# PYTHON         .venv/bin/python where there is one, else python3
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

CALL=${1:-}
case $CALL in
  A) default=230 ;;
  B) default=400 ;;
  C) default=120 ;;
  parts | gather) default=60 ;;
  *) sed -n '2,/^set -u/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
SECONDS_LEFT=${SECONDS_LEFT:-$default}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-benchmarks/results/gpu/$CALL}
STATE=${STATE:-/tmp/simclr_gpu_plan}
[ -n "${PYTHON:-}" ] || { PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=.venv/bin/python; }
mkdir -p "$OUT" "$STATE/parts" || exit 2
OUT=$(cd "$OUT" && pwd) STATE=$(cd "$STATE" && pwd)
LOG=$OUT/$CALL.log
: >"$LOG"
export PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=$STATE/inductor # what one step has compiled, the next ones load

GPU_TESTS=(tests/test_gpu.py tests/data/test_augmentations.py)
CHOSEN="not (test_triton_equals_float64 and 0.2)"
# Comparing takes a few seconds, most of them for importing torch.
case $DEVICE in cpu) LAST=30 ;; *) LAST=10 ;; esac
# shellcheck source=benchmarks/gpu/steps.sh
. benchmarks/gpu/steps.sh

# The newest checkpoint of a run.
newest() { find "$1/checkpoints" -name 'step-*.pt' 2>/dev/null | sort | tail -n 1; }

# Keep the parts of a checkpoint that came with this call, and put them into the run's folder if all are there.
resume() {
  local run=$1 checksum name target
  [ -z "${RESUME:-}" ] || find "$RESUME" -maxdepth 1 -name 'step-*.pt.*' -exec cp {} "$STATE/parts/" \;
  checksum=$(find "$STATE/parts" -name 'step-*.pt.sha256' | sort | tail -n 1)
  [ -n "$checksum" ] || return 0
  name=$(basename "$checksum" .sha256)
  target=$run/checkpoints/$name
  [ ! -e "$target" ] || return 0
  mkdir -p "$run/checkpoints"
  cat "$STATE/parts/$name".part?? >"$target.new"
  if [ "$(sha256sum <"$target.new" | cut -d ' ' -f 1)" = "$(cut -d ' ' -f 1 "$checksum")" ]; then
    mv "$target.new" "$target"
    say "$name is there: the run resumes from it"
  else
    rm -f "$target.new"
    say "$name: parts are missing or damaged, of $(find "$STATE/parts" -name "$name.part*" | wc -l) that are here"
    return 1
  fi
}

# The data: real images, or, for the rehearsal, a few made ones.
data() {
  train=datasets/cifar10-train.beton test=datasets/cifar10-test.beton
  if [ "$DEVICE" = cpu ]; then
    train=$STATE/tiny-train.beton test=$STATE/tiny-test.beton
    [ -e "$test" ] || "$PYTHON" -m benchmarks.gpu.suite tiny "$train" "$test"
  elif [ ! -e "$test" ] && [ -e .data/cifar10.tgz ]; then
    mkdir -p datasets && tar -C datasets -xzf .data/cifar10.tgz
  fi
  [ -e "$train" ] && [ -e "$test" ] && return
  say "error: neither datasets/cifar10-train.beton and datasets/cifar10-test.beton nor .data/cifar10.tgz is there: README"
  exit 2
}

# Evaluate a run and draw its curves, in the time that is left; what it leaves, without the weights, goes into run.tgz.
evaluate() {
  local run=$1 few=()
  shift
  [ "$DEVICE" = cpu ] && few=(strengths='[1.0]')
  step "linear evaluation" 120 TERM "$PYTHON" -m simclr_ddp.linear_eval "$run" train="$train" test="$test" \
    device="$DEVICE" "$@" ${few[@]+"${few[@]}"}
  step "curves and maps" 60 TERM "$PYTHON" -m simclr_ddp.visualize "$run" maps=pca test="$test" device="$DEVICE"
  tar -C "$run" -czf "$OUT/run.tgz" --exclude=checkpoints --exclude=encoder.safetensors --exclude=.lock .
}

# What follows options on every command line of a run; the second group makes a step small for the rehearsal.
train_on() { echo "data.train=$train data.test=$test device=$DEVICE"; }
tiny='' small_images='' workers=6 rounds='--rounds=3 --steps=20' sizes=512,4096,16384,65536 tiles=1024,4096,8192 seconds=1
if [ "$DEVICE" = cpu ]; then
  tiny="optim.global_batch_size=8 model.width=0.125 head.hidden=32 data.workers=0 threads=1 precision=fp32 compile=false"
  small_images="data.size=32"
  workers=2 FACTOR=6 # for two busy cores
  export TRITON_INTERPRET=1
  rounds='--rounds=1 --steps=1' sizes=32 tiles=16,32 seconds=0
fi

# The limits of all steps but the last add up to 175 seconds of 230; the last takes what they leave.
call_a() {
  data
  step "what is there" 20 TERM "$PYTHON" -m benchmarks.gpu.suite there "$OUT/there.json"
  local several=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && several=(-n "$workers")
  # By INT pytest still writes its report. Each of Triton's cases is compiled anew: those of one temperature are enough.
  step "tests marked gpu" 70 INT "$PYTHON" -m pytest -m gpu -k "$CHOSEN" "${several[@]}" -v -p no:cacheprovider \
    --junitxml="$OUT/gpu-tests.xml" "${GPU_TESTS[@]}"
  rm -rf "$STATE/step-cifar" "$STATE/step-imagenet"
  # shellcheck disable=SC2046,SC2086 # many words each
  step "step, CIFAR ResNet-18" 35 TERM "$PYTHON" -m benchmarks.step configs/pretrain/cifar10_gpu.yaml $(train_on) \
    optim.global_batch_size=512 compile=false $tiny --ranks=1 --peers=no $rounds --out="$STATE/step-cifar"
  cp "$STATE"/step-cifar/*.json "$OUT/step-cifar.json" || say "no round of it was complete"
  # Triton apart: its compiling and tuning may take longer than the step may.
  step "loss, triton" 30 TERM "$PYTHON" -m benchmarks.gpu.log_sums --device="$DEVICE" --variants=triton --widths=128 \
    --sizes=$sizes --tiles=$tiles --seconds=$seconds --out="$OUT/loss-triton.json"
  step "loss, tiled" 20 TERM "$PYTHON" -m benchmarks.gpu.log_sums --device="$DEVICE" --variants=tiled --widths=128 \
    --sizes=$sizes --tiles=$tiles --seconds=$seconds --out="$OUT/loss-tiled.json"
  # shellcheck disable=SC2086 # many words
  step "step, ResNet-50 at 224" 90 TERM "$PYTHON" -m benchmarks.step configs/pretrain/imagenet_resnet50.yaml \
    device="$DEVICE" data.train=none.beton data.workers=1 optim.global_batch_size=512 $tiny $small_images --ranks=1 --peers=no \
    ${rounds/20/5} --out="$STATE/step-imagenet"
  cp "$STATE"/step-imagenet/*.json "$OUT/step-imagenet.json" || say "no round of it was complete"
}

# Whether a command line with these words compiles the model: the last word counts.
compiled() {
  local word last=compile=true
  for word; do case $word in compile=*) last=$word ;; esac; done
  [ "$last" = compile=true ]
}

# The words of B's run into $how: of a run that is resumed the epochs it was started with, else as many as fit.
choose() {
  local run=$1 word epoch begin most fit
  how=(${EPOCHS:+optim.epochs=$EPOCHS})
  rm -f "$STATE/started" "$STATE/pace"
  if [ -n "$(newest "$run")" ]; then
    step "how the run was started" 30 TERM "$PYTHON" -m benchmarks.gpu.suite started "$(newest "$run")" "$STATE/started"
    [ ! -e "$STATE/started" ] || read -r -a how <"$STATE/started"
    how+=(${EPOCHS:+optim.epochs=$EPOCHS})
  elif [ -z "${EPOCHS:-}" ]; then
    # shellcheck disable=SC2046,SC2086 # many words each
    step "an epoch's time" 100 TERM "$PYTHON" -m benchmarks.gpu.suite pace "$STATE/pace" configs/pretrain/cifar10_gpu.yaml \
      $(train_on) $tiny
    [ -e "$STATE/pace" ] || return
    read -r word epoch begin most <"$STATE/pace"
    # Starting takes some 15 seconds beside compiling; a tenth is for the probe's scores, checkpoints and chance.
    fit=$((($(left) - reserve - begin - 15) * 900 / epoch))
    [ "$fit" -le "$most" ] || fit=$most
    [ "$fit" -ge 1 ] || fit=1
    how=("$word" optim.epochs="$fit")
    say "an epoch takes $epoch ms with $word: $fit of $most epochs are to fit"
  fi
}

# It is stopped by TERM: the run saves and ends with status 75, and the same command resumes it. Evaluating what there
# is has to fit into the reserve.
train() {
  local name=$1
  shift
  # shellcheck disable=SC2046 # many words
  step "$name" $((($(left) - reserve) / FACTOR)) TERM "$PYTHON" -m simclr_ddp.pretrain configs/pretrain/cifar10_gpu.yaml \
    $(train_on) run_dir="$run" "$@"
}

call_b() {
  local run=$STATE/cifar10_gpu reserve=60 steps=() how=()
  [ "$DEVICE" = cpu ] && reserve=20 steps=(optim.steps="${STEPS:-4}")
  if ! resume "$run"; then
    verdicts+=("failed    resuming: parts are missing or damaged, nothing is trained")
    return
  fi
  data
  choose "$run"
  # shellcheck disable=SC2206 # many words
  how=($tiny ${how[@]+"${how[@]}"} ${steps[@]+"${steps[@]}"})
  train training ${how[@]+"${how[@]}"}
  if [ "$status" != 0 ] && [ "$status" != 75 ] && [ -z "$(newest "$run")" ] && compiled ${how[@]+"${how[@]}"}; then
    say "it failed before its first checkpoint: once more with compile=false"
    train "training, not compiled" ${how[@]+"${how[@]}"} compile=false
  fi
  if [ -e "$run/encoder.safetensors" ]; then
    evaluate "$run" loader=device
    bring_back "$run/encoder.safetensors" encoder.safetensors 0
  elif [ -n "$(newest "$run")" ]; then
    say "the run is not finished: bring all of $(basename "$(newest "$run")") back, and B resumes it"
    bring_back "$(newest "$run")" "$(basename "$(newest "$run")")" 0
    evaluate "$run" loader=device random_encoder=false
  fi
}

call_c() {
  data
  local run=$STATE/cifar10_cpu steps=()
  [ "$DEVICE" = cpu ] && steps=(optim.steps=4)
  # shellcheck disable=SC2046,SC2086 # many words each
  step "training, the laptop's recipe" 100 TERM "$PYTHON" -m simclr_ddp.pretrain configs/pretrain/cifar10_cpu.yaml \
    $(train_on) run_dir="$run" $tiny ${steps[@]+"${steps[@]}"}
  [ -z "$(newest "$run")" ] || evaluate "$run" size=32
  # shellcheck disable=SC2046,SC2086 # many words each
  step "the step in other ways" 90 TERM "$PYTHON" -m benchmarks.gpu.suite variants "$OUT/variants.json" \
    configs/pretrain/cifar10_gpu.yaml $(train_on) optim.global_batch_size=512 $tiny
}

case $CALL in
  A) call_a ;;
  B) call_b ;;
  C) call_c ;;
  parts)
    file=$(newest "$STATE/cifar10_gpu")
    [ -n "$file" ] || { say "error: $STATE holds no checkpoint: the machine is another, or B has not run"; exit 1; }
    bring_back "$file" "$(basename "$file")" 4
    exit
    ;;
  gather)
    resume "$STATE/cifar10_gpu"
    exit
    ;;
esac
timeout -k 5 $((SECONDS_LEFT - SECONDS > LAST ? SECONDS_LEFT - SECONDS : LAST)) \
  "$PYTHON" -m benchmarks.gpu.suite compare "$OUT" 2>&1 | tee "$OUT/$CALL.txt" | tee -a "$LOG"
[ "$DEVICE" != cpu ] || say "a rehearsal at tiny size: its results say nothing about a GPU"
say "$(printf '%s\n' "call $CALL on $DEVICE, $SECONDS s of $SECONDS_LEFT:" "${verdicts[@]}")"
for verdict in "${verdicts[@]}"; do
  case $verdict in passed* | paused*) ;; *) exit 1 ;; esac
done
