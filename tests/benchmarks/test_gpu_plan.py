"""The plan of a borrowed GPU's minutes, `benchmarks/gpu/plan.sh`: as a whole at tiny size, and its parts."""

import json
import os
import re
import signal
import subprocess
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import suite
from simclr_ddp.config.schema import Pretrain
from simclr_ddp.runs.metrics import read_metrics
from tests.support.processes import ROOT, wait_for_step

PLAN = ROOT / "benchmarks/gpu/plan.sh"


def start(name: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """A call of the plan on the CPU."""
    # As on a machine where nothing but the path is set.
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"DEVICE": "cpu", "OUT": str(folder / f"out-{name}"), "STATE": str(folder / "state")}
    return subprocess.Popen(
        ["bash", str(PLAN), name],
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def call(name: str, folder: Path, **variables: str) -> tuple[int, str, set[str]]:
    """(exit status, output, the names of the files that come back) once it has ended."""
    return finish(start(name, folder, **variables), folder / f"out-{name}")


def finish(process: subprocess.Popen[str], out: Path) -> tuple[int, str, set[str]]:
    output, _ = process.communicate(timeout=900)
    return process.returncode, output, {path.name for path in out.iterdir()}


def cut_off_b(folder: Path, step: int, **variables: str) -> tuple[int, str, set[str]]:
    """B, whose training receives the signal that ends a step once it has passed the given one."""
    process, run = start("B", folder, SECONDS_LEFT="900", **variables), folder / "state/cifar10_gpu"
    wait_for_step(run, step + 1, process, limit=600)
    (training,) = (
        path
        for path in running("simclr_ddp.pretrain")
        if f"run_dir={run}".encode() in path.read_bytes() and not path.read_bytes().startswith(b"timeout\0")
    )
    os.kill(int(training.parent.name), signal.SIGTERM)
    return finish(process, folder / "out-B")


def promised(name: str) -> set[str]:
    """The files that the head of the plan names for a call, where they need no checkpoint."""
    (text,) = re.findall(rf"^#     {name} +(\S.*?)(?:, and|$)", PLAN.read_text().split("at most eight files")[1], re.M)
    return set(text.split())


@pytest.mark.slow
def test_all_calls_at_tiny_size(tmp_path: Path) -> None:
    status, output, files = call("A", tmp_path, SECONDS_LEFT="800")
    assert status == 0, output
    assert files == promised("A") and len(files) == 8
    found = suite.measured(tmp_path / "out-A")
    assert found.keys() >= {"cifar step ms", "imagenet step ms", "imagenet peak GB", "cosine 32 tiled 32 ms"}
    assert "cosine 32 triton ms" in found and "laplacian 32 triton ms" in found

    status, output, files = call("B", tmp_path, SECONDS_LEFT="800")
    assert status == 0, output
    assert files == promised("B") | {"encoder.safetensors.part00", "encoder.safetensors.sha256"}
    with tarfile.open(tmp_path / "out-B" / "run.tgz") as archive:
        assert {"./metrics.jsonl", "./figures/curves.png"} <= set(archive.getnames())
    assert suite.measured(tmp_path / "out-B").keys() >= {"cifar10_gpu linear %", "cifar10_gpu seconds of 200 epochs"}

    status, output, files = call("C", tmp_path, SECONDS_LEFT="800")
    assert status == 0, output
    assert files == promised("C")
    figures = json.loads((tmp_path / "out-C" / "variants.json").read_text())["figures"]
    assert len(figures) == 4 and all(figure.get("ms", 0) > 0 for figure in figures.values()), figures
    assert "cifar10_cpu linear %" in suite.measured(tmp_path / "out-C")


@pytest.mark.slow
def test_a_run_that_is_cut_off_resumes_on_another_machine_from_the_parts_that_came_back(tmp_path: Path) -> None:
    """Part by part: the first four come with B, the others with a further call; they return in two calls, too."""
    first, second, parts = tmp_path / "first", tmp_path / "second", tmp_path / "parts"
    sizes = {"PART": "300000", "STEPS": "100000"}
    for folder in (first, second, parts):
        folder.mkdir()
    status, output, files = cut_off_b(first, 1, EPOCHS="150", **sizes)
    assert status == 0, output
    assert "paused    training" in output and "the run is not finished" in output, output
    (checksum,) = (name for name in files if name.endswith(".pt.sha256"))
    name = checksum.removesuffix(".sha256")
    assert files == promised("B") | {f"{name}.part0{i}" for i in range(4)} | {checksum}
    status, output, more = call("parts", first, **sizes)
    assert status == 0 and f"{name}.part04" in more, output

    (first / "out-B" / f"{name}.part01").rename(parts / f"{name}.part01")
    for path in (first / "out-parts").glob("step-*"):
        path.rename(parts / path.name)
    assert call("gather", second, RESUME=str(first / "out-B"))[0] == 1, "not all parts are there"
    reached = int(re.findall(r"\d+", name)[0])
    _, output, _ = cut_off_b(second, reached, RESUME=str(parts), **sizes)
    assert f"{name} is there: the run resumes from it" in output and "paused    training" in output, output
    assert "optim.epochs=150" in output, "the run's own, or it would not resume"
    with tarfile.open(second / "out-B" / "run.tgz") as archive:
        archive.extract("./metrics.jsonl", second, filter="data")
    steps = [line["step"] for line in read_metrics(second / "metrics.jsonl")]
    assert min(steps) <= reached < max(steps), "the lines before are those that the checkpoint holds"


def test_a_call_that_lacks_parts_of_its_checkpoint_fails(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "step-00000020.pt.part01").write_bytes(b"the second part")
    (parts / "step-00000020.pt.sha256").write_text("0" * 64 + "  step-00000020.pt\n")
    status, output, _ = call("B", tmp_path, SECONDS_LEFT="100", RESUME=str(parts))
    assert status == 1 and "failed    resuming: parts are missing" in output, output
    assert "== training" not in output


COMPILER_FAILS = """#!/bin/sh
case "$*" in
  *"suite tiny"*) touch "$4" "$5" ;;
  *"suite pace"*) echo "compile=true 1000 5 200" >"$4" ;;
  *pretrain*compile=false) mkdir "$STATE/cifar10_gpu" && touch "$STATE/cifar10_gpu/encoder.safetensors" ;;
  *pretrain*) exit 1 ;;
esac
"""


def test_a_compiler_that_fails_costs_b_its_speed_alone(tmp_path: Path) -> None:
    """And the epochs are those that fit at the measured pace."""
    python = tmp_path / "python"
    python.write_text(COMPILER_FAILS)
    python.chmod(0o755)
    status, output, files = call("B", tmp_path, SECONDS_LEFT="200", PYTHON=str(python))
    (epochs,) = re.findall(r"1000 ms with compile=true: (\d+) of 200 epochs", output)
    assert 100 < int(epochs) <= 117, "of 200 seconds 30 for comparing, 20 for evaluating, 5 + 15 for starting, a tenth"
    runs = re.findall(r"-m simclr_ddp.pretrain (.*)", output)
    assert len(runs) == 2 and all(f"optim.epochs={epochs}" in run for run in runs), output
    assert runs[1].endswith("compile=false") and "passed    training, not compiled" in output
    assert status == 1, "the first training failed"
    assert "run.tgz" in files


def test_the_pace_is_that_of_the_faster_way_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny_settings(tmp_path, "optim.epochs=9")

    def seconds(compiled: float) -> str:
        def measure(settings: Pretrain, *_: Any, **__: Any) -> float:
            if settings.compile and not compiled:
                raise RuntimeError("no compiler")
            return compiled if settings.compile else 0.5

        monkeypatch.setattr(suite, "seconds_of_a_step", measure)
        assert suite.main(["pace", str(tmp_path / "pace"), *settings]) == 0
        return (tmp_path / "pace").read_text()

    steps = 64 // 8
    assert seconds(0.25).startswith(f"compile=true {250 * steps} ")
    assert seconds(0.75).startswith(f"compile=false {500 * steps} ") and seconds(0.75).endswith(" 9\n")
    assert seconds(0).startswith("compile=false ")


def test_a_resumed_run_keeps_its_epochs(tmp_path: Path) -> None:
    saved = {"step": 1, "model": {}, "config": {"optim": {"epochs": 150}, "compile": True}}
    torch.save(saved, tmp_path / "step-00000001.pt")
    assert suite.main(["started", str(tmp_path / "step-00000001.pt"), str(tmp_path / "started")]) == 0
    assert (tmp_path / "started").read_text() == "optim.epochs=150 compile=true\n"


def running(*words: str) -> list[Path]:
    """The /proc/PID/cmdline of living processes with those words in a row."""
    found, row = [], "\0".join(("", *words, "")).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if row in b"\0" + path.read_bytes():
                found.append(path)
    return found


def sleeping(seconds: str) -> list[Path]:
    return running("sleep", seconds)


STEPS = """
CALL=X OUT=$1 LOG=$1/X.log SECONDS_LEFT=$2 GRACE=1; . benchmarks/gpu/steps.sh
hang() { echo partial >"$OUT/partial"; trap "" TERM; sleep "$1" & setsid sleep "$1" & sleep "$1"; }
export -f hang; export OUT
step "fails" 5 TERM bash -c 'echo half >"$OUT/half"; exit 3'
step "hangs" 6 TERM bash -c "hang $3"
step "follows" 5 TERM echo hello
step "saves" 6 TERM bash -c 'trap "echo saved; exit 75" TERM; while true; do sleep 0.1; done'
printf "%s\\n" "${verdicts[@]}"
"""


def test_a_step_that_hangs_is_cut_off_and_all_of_its_processes_are_dead(tmp_path: Path) -> None:
    """That ignores the signal, and has started a process of a group of its own as well."""
    word = f"98765.{os.getpid()}"
    done = subprocess.run(
        ["bash", "-c", STEPS, "steps", str(tmp_path), "100", word],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert not sleeping(word), done.stdout
    assert (tmp_path / "half").read_text() == "half\n" and (tmp_path / "partial").read_text() == "partial\n"
    verdicts = re.findall(r"^(passed|paused|failed|cut off) +(\w+): \d+ s, status (\d+)$", done.stdout, re.M)
    assert verdicts == [
        ("failed", "fails", "3"),
        ("cut off", "hangs", "137"),
        ("passed", "follows", "0"),
        ("paused", "saves", "75"),
    ]
    assert "hello" in (tmp_path / "X.log").read_text()


def test_a_step_that_no_time_is_left_for_is_left_out(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", STEPS, "steps", str(tmp_path), "8", "1000"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "left out  follows: no time is left" in done.stdout and time.monotonic() - begin < 20
    assert "hello" not in (tmp_path / "X.log").read_text().split("follows: left out")[1]


def test_killing_a_step_and_comparing_fit_into_the_time_that_is_left(tmp_path: Path) -> None:
    script = "CALL=X OUT=$1 LOG=$1/X.log SECONDS_LEFT=60 LAST=20 GRACE=10; . benchmarks/gpu/steps.sh"
    script += "; step long 100 TERM true"
    done = subprocess.run(
        ["bash", "-c", script, "-", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    (limit,) = re.findall(r"at most (\d+) s", done.stdout)
    assert 25 < int(limit) <= 30


def test_a_plan_that_is_stopped_takes_its_step_along(tmp_path: Path) -> None:
    word = f"98766.{os.getpid()}"
    process = subprocess.Popen(["bash", "-c", STEPS, "steps", str(tmp_path), "100", word], cwd=ROOT)
    end = time.monotonic() + 30
    while len(sleeping(word)) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(sleeping(word)) == 3
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert not sleeping(word)


def test_the_plan_names_all_test_files_that_have_gpu_tests() -> None:
    (named,) = re.findall(r"^GPU_TESTS=\((.*)\)$", PLAN.read_text(), re.M)
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert set(named.split()) == marked
    (left_out,) = re.findall(r'^CHOSEN="not \((\w+) and .*\)"$', PLAN.read_text(), re.M)
    assert f"def {left_out}(" in (ROOT / "tests/test_gpu.py").read_text()


def test_measurements_stand_beside_predictions(tmp_path: Path) -> None:
    run = {
        "parts_seconds": [{"augmentation": 0.02, "forward": 0.18}],
        "seconds_per_step": {"synthetic": [0.4, 0.5, 0.6]},
        "peak_memory_bytes": [60e9],
        "work": {"model_operations": 10**14, "launches": {"kernels": 650.0, "waits": 0.0}, "peak_rate": 1e15},
    }
    (tmp_path / "step-imagenet.json").write_text(json.dumps({"runs": [run]}))
    entry = {"kernel": "cosine", "images": 4096, "variant": "triton", "seconds": {"median": 0.003}}
    failed = {"kernel": "cosine", "images": 4096, "variant": "tiled 4096", "failure": "OutOfMemoryError"}
    (tmp_path / "loss-triton.json").write_text(json.dumps({"measurements": [entry, failed]}))
    lines = {line[:58].strip(): line[58:].split() for line in suite.compare(tmp_path).splitlines()}
    assert lines["ResNet-50 at 224, N = 512: ms a step"] == ["360", "to", "420", "500", "1.19", "x"]
    assert lines["Triton"] == ["3", "3", "as", "predicted"]
    assert lines["tiles of 4,096"] == ["2", "-"]
    assert lines["peak memory, GB"] == ["48", "to", "55", "60", "1.09", "x"]
    assert suite.measured(tmp_path)["imagenet peak rate %"] == pytest.approx(20)


def test_a_run_is_measured_by_its_last_start_and_without_its_evaluation(tmp_path: Path) -> None:
    """8 seconds from step 10, where epoch 1 ended, to the end of epoch 5: two seconds an epoch."""
    (tmp_path / "config.yaml").write_text("name: cifar10_gpu\nstarts:\n- step: 0\n- step: 10\n")
    lines = [
        {"step": 10 * epoch, "epoch": float(epoch), "seconds": seconds, "images_per_second": 1000.0}
        for epoch, seconds in ((1, 50.0), (2, 3.0), (5, 8.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def measured() -> dict[str, float]:
        with tarfile.open(tmp_path / "run.tgz", "w:gz") as archive:
            for path in (*tmp_path.glob("*.[yj]*"), *tmp_path.glob("evaluations/*")):
                archive.add(path, f"./{path.relative_to(tmp_path)}")
        return suite.measured(tmp_path)

    expected = {"cifar10_gpu images/s": 1000, "cifar10_gpu epochs": 5, "cifar10_gpu seconds of 200 epochs": 400}
    assert measured() == expected
    (tmp_path / "linear_eval.json").write_text('{"run": "elsewhere/other", "results": {"trained": {"top1": 0.5}}}')
    assert measured() == expected | {"cifar10_gpu linear %": 50}, "as earlier versions wrote it"
    (tmp_path / "linear_eval.json").unlink()
    (tmp_path / "evaluations").mkdir()
    for step, split, top1 in ((20, "test", 0.4), (50, "test", 0.6), (50, "train", 0.9)):
        record = {"step": step, "test": {"split": split}, "results": {"trained": {"top1": top1}}}
        (tmp_path / f"evaluations/step{step}-{split}.json").write_text(json.dumps(record))
    assert measured() == expected | {"cifar10_gpu linear %": 60}, "of the last step, on test images"


def tiny_settings(folder: Path, *more: str) -> list[str]:
    suite.tiny(folder / "tiny.beton", 64)
    settings = [f"data.train={folder / 'tiny.beton'}", "device=cpu", "precision=fp32", "threads=1", "model.width=0.125"]
    return ["configs/pretrain/cifar10_gpu.yaml", *settings, "optim.global_batch_size=8", *more]


def test_the_images_are_decoded_once_for_all_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        suite, "seconds_of_a_step", lambda settings, runtime, dataset, *_, **__: seen.append(dataset) or 1.0
    )
    assert suite.main(["variants", str(tmp_path / "variants.json"), *tiny_settings(tmp_path)]) == 0
    assert len(seen) == 4 and all(dataset is seen[0] for dataset in seen)


def test_what_is_there_and_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["there", str(tmp_path / "there.json")]) == 0
    found = json.loads((tmp_path / "there.json").read_text())
    assert found["torch"] and found["nvidia-smi"] and found["environment"]["cores"]
    assert suite.main(["nonsense"]) == 2 and "COMMAND" in capsys.readouterr().out
    done = subprocess.run(["bash", str(PLAN)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "SECONDS_LEFT" in done.stdout
