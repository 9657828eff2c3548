"""An sbatch script for those who write their own: torchrun on each node, which starts a rank for each GPU."""

import shlex
from typing import Any

TEXT = """\
#!/bin/bash
# Submit with: sbatch THIS_FILE   It saves and goes on by itself before its time limit, when preempted, and on scontrol
# requeue: SLURM's warning (USR1) reaches this shell, which tells the ranks (SIGTERM), waits and queues the job again.
{options}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning}

trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
{lines}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \\
  {python} -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node={ranks} \\
  --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:$((20000 + SLURM_JOB_ID % 40000))" \\
  -m {command} &
wait $!
status=$?
if [ -n "$told" ]; then  # the signal ended the waiting, not srun
  wait
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def text(settings: Any, command: list[str], ranks: int, variables: dict[str, str]) -> str:
    """The script for the settings of launch.slurm; `ranks` of the command on each node."""
    wanted = {
        "job-name": settings.name,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": settings.gpus_per_node or "",
        "cpus-per-task": settings.cpus_per_task * ranks,
        "mem": f"{settings.memory_gb}GB" if settings.memory_gb else "",
        "time": settings.minutes,
    }
    names = ("partition", "account", "qos", "constraint", "exclude", "dependency", "comment")
    wanted |= {name: getattr(settings, name) for name in names}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return TEXT.format(
        options="\n".join(f"#SBATCH --{k}={shlex.quote(str(v))}" for k, v in wanted.items() if v != ""),
        warning=settings.warning_seconds,
        lines="\n".join([*exports, *settings.setup]),
        python=shlex.join(settings.python or ["python"]),
        ranks=ranks,
        command=shlex.join(command),
    )
