"""tools/setup and tools/build-ffcv-wheel: what they say where something is missing, what they make where it isn't."""

import ctypes
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest

from tests.support.processes import ROOT

BUILD = ROOT / "tools" / "build-ffcv-wheel"
# What the scripts use of a system and is the same everywhere.
COMMON = (
    "bash cat chmod cp cut dirname env flock head id ln mkdir mktemp mv readlink rm sed sha256sum sort tail tar touch"
)
FAKES = dict.fromkeys(("g++", "apt-get", "apt-cache", "dpkg-deb"), "true")
FAKES |= {"dpkg": "echo amd64", "uname": "echo Linux x86_64"}
TURBOJPEG = ("tjDecompress2", "tjInitDecompress", "tjDestroy", "tjGetErrorStr2")
LICENCES = {
    "LICENSE": "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION",
    "LICENSE.opencv": "OpenCV",
    "LICENSE.libjpeg-turbo": "Independent JPEG Group",
    "LICENSE.onetbb": "Intel Corporation",
}


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # never through a link to the machine's own
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


class Machine:
    """A PATH of nothing but what is named here, an empty cache and an empty folder for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.cache, self.temporary = folder / "bin", folder / "cache", folder / "tmp"
        for made in (self.bin, self.cache, self.temporary):
            made.mkdir()
        for name in COMMON.split():
            there = shutil.which(name)
            assert there is not None, name
            (self.bin / name).symlink_to(there)
        for name, body in FAKES.items():
            script(self.bin / name, body)
        # Has pip and headers, and an index that nothing comes from.
        self.python = script(
            folder / "fake-python", '[ "$1" = -c ] && echo 3.12 True || { echo no index >&2; exit 1; }'
        )

    def run(self, *arguments: object, **variables: str) -> tuple[int, str, str]:
        paths = {"PATH": self.bin, "XDG_CACHE_HOME": self.cache, "TMPDIR": self.temporary, "HOME": self.cache}
        environment = {"PYTHON": str(self.python)} | {name: str(path) for name, path in paths.items()} | variables
        command = [str(argument) for argument in arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert list(self.temporary.iterdir()) == []
        return done.returncode, done.stdout, done.stderr

    def failure(self, *arguments: object, **variables: str) -> str:
        """The one line with which build-ffcv-wheel gives up."""
        status, output, error = self.run(BUILD, *arguments, **variables)
        assert status != 0 and output == "", (output, error)
        (line,) = error.splitlines()
        assert line.startswith("build-ffcv-wheel: ")
        return line


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("missing", "says"),
    [("g++", "sudo apt-get install g++"), ("apt-get", "--opencv system"), ("dpkg-deb", "--opencv system")],
)
def test_a_missing_command(machine: Machine, missing: str, says: str) -> None:
    (machine.bin / missing).unlink()
    assert says in machine.failure()


def test_another_system(machine: Machine) -> None:
    script(machine.bin / "uname", "echo Darwin arm64")
    assert "this is Darwin arm64" in machine.failure()


def test_a_python_that_can_not_build(machine: Machine) -> None:
    assert "set PYTHON" in machine.failure(PYTHON="no-such-python")
    without_pip = script(machine.bin / "python-a", "echo No module named pip >&2; exit 1")
    assert "has no pip: sudo apt-get install python3-pip" in machine.failure(PYTHON=str(without_pip))
    without_headers = script(machine.bin / "python-b", "echo 3.12 False")
    assert "has no Python.h: sudo apt-get install python3.12-dev" in machine.failure(PYTHON=str(without_headers))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--opencvs", "system"], "unknown option --opencvs"),
        (["--opencv"], "--opencv wants debian, system or a folder"),
        (["--opencv", "/no/such/folder"], "neither debian nor system nor a folder"),
        (["a", "b"], "one OUT_DIR is enough"),
    ],
)
def test_wrong_arguments(machine: Machine, arguments: list[str], says: str) -> None:
    assert says in machine.failure(*arguments)


def test_help(machine: Machine) -> None:
    status, output, error = machine.run(BUILD, "--help")
    assert status == 0 and error == ""
    assert "--opencv debian|system|FOLDER" in output and "#" not in output and "set -e" not in output


def test_a_system_without_opencv(machine: Machine) -> None:
    assert "no pkg-config here" in machine.failure("--opencv", "system")
    script(machine.bin / "pkg-config", '[ "$2" != libturbojpeg ]')
    assert "pkg-config knows no libturbojpeg: sudo apt-get" in machine.failure("--opencv", "system")


@pytest.mark.parametrize("below", ["", "usr"])
def test_a_folder_that_lacks_a_file(machine: Machine, tmp_path: Path, below: str) -> None:
    prefix = tmp_path / "prefix"
    files = {
        "include/opencv4/opencv2/imgproc.hpp": "has no opencv2/imgproc.hpp",
        "include/turbojpeg.h": "has no turbojpeg.h",
        "lib/libturbojpeg.so": "has no libturbojpeg.so",
        "lib/libopencv_imgproc.so": "has no libopencv_imgproc",
        "lib/libopencv_core.a": "has no libopencv_core",
    }
    (prefix / below / "include").mkdir(parents=True)
    (prefix / below / "lib").mkdir()
    for name, says in files.items():
        line = machine.failure("--opencv", prefix)
        assert says in line and str(prefix / below / name.split("/")[0]) in line
        file = prefix / below / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    # Nothing is missing any more: it goes on to the index.
    assert "pip can't get ffcv" in machine.failure("--opencv", prefix, tmp_path / "out")


def test_a_download_that_fails(machine: Machine, tmp_path: Path) -> None:
    script(machine.bin / "apt-cache", "echo '  Depends: libopencv-core406'")
    script(machine.bin / "apt-get", "echo 'E: Failed to fetch' >&2; exit 100")
    line = machine.failure(tmp_path / "out")
    log = machine.cache / "simclr_ddp" / "ffcv" / "build.log"
    assert "is there a network?" in line and line.endswith(str(log))
    assert "E: Failed to fetch" in log.read_text()
    assert list((tmp_path / "out").iterdir()) == []


class Checkout:
    """tools/setup beside a build-ffcv-wheel and a Python that only write down how they are called."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder, self.machine, self.calls = folder, machine, folder / "calls"
        (folder / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "setup", folder / "tools" / "setup")
        (folder / "requirements.lock").touch()
        (folder / "allowed").touch()
        script(
            folder / "tools" / "build-ffcv-wheel",
            f'echo "build $2" >>{self.calls}\n'
            f'[ -e {folder}/allowed ] || {{ echo "build-ffcv-wheel: no g++ here: install it" >&2; exit 1; }}\n'
            'echo progress; mkdir -p "$3"; touch "$3/ffcv-1.whl"',
        )
        packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        made = script(
            folder / "python-in-it",
            f'if [ "$2" = venv ]; then mkdir -p "$4"/bin "$4/{packages}"; cp "$0" "$4/bin/python"\n'
            f'else echo "pip ${{@: -1}}" >>{self.calls}; fi',
        )
        self.python = script(
            folder / "python",
            f'if [ "$2" != venv ]; then exec {sys.executable} "$@"; fi\nmkdir -p "$3/bin"; cp {made} "$3/bin/python"',
        )

    def setup(self, ffcv: str = "") -> tuple[list[str], str]:
        """(what was called, standard error); setup itself must succeed."""
        self.calls.write_text("")
        status, _, error = self.machine.run(self.folder / "tools" / "setup", PYTHON=str(self.python), FFCV=ffcv)
        assert status == 0, error
        assert (self.folder / ".venv" / "bin" / "simclr").exists()
        calls = (call.split(" ") for call in self.calls.read_text().splitlines())
        return [f"{what} {Path(argument).name}" for what, argument in calls], error


@pytest.fixture
def checkout(tmp_path: Path, machine: Machine) -> Checkout:
    return Checkout(tmp_path / "checkout", machine)


def test_setup_without_a_compiler_is_one_line_and_is_tried_again(checkout: Checkout) -> None:
    (checkout.folder / "allowed").unlink()
    for expected in (["pip requirements.lock", "build debian"], ["build debian"]):
        calls, error = checkout.setup()
        assert calls == expected
        (line,) = error.splitlines()
        assert line.startswith("setup: no FFCV, so the torch loader is used: no g++ here: install it; then make setup")
    assert checkout.setup("no") == ([], "")
    (checkout.folder / "allowed").touch()
    assert checkout.setup() == (["build debian", "pip ffcv-1.whl"], "")
    assert checkout.setup() == ([], "")


def test_setup_builds_once_for_all_environments(checkout: Checkout) -> None:
    assert checkout.setup() == (["pip requirements.lock", "build debian", "pip ffcv-1.whl"], "")
    (checkout.folder / "requirements.lock").write_text("# another environment\n")
    assert checkout.setup() == (["pip requirements.lock", "pip ffcv-1.whl"], "")
    with (checkout.folder / "tools" / "build-ffcv-wheel").open("a") as file:
        file.write("# another recipe\n")
    assert checkout.setup() == (["build debian", "pip ffcv-1.whl"], "")


def test_setup_with_another_opencv(checkout: Checkout) -> None:
    checkout.setup()
    assert checkout.setup("system") == (["build system", "pip ffcv-1.whl"], "")
    assert checkout.setup("system") == checkout.setup("") == checkout.setup("no") == ([], "")
    (checkout.folder / "allowed").unlink()
    calls, error = checkout.setup("/opt/conda")
    assert calls == ["build conda"] and "FFCV stays as it was: no g++ here" in error
    assert checkout.setup("debian") == (["pip ffcv-1.whl"], "")  # from the one that was kept


def test_make_setup_ends_with_what_to_type_next() -> None:
    for target, said in (("setup", True), ("check", False)):
        lines = subprocess.check_output(["make", "--dry-run", "--no-print-directory", target], cwd=ROOT, text=True)
        assert (". .venv/bin/activate" in lines.splitlines()[-1]) == said, lines


def test_each_checkout_has_its_own_package_above_one_environment(machine: Machine, tmp_path: Path) -> None:
    """From any folder, with the packages of the environment that runs this test, which stays as it was."""
    environment = Path(numpy.__file__).parents[4]
    if not (environment / ".complete").exists():
        pytest.skip("the packages are not in an environment of tools/setup")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    key = hashlib.sha256(f"{version} \nLinux x86_64\n".encode()).hexdigest()[:12]
    shared = machine.cache / "simclr_ddp" / f"env-{key}"
    shared.parent.mkdir()
    shared.symlink_to(environment)
    before = sorted((environment / "bin").iterdir())
    checkouts = [tmp_path / "somebody's own", tmp_path / "another"]
    for folder in checkouts:
        (folder / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "tools" / "setup", folder / "tools" / "setup")
        (folder / "requirements.lock").touch()
        main = f"import sys, omegaconf\ndef main(): print('{folder.name[-3:]}', sys.argv[1:])\n"
        (folder / "simclr_ddp").mkdir()
        (folder / "simclr_ddp" / "__main__.py").write_text(f"{main}if __name__ == '__main__': main()\n")
        (folder / ".venv").symlink_to(shared)  # as earlier versions made it
        for _ in range(2):
            assert machine.run(folder / "tools" / "setup", PYTHON=sys.executable, FFCV="no") == (0, "", "")
    for folder in checkouts:
        binaries = folder / ".venv" / "bin"
        for command in ([binaries / "simclr"], [binaries / "python", "-m", "simclr_ddp"]):
            output = subprocess.check_output([*command, "a b"], cwd="/", text=True)
            assert output == f"{folder.name[-3:]} ['a b']\n"
        torchrun = (binaries / "torchrun").read_text()
        assert str(binaries.resolve() / "python") in torchrun and str(environment) not in torchrun
        assert (binaries / "ruff").exists()
    assert sorted((environment / "bin").iterdir()) == before


@pytest.mark.parametrize("lowest", [True, False])
def test_the_oldest_versions_are_those_of_setup_cfg(machine: Machine, tmp_path: Path, lowest: bool) -> None:
    """tools/oldest, with a Python that only writes down how it is called."""
    calls, folder = tmp_path / "calls", tmp_path / "checkout"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "oldest", folder / "tools" / "oldest")
    version = f"{sys.version_info[0]}.{sys.version_info[1] if lowest else 1}"
    allowed = f"[options]\npython_requires = >={version}\ninstall_requires =\n    torch>=2.7\n    numpy>=1.26\n"
    extras = "".join(f"{extra} =\n    {extra}-needs>=1\n" for extra in ("log", "maps", "slurm", "sweep"))
    tests = "test =\n    pytest>=8\n    ruff\nffcv =\n    ffcv>=1\n"
    (folder / "setup.cfg").write_text(f"{allowed}[options.extras_require]\n{extras}{tests}")
    made = script(tmp_path / "python-in-it", f'echo "$@" >>{calls}')
    python = script(
        tmp_path / "python",
        f'if [ "$2" != venv ]; then exec {sys.executable} "$@"; fi\nmkdir -p "$3/bin"; cp {made} "$3/bin/python"',
    )
    for _ in range(2):
        status, _, error = machine.run(folder / "tools" / "oldest", "tests/test_a.py", PYTHON=str(python))
        assert (status == 0) == lowest
    if not lowest:
        assert f"{version} is the lowest that setup.cfg allows: make test-oldest PYTHON=/path/to/python" in error
        return
    install, *tested = calls.read_text().splitlines()
    assert install.endswith(
        " torch==2.7 numpy==1.26 log-needs==1 maps-needs==1 slurm-needs==1 sweep-needs==1 pytest==8"
    )
    assert tested == ["-m pytest -m not gpu and not slurm tests/test_a.py"] * 2


def test_the_installed_ffcv() -> None:
    try:
        ffcv = importlib.metadata.distribution("ffcv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("FFCV is not installed: make setup says why")
    files = ffcv.files or []
    (extension,) = [file for file in files if file.name.startswith("_libffcv.")]
    library = ctypes.CDLL(str(extension.locate()))
    for name in TURBOJPEG:
        assert getattr(library, name)
    texts = {file.name: file.read_text() for file in files if file.parent.name == "licenses"}
    bundled = any(file.parts[0] == "ffcv.libs" for file in files)
    for name, says in LICENCES.items():
        if bundled or name == "LICENSE":
            assert says in texts[name]


@pytest.mark.slow
def test_a_real_wheel(tmp_path: Path) -> None:
    for name in ("g++", "apt-get"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(temporary)}
    done = subprocess.run([BUILD, tmp_path / "out"], env=environment, capture_output=True, text=True, timeout=300)
    if "is there a network?" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []
    (wheel,) = (tmp_path / "out").iterdir()
    assert f"wrote {wheel}" in done.stdout and "manylinux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licences,) = {name.rpartition("/")[0] for name in names if name.endswith("/LICENSE")}
        for name, says in LICENCES.items():
            assert says in archive.read(f"{licences}/{name}").decode()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode().splitlines()
        archive.extractall(tmp_path / "tree")
    assert {"Requires-Dist: opencv-python-headless", "Requires-Dist: setuptools"} <= set(metadata)
    assert "Requires-Dist: opencv-python" not in metadata
    assert {name.split("/")[1].partition("-")[0] for name in names if name.startswith("ffcv.libs/l")} == {
        "libtbb",
        "libturbojpeg",
    }
    (extension,) = (tmp_path / "tree" / "ffcv").glob("_libffcv.*.so")
    library = ctypes.CDLL(str(extension))
    assert all(getattr(library, name) for name in TURBOJPEG)
    # Only FFCV's own functions: a cv:: symbol in reach could meet that of another OpenCV in the process.
    symbols = subprocess.run(["nm", "-D", "--defined-only", extension], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in symbols.stdout.splitlines()} == {
        "PyInit__libffcv",
        "resize",
        "imdecode",
        "my_memcpy",
        "my_fread",
    }


@pytest.mark.slow
def test_a_failed_compilation(tmp_path: Path) -> None:
    """With a folder of headers that hold nothing; what it says, and that the compiler's words are kept."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    files = ["include/opencv2/imgproc.hpp", "include/opencv2/core.hpp", "include/turbojpeg.h"]
    files += [f"lib/lib{name}.so" for name in ("turbojpeg", "opencv_core", "opencv_imgproc")]
    for name in files:
        file = tmp_path / "prefix" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    environment = os.environ | {"PYTHON": sys.executable, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [BUILD, "--opencv", tmp_path / "prefix", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "is there a network?" in done.stderr:
        pytest.skip(done.stderr.strip())
    log = tmp_path / "cache" / "simclr_ddp" / "ffcv" / "build.log"
    assert done.returncode != 0
    assert done.stderr == f"build-ffcv-wheel: the compilation failed: the log is {log}\n"
    assert "error:" in log.read_text()


@pytest.mark.slow
def test_the_wheel_holds_commands_and_recipes(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no git checkout")
    names = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*wheel, "--wheel-dir", tmp_path, tmp_path / "source"], check=True, timeout=300)
    (file,) = tmp_path.glob("simclr_ddp-*.whl")
    with zipfile.ZipFile(file) as archive:
        found = set(archive.namelist())
        (entry_points,) = (name for name in found if name.endswith("/entry_points.txt"))
        assert "simclr = simclr_ddp.__main__:main" in archive.read(entry_points).decode()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", tmp_path / "installed", file], check=True, timeout=300)
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path / "installed")}}
    for command, line in (("pretrain cifar10", "size: 32"), ("slurm cpus", "--")):
        arguments = [*command.split(), "--dry-run", *(["--", "simclr_ddp.pretrain"] if line == "--" else [])]
        done = subprocess.run(
            [sys.executable, "-m", "simclr_ddp", *arguments], capture_output=True, text=True, timeout=120, **elsewhere
        )
        assert done.returncode == 0 and line in done.stdout, done.stderr
    build = [sys.executable, "-c", "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])", tmp_path]
    subprocess.run(build, cwd=tmp_path / "source", check=True, capture_output=True, timeout=300)
    with tarfile.open(next(tmp_path.glob("simclr_ddp-*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in names if name.startswith(("simclr_ddp/", "launch/", "configs/"))} <= inside
    modules = {name for name in names if name.startswith(("simclr_ddp/", "launch/"))}
    recipes = {f"simclr_ddp/{name}" for name in names if name.startswith("configs/")}
    assert modules and recipes and modules | recipes <= found
    assert {name.split("/")[0] for name in found} == {"simclr_ddp", "launch", entry_points.split("/")[0]}
