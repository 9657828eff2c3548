# shellcheck shell=bash
# Steps with a time limit, sourced by plan.sh, which sets CALL, OUT, LOG and SECONDS_LEFT.
LAST=${LAST:-0}        # seconds of SECONDS_LEFT that are kept for what follows the steps
PART=${PART:-15728640} # bytes of a part of a file that comes back
FACTOR=${FACTOR:-1}    # multiplies the limits of all steps
GRACE=${GRACE:-10}     # seconds between the signal that ends a step and the one that kills it
verdicts=()
group='' mark=''

say() { echo "$*" | tee -a "$LOG"; }

# The seconds that are left for steps.
left() { echo $((SECONDS_LEFT - LAST - SECONDS)); }

# The processes that a step has started and that still live: those of its group, and those that carry its mark in their
# environment, since launchers and tests start processes in groups of their own.
of_the_step() {
  {
    # By cat, which passes over a process that ends meanwhile: mawk reads no file after one that is missing.
    cat /proc/[0-9]*/stat | awk -v group="$group" '{ pid = $1; sub(/.*\) /, "") } $3 == group && $1 != "Z" { print pid }'
    grep -lzx "PLAN_STEP=$mark" /proc/[0-9]*/environ | cut -d / -f 3
  } 2>/dev/null | sort -un
}

kill_the_step() {
  local pids
  [ -n "$group" ] || return 0
  for _ in 1 2 3 4 5; do
    pids=$(of_the_step)
    [ -n "$pids" ] || break
    # shellcheck disable=SC2086 # many words
    kill -KILL $pids 2>/dev/null
    sleep 0.2
  done
  group=''
}

trap 'kill_the_step; say "stopped by a signal"; exit 143' TERM INT HUP

# step NAME SECONDS SIGNAL COMMAND...   with at most that many seconds, or as many as are left when it has been killed;
# $status is its own
step() {
  local name=$1 limit=$(($2 * FACTOR)) signal=$3 begin=$SECONDS verdict
  shift 3
  [ "$limit" -le $(($(left) - GRACE)) ] || limit=$(($(left) - GRACE))
  if [ "$limit" -lt 5 ]; then
    verdicts+=("left out  $name: no time is left")
    say "== $name: left out, no time is left"
    status=1
    return
  fi
  say "== $name: at most $limit s: $*"
  local from
  from=$(stat -c %s "$LOG")
  mark=$CALL-$$-$RANDOM$RANDOM
  PLAN_STEP=$mark setsid timeout --foreground --preserve-status -s "$signal" -k "$GRACE" "$limit" "$@" >>"$LOG" 2>&1 </dev/null &
  group=$!
  wait "$group"
  status=$?
  kill_the_step
  case $status in
    0) verdict="passed   " ;;
    75) verdict="paused   " ;; # of a training: saved, to be resumed
    *) verdict="failed   " ;;
  esac
  [ "$status" = 75 ] || [ $((SECONDS - begin)) -lt "$limit" ] || verdict="cut off  "
  verdicts+=("$verdict $name: $((SECONDS - begin)) s, status $status")
  tail -c "+$((from + 1))" "$LOG" | tail -n 12 | cut -c 1-300
  say "== ${verdicts[-1]}"
}

# FILE NAME FIRST   parts FIRST to FIRST + 3 of a file into $OUT, and its checksum
bring_back() {
  local file=$1 name=$2 first=$3 size parts i
  size=$(stat -c %s "$file") || return 1
  parts=$(((size + PART - 1) / PART))
  for ((i = first; i < parts && i < first + 4; i++)); do
    dd if="$file" of="$OUT/$(printf '%s.part%02d' "$name" "$i")" bs="$PART" skip="$i" count=1 status=none || return 1
  done
  sha256sum <"$file" | sed "s/ .*/  $name/" >"$OUT/$name.sha256"
  say "$name: $parts parts of 15 MiB, of which $first to $((i - 1)) are here"
}
