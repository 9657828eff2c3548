# shellcheck shell=bash
# Functions of a job's batch script, which holds a copy of this file: whether the job is queued again when its ranks end.
#
# The ranks can't decide this: a container has no scontrol, and they notice a lost node before SLURM does. scancel kills
# the batch script at once, so a cancelled job is not queued again.

# last_saved RUN_DIR: prints which checkpoint is the newest.
last_saved() { cat "$1/checkpoints/latest" 2>/dev/null; }

# comes_back ENDED SAVED STARTS: whether the job is queued again.
#
# ENDED, why this start ended         a checkpoint newer than      STARTS in a row that ended like    queued again
#                                     all before it: SAVED         this (paused, or not) without
# pause                               saved                        -                                  yes
# pause                               nothing                      at most 10                         yes
# preemption, not met, node failure   saved                        -                                  yes
# preemption, not met, node failure   nothing                      at most 3                          yes
# command (finished or failed)        either                       any                                no
#
# pause: a rank reported that it received a signal and has saved. preemption: a signal killed a rank before it could
# handle it. not met: the signal came before all nodes had met. Without the limits, a job that makes no progress would
# be queued forever: one that fails at every start can look like a preemption, since srun ends the other ranks by SIGTERM
# and returns the highest status. A rank that fails by itself leaves a file that says so, if it can.
comes_back() {
  case "$1, $2" in
    command,*) return 1 ;;
    *", saved") return 0 ;;
    pause,*) [ "$3" -le 10 ] ;;
    *) [ "$3" -le 3 ] ;;
  esac
}

# node_failed LOG FROM: whether a node of the job has failed. SLURM must say so, in the log from that byte on or of a new
# step on all nodes, or this step must start on some nodes only: if it is refused, or waits for resources or for a busy
# controller, this says nothing about the nodes.
node_failed() {
  local said status answers words='failed on node|node failure|missing step on node'
  [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || return 1
  ! tail -c "+$(($2 + 1))" "$1" 2>/dev/null | grep -qiE "^(srun|slurmstepd).*($words)" || return 0
  said=$(
    # Variables by which srun would ask for memory and GPUs, which the ranks may still hold.
    unset "${!SLURM_MEM_@}" "${!SLURM_GPU@}" "${!SLURM_TRES@}" "${!SLURM_CPUS_PER@}" "${!SLURM_NTASKS_PER@}"
    timeout 60 srun --overlap --mem=0 --gres=none --cpus-per-task=1 --nodes="$SLURM_JOB_NUM_NODES" \
      --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 echo here 2>&1
  )
  status=$?
  [ "$status" -ne 0 ] || return 1
  answers=$(grep -c '^here$' <<<"$said")
  grep -qiE "$words" <<<"$said" || { [ -z "$said" ] && [ "$status" -ne 124 ]; } ||
    { [ "$answers" -gt 0 ] && [ "$answers" -lt "$SLURM_JOB_NUM_NODES" ]; }
}

# queued JOB: whether the job has been queued again since this start, by us or by SLURM.
queued() {
  local restarts
  restarts=$(scontrol -o show job "$1" 2>/dev/null | grep -o 'Restarts=[0-9]*')
  [ -n "$restarts" ] && [ "$restarts" != "Restarts=${SLURM_RESTART_COUNT:-0}" ]
}

# queue_again STATUS RUN_DIR FOLDER JOB BEFORE FROM END: ends the batch script; STATUS is the ranks', BEFORE what
# last_saved printed and FROM the size of the log when they began, END when the time limit is reached, in seconds since
# 1970.
queue_again() {
  local status=$1 note=$3/$4.again record=$3/$4.lost failed=$3/$4-${SLURM_RESTART_COUNT:-0}.failed
  local ended=command saved=nothing best=$5 lost=0 pauses=0 starts newest until said="" over="" done=""
  trap 'over=1' TERM # of scancel, of the time limit, or of SLURM, which ends this script when it has queued the job again
  newest=$(last_saved "$2")
  if [ "$status" -eq 0 ]; then
    [ ! -e "$note" ] || ended=pause
    [ "$(cat "$note" 2>/dev/null)" != "stopped before the ranks had met" ] || ended="not met"
  elif [[ " 129 130 131 138 140 143 152 " = *" $status "* ]] && [ ! -e "$failed" ]; then
    ended=preemption # 128 + HUP, INT, QUIT, USR1, USR2, TERM or XCPU
  elif node_failed "$3/$4_0_log.out" "$6"; then
    ended="node failure"
  fi
  rm -f "$failed"
  [ "$ended" != command ] || exit "$status"
  [ ! -e "$record" ] || read -r lost pauses best <"$record"
  if [[ "$newest" > "$best" ]]; then # names of checkpoints sort by step
    saved=saved best=$newest lost=0 pauses=0
  elif [ "$ended" = pause ]; then
    pauses=$((pauses + 1))
  else
    lost=$((lost + 1))
  fi
  echo "$lost $pauses $best" >"$record"
  starts=$lost
  [ "$ended" != pause ] || starts=$pauses
  if ! comes_back "$ended" "$saved" "$starts"; then
    echo "error: $ended before anything was saved, as in the previous starts: the job is not queued again" \
      "($starts starts without a new checkpoint; the newest: ${newest:-none}); the command that submitted it resumes the run"
    [ "$status" -ne 0 ] || status=1
    exit "$status"
  fi
  [ "$ended" != "node failure" ] || echo "a node failed"
  if queued "$4"; then # after a node failure, by SLURM itself
    exit "$status"
  fi
  case "$ended" in pause | "not met") ;; *) echo "$ended" >"$note" ;; esac
  # A rank can't distinguish a preemption without a user signal from a requeue, which would have killed this script.
  sed -i "s/^scontrol requeue$/preemption/" "$note"
  # A busy controller answers later, perhaps after it has queued the job. END is too early if the job was suspended, but
  # SIGTERM comes at the end in any case.
  until=$(($(date +%s) + 300))
  [ "$until" -gt "$7" ] || until=$7
  while [ -z "$over$done" ]; do
    if said=$(scontrol requeue "$4" 2>&1); then
      done=1
    elif queued "$4"; then # the answer was lost
      done=1 said=""
    elif [[ $said = *denied* || $said = *disabled* || $said = *"Invalid job"* || $(date +%s) -ge $until ]]; then
      over=1
    elif [ -z "$over" ]; then
      sleep 3 &
      wait $! # which SIGTERM ends
    fi
  done
  if [ -z "$done" ] && ! queued "$4"; then
    [ -n "$said" ] && said="scontrol requeue failed until the allocation ended ($said)"
    echo "error: job $4 is NOT queued again: ${said:-it was cancelled, or has reached its time limit};" \
      "\`scontrol requeue $4\` or the command that submitted it resumes the run"
    exit 1
  fi
  echo "job $4 is queued again"
  [ -z "$said" ] || echo "$said"
  exit 0
}
