"""Find the commands, options, snippets and links in README.md and docs/*.md, and check them without running them.

A command is checked as far as possible without its data, GPUs or hours: by the command's `main` with --dry-run, which
reads its config file and options; torchrun, make and pip have separate checks.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

from benchmarks.support.timing import take_flags
from launch import slurm
from simclr_ddp.config import command, options
from simclr_ddp.config.schema import Doctor, Finetune, Verify
from tests.support.processes import ROOT

PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
LANGUAGES = ("bash", "console", "python", "text", "yaml")
# At the start of `inline code` these say that it is a command.
PROGRAMS = ("python", "torchrun", "make", "pip", "bash", "sbatch", "simclr")
OF_THE_SYSTEM = ("sinfo", "sacctmgr")
SLURM = ("sbatch", "scancel", "scontrol", "squeue", "sacct", "srun")
WITHOUT_DRY_RUN = ("benchmarks.loss", "benchmarks.gpu.log_sums")
SECTIONS = {key.split(".")[0] for cls in (Doctor, Verify) for key in options.options(cls) if "." in key}
EXAMPLES = {"CONFIG.yaml": "configs/pretrain/spirograph.yaml", "COMMAND": "simclr_ddp.pretrain"}
EXAMPLES_FOR = {
    "launch.slurm": EXAMPLES | {"CONFIG.yaml": "configs/slurm/one_node.yaml"},
    "launch.sweep": {"CONFIG.yaml": "configs/sweep/kernel_infonce.yaml"},
}


class Fence(NamedTuple):
    language: str
    quick: bool  # ```python quick: to be run by a test
    line: int
    body: str


def text(page: str, heading: str = "") -> str:
    """Return the text of a page, or of the section with that heading."""
    content = (ROOT / page).read_text()
    return content.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0] if heading else content


def fences(content: str) -> list[Fence]:
    """Return the fenced blocks. Raises ValueError for an unknown language, and for an indented block."""
    found: list[Fence] = []
    begin, info, body = 0, "", []
    for number, line in enumerate(content.splitlines(), start=1):
        if line.startswith("```") and not begin:
            begin, info, body = number, line[3:], []
            if info.partition(" ")[0] not in LANGUAGES:
                raise ValueError(f"line {number}: a block of {info or 'no language'}, not of {', '.join(LANGUAGES)}")
        elif line.startswith("```"):
            language, _, word = info.partition(" ")
            found.append(Fence(language, word == "quick", begin, "\n".join(body) + "\n"))
            begin = 0
        elif begin:
            body.append(line)
        elif line.startswith(("    ", "\t")):
            raise ValueError(f"line {number}: an indented block, where a fenced one is checked")
    return found


def prose(content: str) -> str:
    return re.sub(r"^```.*?^```$", "", content, flags=re.M | re.S)


def spans(content: str) -> list[str]:
    """Return the `inline code`, also if it continues on the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(content))]


def commands(content: str) -> list[list[str]]:
    """Return the words of each command in the blocks and the inline code."""
    lines: list[str] = []
    for fence in fences(content):
        body = fence.body.replace("\\\n", " ").splitlines()
        if fence.language == "bash":
            lines += body
        elif fence.language == "console":
            lines += [line[2:] for line in body if line.startswith("$ ")]
    lines += [span for span in spans(content) if span.split()[0] in PROGRAMS and " " in span]
    found: list[list[str]] = []
    for line in lines:
        found.append([])
        for word in shlex.split(line, comments=True):
            if word == "&&":
                found.append([])
            else:
                found[-1].append(word)
    return [words for words in found if words]


def commands_of_config(path: Path) -> list[list[str]]:
    """Return the words of each command in the comment at the top of a config file."""
    head = "".join(line[1:] for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    lines = [re.sub(r"^ *(\w+:)? *", "", line) for line in head.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"(python|torchrun|sbatch) -", line)]


def write_files(folder: Path) -> None:
    """Write the files that the commands name: YAML blocks that begin with `# NAME.yaml`, configs/, a sweep's result."""
    for page in PAGES:
        with contextlib.suppress(ValueError):  # the page's own test reports it
            for fence in fences(text(page)):
                if fence.language == "yaml" and (name := re.match(r"# ([\w-]+\.yaml)\n", fence.body)):
                    (folder / name[1]).write_text(fence.body)
    (folder / "configs").symlink_to(ROOT / "configs")
    best = folder / "runs" / "sweep" / "NAME" / "best.yaml"
    best.parent.mkdir(parents=True)
    best.write_text("seed: 1\n")
    for tool in SLURM:
        path = folder / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)


def check(words: list[str], data: Path) -> None:
    """Raise ValueError for a command that would not start as written, or that can't be checked here.

    data  a small .beton file with classes, in place of the one that a job or a sweep's trials train on
    """
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "python" and arguments[:1] == ["-m"]:
        check_module(arguments[1], arguments[2:], data)
    elif program == "torchrun":
        check_torchrun(arguments, data)
    elif program == "simclr":
        if arguments[0] != "COMMAND":
            check_module(f"simclr_ddp.{arguments[0]}", arguments[1:], data)
    elif program == "sbatch":
        script, module, *arguments = [word for word in arguments if not word.startswith("--")]
        if not (ROOT / script).is_file():
            raise ValueError(f"{script} does not exist")
        check_module(module, arguments, data)
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "bash" or "/" in program:
        script, *arguments = arguments if program == "bash" else words
        if not os.access(ROOT / script, os.X_OK if program != "bash" else os.R_OK):
            raise ValueError(f"{script} does not exist, or can't be executed")
        if program == "bash" and not re.search(rf"^ +{arguments[0]}\) ", (ROOT / script).read_text(), re.M):
            raise ValueError(f"{script} takes no {arguments[0]}")
    elif words != [".", ".venv/bin/activate"] and program not in OF_THE_SYSTEM:
        raise ValueError(f"{program}: tests/support/pages.py has no check for it")


def check_module(module: str, arguments: list[str], data: Path) -> None:
    if module == "simclr_ddp.COMMAND":
        return
    path = ROOT / module.replace(".", "/")
    if not path.with_name(f"{path.name}.py").is_file() and not (path / "__init__.py").is_file():
        raise ValueError(f"there is no module {module}")
    arguments = [word.strip("[]") if re.fullmatch(r"\[[A-Z_.a-z]+\]", word) else word for word in arguments]
    examples = EXAMPLES_FOR.get(module, EXAMPLES)
    arguments = [examples.get(word, word.removesuffix("...")) for word in arguments]
    if module == "simclr_ddp":
        return  # lists the commands
    imported = importlib.import_module(module)
    if module in WITHOUT_DRY_RUN:
        if unknown := take_flags(arguments, imported.FLAGS)[1]:
            raise ValueError(f"{module} takes no {unknown[0]}")
        return
    arguments = [word for word in arguments if word not in ("--wait", "--dry-run")]
    arguments.insert(arguments.index("--") if "--" in arguments else len(arguments), "--dry-run")
    if module == "launch.slurm" and "simclr_ddp.pretrain" in arguments:
        arguments.insert(arguments.index("--"), "check=false")
        arguments.append(f"data.train={data}")  # names the run directory
    if module == "launch.sweep":
        fewer = ["grid.seed=[0]"] if "grid:\n" in Path(arguments[0]).read_text() else ["trials=2"]
        arguments += [f"set.data.train={data}", "set.optim.global_batch_size=8", *fewer]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = imported.main(arguments)
    if status:
        raise ValueError(f"{module} exits with {status}: {output.getvalue()}")


def check_torchrun(arguments: list[str], data: Path) -> None:
    from torch.distributed.run import get_args_parser

    for example, number in {"N": "2", "MIN:MAX": "1:2"}.items():
        arguments = [re.sub(rf"={example}$", f"={number}", word) for word in arguments]
    if "-m" not in arguments:  # inline code that shows only a flag
        arguments = [*arguments, "-m", "simclr_ddp.pretrain"]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            parsed = get_args_parser().parse_args(arguments)
    except SystemExit:
        raise ValueError(f"torchrun refuses it: {output.getvalue()}") from None
    check_module(parsed.training_script, parsed.training_script_args, data)


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        if not re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.M):
            raise ValueError(f"the Makefile has no {name}")


def check_pip(arguments: list[str]) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    if arguments[:1] != ["install"]:
        raise ValueError(f"pip {arguments[0]}: only pip install is checked")
    for word in arguments[1:]:
        extras = re.fullmatch(r"\.\[([\w,]+)\]", word)
        if extras is None and word != "." and not word.endswith(".whl"):
            raise ValueError(f"pip install {word}: neither this package nor a wheel")
        for extra in extras[1].split(",") if extras else []:
            if extra not in setup["options.extras_require"]:
                raise ValueError(f"setup.cfg has no extra {extra}")


def check_options(content: str) -> None:
    """Raise ValueError for inline code `section.option` or `section.option=value` that no command accepts."""
    known = options.options(Finetune) | options.options(Doctor) | options.options(Verify)
    for word in (word for span in spans(content) for word in span.split()):
        key, is_set, value = word.partition("=")
        if key.endswith(".safetensors"):  # a file
            continue
        if key.partition(".")[0] not in SECTIONS or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key):
            continue
        if key not in known:
            raise ValueError(f"{word}: there is no option {key}")
        if is_set and value != "N":
            cls = next(cls for cls in (Doctor, Verify, Finetune) if key in options.options(cls))
            options.checked(cls, "a page", *options.parse_override(word))


def check_flags(content: str) -> None:
    """Raise ValueError for inline code `--flag` that neither all commands, launch.slurm nor torchrun accept."""
    from torch.distributed.run import get_args_parser

    known = {*command.FLAGS, *slurm.FLAGS, *re.findall(r"--[\w-]+", get_args_parser().format_help())}
    for span in spans(content):
        flag = re.match(r"--[\w-]+", span)
        if flag and flag[0] not in known:
            raise ValueError(f"{span}: no command takes {flag[0]}")


def check_tests(content: str) -> None:
    """Raise ValueError for inline code that names a test file that does not exist in any folder."""
    for name in re.findall(r"\b(?:test_\w+|chaos)\.py", " ".join(spans(content))):
        if not list((ROOT / "tests").rglob(name)):
            raise ValueError(f"there is no {name} in tests/")


def check_links(page: str) -> None:
    """Raise ValueError for a relative link to a file or heading that does not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text(page))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name) if name else ROOT / page
        if not path.exists():
            raise ValueError(f"{target} does not exist")
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
        if anchor and anchor not in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}:
            raise ValueError(f"{target}: {path.name} has no such heading")
