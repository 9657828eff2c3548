"""The copy of code and config that a job runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.cluster import batch_script, snapshot
from launch.cluster import submit as submission
from launch.cluster.settings import Plan, Slurm
from tests.support import processes

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def write_copies(plan: Plan) -> None:
    snapshot.write(plan.files, plan.code)
    if plan.configs:
        snapshot.write(plan.configs, plan.config)


def test_the_snapshot_holds_the_code_and_the_config(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    command = ["simclr_ddp.pretrain", "mine.yaml", "seed=1"]
    plan = submission.make_plan(command)
    plan.folder.mkdir(parents=True)
    write_copies(plan)
    assert (plan.code / "simclr_ddp/pretrain.py").read_bytes() == (
        processes.ROOT / "simclr_ddp/pretrain.py"
    ).read_bytes()
    (tmp_path / "mine.yaml").write_text("seed: 4\n")
    module, copy, override = snapshot.with_copies(plan.command, plan.config)
    assert (module, override) == ("simclr_ddp.pretrain", "seed=1")
    assert Path(copy).name == "mine.yaml" and Path(copy).read_text() == "seed: 3\n"
    assert submission.make_plan(command).config != plan.config, "other settings are another copy"
    write_copies(plan)  # again
    assert {path.name for path in plan.folder.iterdir()} == {plan.code.name, plan.config.name}


def test_a_snapshot_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in snapshot.PACKAGES:
        shutil.copytree(processes.ROOT / package, tmp_path / "site" / package)
    (tmp_path / "site" / "another.py").write_text("")
    monkeypatch.setattr(snapshot, "ROOT", tmp_path / "site")
    files = snapshot.sources()
    assert Path("another.py") not in files and not files[Path("COMMIT")]
    assert {Path(name) for name in ("simclr_ddp/pretrain.py", "simclr_ddp/training/step.py")} <= files.keys()
    read_by_jobs = ("launch/cluster/requeue.sh", "simclr_ddp/plots/atlas.html", "simclr_ddp/plots/atlas.js")
    assert {Path(name) for name in read_by_jobs} <= files.keys()


@pytest.mark.parametrize("git", [True, False])
def test_a_snapshot_holds_nothing_of_runs(git: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those in the checkout that git does not ignore, or in a package."""
    root = tmp_path / "site"
    for package in snapshot.PACKAGES:
        shutil.copytree(processes.ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "configs/slurm").mkdir(parents=True)
    (root / "configs/slurm/mine.yaml").write_text("nodes: 2\n")
    if git:
        for arguments in ("init -q", "add .", "-c user.name=x -c user.email=x commit -q -m x"):
            subprocess.run(["git", "-C", root, *arguments.split()], check=True)
    (root / "launch/new.py").write_text("")
    monkeypatch.setattr(snapshot, "ROOT", root)
    first = snapshot.sources()
    assert {Path("launch/new.py"), Path("simclr_ddp/plots/atlas.js")} <= first.keys()
    assert (Path("configs/slurm/mine.yaml") in first) == git
    for run in ("experiments/a", "launch/b"):
        plan = submission.make_plan(["simclr_ddp.pretrain", f"run_dir={root / run}"])
        plan.folder.mkdir(parents=True)
        write_copies(plan)
        shutil.copytree(plan.code, plan.folder / f".{plan.code.name}.1.tmp")  # as another submission writes it
        (plan.run_dir / "config.yaml").write_text("seed: 1\n")
        assert snapshot.sources() == first


def test_a_snapshot_is_shared(tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "code-1", tmp_path / "b" / "code-1"
    for folder in (first.parent, second.parent):
        folder.mkdir()
    snapshot.write({Path("x"): b"1"}, first)
    for _ in range(2):
        snapshot.link(second, first)
        assert (second / "x").read_bytes() == b"1" and second.is_symlink()
    shutil.rmtree(first.parent)
    snapshot.write({Path("x"): b"1"}, second)  # by a later job, when the first's run directory has gone
    assert (second / "x").read_bytes() == b"1" and not second.is_symlink()


def test_runs_of_an_array_share_the_code_and_not_the_config(tmp_path: Path) -> None:
    plans = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trial.yaml").write_text(f"run_dir: {tmp_path / name}\n")
        plans.append(submission.make_plan(["simclr_ddp.pretrain", str(tmp_path / name / "trial.yaml")]))
    one, two = batch_script.sharing(plans)
    assert one.code == two.code and one.config.parent == one.folder and two.config.parent == two.folder
    two.folder.mkdir()
    write_copies(two)
    copy = submission.describe(Slurm(), two).command[1]
    assert Path(copy).read_text() == (tmp_path / "b" / "trial.yaml").read_text() and Path(copy).name == "trial.yaml"
