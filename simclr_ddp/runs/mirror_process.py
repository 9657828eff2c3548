"""The process of a mirror: it follows the metrics.jsonl of a run and copies the lines to W&B or TensorBoard.

`runs.mirrors` starts it as a script and speaks with it in lines: on stdin the task as JSON and at the end the exit
status of the run, on stdout one JSON object per sign of life. It imports nothing of this package.
"""

import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

FINISHING = 60  # seconds after which it ends, whatever it waits for, once the run has ended


class Target(NamedTuple):
    where: str  # for the user
    write: Callable[[list[dict[str, Any]]], None]  # takes new lines of metrics.jsonl
    finish: Callable[[int], None]  # takes the exit status of the run


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the packages print must not be taken for an answer

    def answer(**values: str) -> None:
        print(json.dumps(values), file=answers, flush=True)

    orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    task = json.loads(orders.readline())
    try:
        target = {"wandb": wandb_run, "tensorboard": tensorboard_file}[task["kind"]](task)
        answer(opened=target.where)
        status, lines = None, new_lines(Path(task["run_dir"], "metrics.jsonl"))
        while status is None:
            if select.select([orders], [], [], 1)[0]:
                text = orders.readline().strip()
                status = int(text) if text.isdigit() else 1  # at the end of the file the run was killed
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(FINISHING)
            target.write(next(lines))
            answer()
        target.finish(status)
        answer(finished="")
    except BaseException as error:
        answer(failed=f"{type(error).__name__}: {error}")
    answers.flush()
    os._exit(0)  # the packages may wait for a server at the end of Python


def new_lines(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the complete lines that were appended since the last time, for ever."""
    rest = b""
    with path.open("rb") as file:
        while True:
            *lines, rest = (rest + file.read()).split(b"\n")
            yield [json.loads(line) for line in lines]


def wandb_id(run_dir: Path) -> str:
    """Return an id of the run directory, so that a resumed run continues its curves and not another run's."""
    path = run_dir.resolve()
    digest = sha256(json.dumps({"run_dir": str(path)}).encode()).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9_.=-]', '-', path.name)[:80]}-{digest}"  # W&B refuses some characters


def wandb_run(task: dict[str, Any]) -> Target:
    import wandb

    run_dir = Path(task["run_dir"])
    run = wandb.init(
        project="simclr_ddp",
        id=wandb_id(run_dir),
        name=run_dir.resolve().name[:128],
        dir=str(run_dir),
        config=task["config"],
        resume="allow",
        mode="offline" if task["offline"] else None,
    )
    first = run.step  # of a run that is continued online: W&B has the lines before it

    def write(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["step"] >= first:
                run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    where = run.url or f"offline in {run_dir}/wandb, `wandb sync` uploads it"
    return Target(where, write, lambda status: run.finish(exit_code=status))


def tensorboard_file(task: dict[str, Any]) -> Target:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder, after = os.path.join(task["run_dir"], "tensorboard"), task["resume_step"]
    writer = EventFileWriter(folder)
    # TensorBoard removes what earlier files hold from this step on.
    start = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=after + 1, session_log=start))

    def write(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["step"] > after:
                values = [Summary.Value(tag=k, simple_value=v) for k, v in line.items() if k != "step"]
                writer.add_event(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))
        writer.flush()

    return Target(folder, write, lambda status: writer.close())


if __name__ == "__main__":
    main()
