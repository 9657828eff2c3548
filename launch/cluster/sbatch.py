"""More options of sbatch for a job: those of the setting `sbatch`, and the variables SBATCH_… of the user's shell."""

import os
import re
from typing import Any

# Options of sbatch that the launcher sets or can't bear, with the setting to use instead; "" if there is none.
NO_SETTING = (
    "array chdir error help no-requeue open-mode output parsable quiet requeue test-only usage version wait wrap"
)
SAME = "nodes partition account qos constraint exclude dependency comment"
SETTINGS = dict.fromkeys(NO_SETTING.split(), "") | {name: name for name in SAME.split()}
SETTINGS |= {"job-name": "name", "ntasks-per-node": "tasks_per_node", "ntasks": "tasks_per_node", "mem": "memory_gb"}
SETTINGS |= {"time": "minutes", "signal": "warning_seconds", "export": "environment", "export-file": "environment"}
SETTINGS |= {"cpus-per-task": "cpus_per_task", "gpus": "gpus_per_node", "gpus-per-task": "gpus_per_node"}
# Variables of sbatch that are passed on, unless the setting is given; in lower case, without SBATCH_.
VARIABLES = """account acctg-freq clusters constraint core-spec cpus-per-gpu delay-boot distribution exclusive
    get-user-env gpu-bind gpu-freq gpus-per-node gres gres-flags hint mem-bind mem-per-cpu mem-per-gpu mem-per-node
    network no-kill overcommit partition power profile qos req-switch reservation spread-job thread-spec
    threads-per-core tres-bind tres-per-task use-min-nodes wait-all-nodes wckey"""
RENAMED = {"mem-per-node": "mem", "req-switch": "switches"}
GIVEN_BY = SETTINGS | dict.fromkeys(("gres", "gpus-per-node"), "gpus_per_node")
GIVEN_BY |= dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), "memory_gb")


def check(text: str) -> None:
    """ValueError for an entry of `sbatch` that is no option, or one that the launcher sets."""
    match = re.fullmatch(r"--([a-z][a-z0-9-]*)([= ].*)?", text)
    if match is None:
        raise ValueError(f"sbatch=[{text}]: not a long option of sbatch; write --NAME=VALUE or --NAME")
    name = match[1]
    for own, setting in sorted(SETTINGS.items()):
        if own.startswith(name):  # sbatch also accepts the beginning of a name
            way_out = f"set {setting}=... instead" if setting else "leave it out"
            raise ValueError(f"sbatch=[{text}]: the launcher sets --{own} itself; {way_out}")


def options(values: dict[str, Any]) -> dict[str, str | bool]:
    """{option: value, or True if it has none}; values are the job's settings."""
    found: dict[str, str | bool] = {}
    for name, value in _variables().items():
        if name in VARIABLES.split() and not values.get(GIVEN_BY.get(RENAMED.get(name, name), "")):
            found[RENAMED.get(name, name)] = value if value not in ("", "yes") else True
    for text in values["sbatch"]:
        name, *rest = re.split("[= ]", text.removeprefix("--"), maxsplit=1)
        found[name] = rest[0].strip() if rest else True
    return found


def ignored() -> list[str]:
    """The names of the variables that are not passed on."""
    names = [name for name in _variables() if name not in VARIABLES.split()]
    return [f"SBATCH_{name.upper().replace('-', '_')}" for name in names]


def gpus(found: dict[str, str | bool]) -> int:
    """GPUs per node that these options ask for; 0 if they don't mention any."""
    asked = [part for part in str(found.get("gres", "")).split(",") if re.match("gpu(:|$)", part)]
    asked += [str(found["gpus-per-node"])] if "gpus-per-node" in found else []
    counts = [re.sub(r"\(.*", "", part).rpartition(":")[2] for part in asked]  # without (S:0-1), a choice of sockets
    return sum(int(count) if count.isdigit() else 1 for count in counts)


def _variables() -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name.startswith("SBATCH_")}
    return {name.removeprefix("SBATCH_").lower().replace("_", "-"): value for name, value in sorted(found.items())}
