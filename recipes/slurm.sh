#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
# A command as a Slurm job that is queued again until it has finished:
#   sbatch --nodes=1 --gpus-per-node=8 --time=4:00:00 recipes/slurm.sh bash recipes/sft_chat.sh
# Five minutes before the limit Slurm signals; the ranks save, and the job is queued again, whatever the command was
# doing. The same happens when --max_minutes of the command is over, for clusters that send no signal. A command that
# fails unsignalled is not queued again.
set -uo pipefail
group='' told='' again=1
stop() {
  told=1 again=1
  [ -z "$group" ] || kill -TERM -- "-$group" 2> /dev/null || kill -TERM "$group" 2> /dev/null  # not a group yet
}
trap stop TERM USR1
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 1
export CLEANALIGN_STOPPED="$PWD/.stopped-$SLURM_JOB_ID"  # a run that was stopped and has saved makes this file
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}  # seconds to save in
rm -f "$CLEANALIGN_STOPPED"
setsid "$@" &  # a group of its own: the signal must reach torchrun, whatever shell has started it
group=$!
[ -z "$told" ] || stop
while [ -n "$again" ]; do  # a signal ends `wait` with a code that is not the command's
  again=''
  wait "$group"
  code=$?
done
while kill -0 -- "-$group" 2> /dev/null; do sleep 0.2; done  # the signal ends the shell before the ranks have saved
if [ -e "$CLEANALIGN_STOPPED" ] || { [ -n "$told" ] && [ "$code" -ne 0 ]; }; then
  rm -f "$CLEANALIGN_STOPPED"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
