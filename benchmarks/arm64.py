"""Run a device on an emulated ARM64 machine and compare its answers with those of this machine.

Usage: python benchmarks/arm64.py DEBIAN BUNDLE LABEL TAUGHT SEEN... [--json FILE]

DEBIAN is a folder that is made if it does not exist: Debian 12 for ARM64 with its Python 3.11, and from PyPI the wheels
for ARM64 of what a device needs (network, 1 GB). It runs in a chroot by QEMU, which needs root and Debian's packages
mmdebstrap and qemu-user-static. The kernel is told to start ARM64 programs with QEMU, until it restarts.

Both machines install BUNDLE, predict the images SEEN, rename a class and roll back without PyTorch. With it, they learn
LABEL from the folder TAUGHT. At the end each predicts with the root of the other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
# The last release of PyTorch for ARM64 on PyPI without CUDA; those after it require NVIDIA's packages.
TORCH = "torch==2.10.0"
# pip evaluates markers for this machine, so it would ask for CUDA: what the wheel requires otherwise.
TORCH_NEEDS = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")
PREDICT, LEARN = "/opt/predict", "/opt/torch"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# Not /sys: ONNX Runtime crashes on what it tells about an x86-64 processor.
ENTER = """
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --bind "$2" "$1/repository"
mount --bind "$3" "$1/work"
folder=$1
shift 3
exec chroot "$folder" "$@"
"""


def build(debian: Path) -> None:
    """Make the folder of an ARM64 machine; it appears under its name when it is complete."""
    making = debian.with_name(debian.name + ".part")
    shutil.rmtree(making, ignore_errors=True)
    packages = "--include=python3,libstdc++6,libgomp1"
    # Unpacked only: nothing that runs here is set up by their scripts, which would take minutes.
    subprocess.run(["mmdebstrap", "--variant=extract", "--arch=arm64", packages, "bookworm", making], check=True)
    for name in ("proc", "dev", "repository", "work"):
        (making / name).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, REPOSITORY], check=True)
        (wheel,) = Path(folder).iterdir()
        constraints = ("-c", str(REPOSITORY / "constraints.txt"))
        pip_install(making, PREDICT, *constraints, f"{wheel}[predict]")
    for name in ("ssd_edge", "exporters", "device_runtime"):  # the repository's are used
        shutil.rmtree(making / PREDICT[1:] / name)
    pip_install(making, LEARN, "--no-deps", TORCH)
    pip_install(making, LEARN, *TORCH_NEEDS)
    making.rename(debian)


def pip_install(debian: Path, target: str, *words: str) -> None:
    """Install wheels for ARM64 from this machine, which is faster than by emulation."""
    platforms = [f"--platform=manylinux{name}_aarch64" for name in ("2014", "_2_27", "_2_28")]
    only = ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp", *platforms]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    subprocess.run([*pip, "--target", str(debian / target[1:]), *only, *words], check=True)


class Machine:
    """Runs verbs of a device on this machine, below a folder of work.

    Attributes:
        times: Verb, wall seconds and processor seconds of each process.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.times: list[tuple[str, float, float]] = []

    def device(self, verb: str, *words: str, root: str, torch: bool = False) -> str:
        """Run a verb and return what it prints; paths are relative to the folder of work."""
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = self.python("-m", "ssd_edge", "device", verb, *words, "--root", root, torch=torch)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.times.append((verb, time.monotonic() - started, cpu))
        if done.returncode:
            sys.exit(f"{verb} on {type(self).__name__} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def answers(self, images: Sequence[str], root: str) -> list[dict[str, Any]]:
        """Return the predictions of images."""
        found: list[dict[str, Any]] = json.loads(self.device("predict", *images, "--json", root=root))["predictions"]
        return found

    def python(self, *words: str, torch: bool = False) -> subprocess.CompletedProcess[str]:
        """Run Python with the packages of the repository."""
        environment = {**os.environ, **self._environment(str(REPOSITORY))}
        return self._run([sys.executable, *words], environment)

    def _environment(self, path: str) -> dict[str, str]:
        return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}

    def _run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, check=False)


class Emulated(Machine):
    """Runs them on an emulated ARM64 machine; PyTorch can be imported only where asked for."""

    def __init__(self, work: Path, debian: Path) -> None:
        super().__init__(work)
        self.debian = debian
        if not (BINFMT / "register").exists():
            subprocess.run(["mount", "-t", "binfmt_misc", "none", str(BINFMT)], check=True)
        if not (BINFMT / "qemu-aarch64").exists():
            (BINFMT / "register").write_bytes(Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_bytes())

    def python(self, *words: str, torch: bool = False) -> subprocess.CompletedProcess[str]:
        """Run the Python of Debian, with mounts that only this process sees."""
        path = f"/repository:{PREDICT}:{LEARN}" if torch else f"/repository:{PREDICT}"
        enter = ["unshare", "--mount", "sh", "-c", ENTER, "sh", str(self.debian), str(REPOSITORY), str(self.work)]
        start = ["/usr/bin/python3", "-c", f"import os, sys; os.chdir('/work'); os.execv('{PYTHON}', sys.argv[1:])"]
        return self._run([*enter, *start, PYTHON, *words], {"PATH": os.environ["PATH"], **self._environment(path)})


PYTHON = "/usr/bin/python3"


def use(machine: Machine, root: str, label: str, images: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Use a device for all that is compared and return its answers by what was done before."""
    machine.device("install", "robot.ssdedge", root=root)
    found = {"installed": machine.answers(images, root)}
    first = json.loads(machine.device("status", "--json", root=root))["classes"][0]
    machine.device("rename", first, "another name", root=root)
    found["renamed"] = machine.answers(images, root)
    machine.device("learn", "--label", label, "taught", root=root, torch=True)
    found["learned"] = machine.answers(images, root)
    machine.device("rollback", "1", root=root)
    found["rolled back"] = machine.answers(images, root)
    return found


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare two machines' answers to the same images."""
    pairs = list(zip(ours, theirs, strict=True))
    words = ("label", "nearest", "generation")
    return {
        "answers": len(pairs),
        "same": sum(all(a[word] == b[word] for word in words) for a, b in pairs),
        **{name: max(abs((a[name] or 0) - (b[name] or 0)) for a, b in pairs) for name in ("score", "margin")},
    }


def packages(path: Path) -> dict[str, tuple[str, int]]:
    """Return version and installed bytes, without compiled Python, of each package in a folder."""
    found = {}
    for package in importlib.metadata.distributions(path=[str(path)]):
        found[package.metadata["Name"].lower().replace("_", "-")] = (package.version, installed_bytes(package))
    found.pop("ssd-edge", None)
    return found


def installed_bytes(package: importlib.metadata.Distribution) -> int:
    """Return the size of a package's files."""
    files = [Path(str(file.locate())) for file in package.files or () if "__pycache__" not in file.parts]
    return sum(file.stat().st_size for file in files if file.exists())


def sizes(debian: Path) -> dict[str, Any]:
    """Return the installed bytes of what a device needs, on ARM64 and of the same packages on this machine."""
    found: dict[str, Any] = {}
    for name, folder in (("predict", PREDICT), ("torch", LEARN)):
        arm = packages(debian / folder[1:])
        here = {package: importlib.metadata.distribution(package) for package in arm}
        found[name] = {
            "arm64": sum(size for _, size in arm.values()),
            "x86_64": sum(installed_bytes(package) for package in here.values()),
            "versions": {package: [version, here[package].version] for package, (version, _) in sorted(arm.items())},
        }
    return found


def main() -> None:
    """Make the machine if it is missing, use both, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("debian", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("label")
    parser.add_argument("taught", type=Path)
    parser.add_argument("seen", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.debian.exists():
        build(args.debian)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copy(args.bundle, work / "robot.ssdedge")
        shutil.copytree(args.taught, work / "taught")
        images = [f"{number:03d}{path.suffix}" for number, path in enumerate(args.seen)]
        for name, path in zip(images, args.seen, strict=True):
            shutil.copy(path, work / name)
        here, arm = Machine(work), Emulated(work, args.debian.resolve())
        told = arm.python("-c", "import platform as p; print(p.machine(), p.python_version(), *p.libc_ver())")
        ours, theirs = use(here, "x86-64", args.label, images), use(arm, "arm64", args.label, images)
        steps = {step: difference(ours[step], theirs[step]) for step in ours}
        steps["root moved to ARM64"] = difference(ours["rolled back"], arm.answers(images, "x86-64"))
        steps["root moved to x86-64"] = difference(theirs["rolled back"], here.answers(images, "arm64"))
        history = [json.loads(machine.device("history", "--json", root="arm64")) for machine in (here, arm)]
        if history[0] != history[1]:
            sys.exit(f"the same history is told in two ways: {history}")
    for step, row in steps.items():
        same, answers = row["same"], row["answers"]
        print(f"{step:22} {same} of {answers} the same, scores within {row['score']:.1e}, margins {row['margin']:.1e}")
    if args.json:
        qemu = subprocess.check_output(["qemu-aarch64-static", "--version"], text=True).splitlines()[0]
        verbs = [{"verb": a[0], "arm64": a[1:], "x86_64": b[1:]} for a, b in zip(arm.times, here.times, strict=True)]
        found = {
            "command": f"python benchmarks/arm64.py DEBIAN {args.bundle.name} {args.label} TAUGHT SEEN",
            "machine": told.stdout.strip(),
            "qemu": qemu,
            "steps": steps,
            "verbs": verbs,
            "sizes": sizes(args.debian),
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
