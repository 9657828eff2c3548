"""Check software, data, memory and recipe before a run: `python -m simclr_ddp.doctor [CONFIG.yaml] key=value ...`

Each line says ok, warning or error, and what to do. The command trains a few steps and discards them; it writes one
file to the run directory and deletes it again. doctor.ranks is the number of processes that the run will have on this
machine. Every start of `pretrain` makes the quick part of these checks. Exit status: 1 if there is an error.
"""

import sys

from simclr_ddp.config import command
from simclr_ddp.config.schema import Doctor
from simclr_ddp.system import console


def main(argv: list[str] | None = None) -> int:
    return command.run(doctor, Doctor, "[CONFIG.yaml]", __doc__ or "", argv)


def doctor(settings: Doctor) -> int:
    from simclr_ddp.training.examination import examine  # here, so that --help needs no torch

    failed, reported = False, set()
    for finding in examine(settings):
        if finding in reported:  # two checks may fail for the same reason
            continue
        reported.add(finding)
        console.say(f"{finding.level:<8} {finding.text}")
        failed |= finding.level == "error"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
