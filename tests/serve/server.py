"""A real tritonserver, from the wheel of nvidia-pytriton, in a virtual environment of its own that is made once per machine.

UWM_DEPLOY_TRITON_VENV names the environment; without it one is made in the user's cache.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from uwm_deploy.serve.client import Client, open_client, wait_until_ready
from uwm_deploy.serve.repository import write_backends
from uwm_deploy.serve.served import MODELS

ROOT = Path(__file__).parents[2]
WHEEL = "nvidia-pytriton==0.7.0"
# numpy 2 and this server's Python backend make empty answers; onnxruntime for CPUs is a tenth of the one for GPUs.
PACKAGES = ["numpy<2", "onnxruntime>=1.23", "pillow>=11", "tokenizers>=0.21", "safetensors>=0.5"]
PACKAGES += ["ftfy>=6.1", "cryptography>=43"]
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
SECONDS_TO_START = 60
SECONDS_TO_INSTALL = 120
RESTRICTED = "model-repository,shared-memory,trace,logging"


def needs_triton_client() -> None:
    """Skips the test, or the whole file, where the extra [triton] is not installed; repositories need it, too."""
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'uwm-deploy[triton]'")


def environment() -> Path:
    """The server's virtual environment; skips the test where there can be none, and says why."""
    found = _environment()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@cache  # a machine without the packages is asked once, not by every test
def _environment() -> Path | str:
    """The environment, or why there is none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the wheel of nvidia-pytriton is for Linux on x86_64"
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        return f"nvidia-pytriton needs glibc 2.35, this is {name} {version}"
    given = os.environ.get("UWM_DEPLOY_TRITON_VENV")
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uwm-deploy"
    folder = Path(given) if given else parent / f"{WHEEL.replace('==', '-')}-py{PYTHON}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reason = "" if (folder / "ready").exists() else _make(folder)
    return f"no environment for tritonserver: {reason}" if reason else folder


def _make(folder: Path) -> str:
    """Makes it; empty, or why it cannot be made."""
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
        return f"{folder} is something else"
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "-q", *PACKAGES],
        [python, "-m", "pip", "install", "-q", "--no-deps", WHEEL],  # its own client and web server are not needed
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_INSTALL)
        except subprocess.TimeoutExpired:
            return f"{' '.join(command[1:])} took longer than {SECONDS_TO_INSTALL} s"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            return f"{' '.join(command[1:])}: {' '.join(lines[-1:])}"
    home = _home(folder)
    stub = home / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.exists():
        return f"nvidia-pytriton has no stub for Python {PYTHON}"
    placed = Path(shutil.copy(stub, home / "backends" / "python"))
    for program in (placed, home / "bin" / "tritonserver"):
        program.chmod(0o755)
    (folder / "ready").touch()
    return ""


def _home(folder: Path) -> Path:
    return _packages(folder) / "pytriton" / "tritonserver"


def _packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python*/site-packages"))


def _with_this_package(folder: Path, venv: Path) -> Path:
    """A virtual environment that sees the server's and this checkout; its programs.

    The embedded interpreter ignores PYTHONPATH: it takes the environment whose python comes first in PATH.
    """
    packages = folder / "lib" / f"python{PYTHON}" / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to((venv / "bin" / "python").resolve())
    shutil.copy(venv / "pyvenv.cfg", folder)
    (packages / "both.pth").write_text(f"{_packages(venv)}\n{ROOT}\n")
    return folder / "bin"


@dataclass
class Server:
    """A server that runs, or ran."""

    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    log: Path

    def client(self, protocol: str) -> Client:
        return open_client(getattr(self, protocol), protocol, timeout_s=60)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def started(
    folder: Path,
    *repositories: Path,
    backends: Path | None = None,
    settings: dict[str, str] | None = None,
    control: str = "none",
) -> Iterator[Server]:
    """Starts a server and stops it; it may end by itself.

    Args:
        folder: For its log and its backends.
        repositories: Models.
        backends: Folder with other backends than ours.
        settings: Further environment variables.
        control: Whether models are loaded again when their files change ("poll").
    """
    venv = environment()
    folder.mkdir(parents=True, exist_ok=True)
    if backends is None:
        backends = folder / "backends"
        write_backends(backends)
    if not (backends / "python").exists():
        (backends / "python").symlink_to(_home(venv) / "backends" / "python")
    http, grpc = free_port(), free_port()
    command = [str(_home(venv) / "bin" / "tritonserver")]
    command += [f"--model-repository={repository}" for repository in repositories]
    command += [f"--backend-directory={backends}", "--exit-on-error=true", "--disable-auto-complete-config"]
    command += ["--strict-readiness=true", f"--model-control-mode={control}", "--allow-metrics=false"]
    command += [f"--http-restricted-api={RESTRICTED}:admin=x", f"--grpc-restricted-protocol={RESTRICTED}:admin=x"]
    command += ["--repository-poll-secs=1"] if control == "poll" else []
    command += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", f"--http-port={http}", f"--grpc-port={grpc}"]
    libraries = [str(_packages(venv) / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    variables = {
        "PATH": f"{_with_this_package(folder / 'venv', venv)}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(settings or {}),
    }
    log = folder / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=variables, cwd=folder)
    try:
        yield Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait(server: Server) -> Server:
    """Until every model answers; a server that ended instead shows its last words."""
    client = server.client("grpc")
    until = time.monotonic() + SECONDS_TO_START
    while True:
        if server.process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"no server:\n{server.said()}")
        try:
            wait_until_ready(client, MODELS, 0)
        except Exception:
            time.sleep(0.1)
        else:
            client.close()
            return server


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
