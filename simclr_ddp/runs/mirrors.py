"""Mirrors of metrics.jsonl in Weights & Biases and TensorBoard, which can't end, delay or prevent a run.

Each mirror is a process of its own (`mirror_process`) that follows the file, and a thread here that starts it, waits
for its signs of life, ends it if it hangs, and starts it again after a while if it fails. Training waits for neither of
them, except for some seconds at its end.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from simclr_ddp.runs import mirror_process
from simclr_ddp.system.console import say, warn
from simclr_ddp.system.errors import one_line

TITLES = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}
LOOK = 0.25  # seconds between two looks at a mirror
# Seconds without a sign of life after which a mirror that opens, or one that is open, counts as hanging. W&B itself
# waits 90 seconds for its server.
OPENING, OPEN = 120.0, 60.0
CLOSING = 15.0  # seconds that a mirror has at the end of a run to complete what it copies
RETRY = 60.0  # seconds after which a mirror that failed is started again


class Mirror:
    """Copies metrics.jsonl of a run directory to a mirror, from its construction until `close`; on rank 0 only.

    The first failure is shown as a warning. If W&B can't be opened, it is opened in its offline mode.

    kind         a key of TITLES
    resume_step  step of the checkpoint from which the run resumes
    """

    def __init__(self, kind: str, run_dir: Path, config: dict[str, Any], resume_step: int) -> None:
        self._kind, self._title, self._run_dir = kind, TITLES[kind], run_dir
        self._task = {"kind": kind, "run_dir": str(run_dir), "config": config, "resume_step": resume_step}
        self._opened, self._offline, self._warned = False, False, False
        self._status: int | None = None  # exit status of the run, once it has ended
        self._ended = threading.Event()
        # config.command.run waits for threads of this name for a limited time.
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self, failed: bool = False) -> None:
        """Let the mirror copy the last lines and end; `wait` waits for it."""
        self._status = int(failed)
        self._ended.set()

    def wait(self) -> None:
        """Wait for the end of the mirror, for at most the time that it and a second one in offline mode have."""
        self._thread.join(2 * CLOSING + 2)

    def _run(self) -> None:
        while fault := self._copy():
            falls_back = self._kind == "wandb" and not self._opened and not self._offline
            again = "logging offline, which `wandb sync` can upload" if falls_back else f"next try in {RETRY:g} s"
            if self._ended.is_set() and not falls_back:
                again = f"`wandb sync` may upload more of {self._run_dir}/wandb" if self._kind == "wandb" else ""
            if not self._warned:
                warn(f"{self._title}: {fault}; metrics.jsonl has all lines; {again}".rstrip("; "))
            self._warned = True
            if falls_back:
                self._offline = True
            elif self._ended.is_set():
                return
            else:
                self._ended.wait(RETRY)

    def _copy(self) -> str:
        """Start the process, and watch it until it ends; return why it failed, or ""."""
        self._opened = False
        command = [sys.executable, "-P", mirror_process.__file__]  # -P: the files beside it must not be imported
        environment = os.environ | {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            # A session of its own, so that Ctrl-C reaches the run alone; no buffers, so that `select` sees every line.
            with subprocess.Popen(
                command, 0, stdin=pipe, stdout=pipe, stderr=null, env=environment, start_new_session=True
            ) as process:
                try:
                    return self._watch(process)
                finally:
                    with suppress(OSError):
                        os.killpg(process.pid, signal.SIGKILL)
        except Exception as error:  # no memory for another process, a broken pipe, ...
            return f"its process failed ({one_line(error, 200)})"

    def _watch(self, process: "subprocess.Popen[bytes]") -> str:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(self._task | {"offline": self._offline}).encode() + b"\n")
        closing, silent = False, 0.0  # silence is counted in looks, so that a suspended run does not count
        while silent <= (CLOSING if closing else OPEN if self._opened else OPENING):
            if self._ended.is_set() and not closing:
                closing, silent = True, 0.0
                process.stdin.write(f"{self._status}\n".encode())
            if not select.select([process.stdout], [], [], LOOK)[0]:
                silent += LOOK
                continue
            text = process.stdout.readline()
            answer = json.loads(text) if text else {"failed": "its process has ended"}
            if "failed" in answer:
                return one_line(answer["failed"], 200)
            if "finished" in answer:
                return ""
            if "opened" in answer:
                self._opened = True
                say(f"{self._title}: {answer['opened']}")
            silent = silent if closing else 0.0
        return f"it has not answered for {silent:.0f} s"
