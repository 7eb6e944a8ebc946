"""The project's scripts as processes of their own that start at once: each is forked from a server that has done the heavy
imports, which take longer than most of what the tests have them do. A script still runs as `__main__`, from its first line
on, with its own arguments, environment, stdout, stderr and exit code. A few tests start `python` anew all the same."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import connection, forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
METHOD = "forkserver"  # of multiprocessing


def serve() -> None:
    """Starts the server if there is none, and does not wait: it imports while other tests run."""
    multiprocessing.get_context(METHOD).set_forkserver_preload(["warm"])
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    with patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()


def work(script: str, words: list[str], environment: dict, output: str, before: str) -> None:
    for stream, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(environment)
    os.chdir(ROOT)
    exec(before, {})
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


class Forked:
    """A script that runs; a test that starts one asks for `server`. `before`: code that its process runs first."""

    def __init__(self, script, *words, before="", **environment):
        self.folder = tempfile.TemporaryDirectory()
        self.output = f"{self.folder.name}/out"
        arguments = script, list(map(str, words)), environment, self.output, before
        self.process = multiprocessing.get_context(METHOD).Process(target=work, args=arguments)
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Its exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.read("stderr")[-2000:])
        return self.process.exitcode

    def read(self, stream: str) -> str:
        return Path(f"{self.output}.{stream}").read_text()


class Launched:
    """A script in several processes that find each other as torch's launcher lets them."""

    def __init__(self, processes: int, script, *words, before="", **environment):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        shared |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_RESTART_COUNT": 0}
        self.ranks = []
        for rank in range(processes):
            own = {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            self.ranks.append(Forked(script, *words, before=before, **own, **environment))

    def wait(self, timeout: float = 300) -> SimpleNamespace:
        """What all have printed, and an exit code that is 0 if all are: one that fails ends the others."""
        left = {one.process.sentinel: one for one in self.ranks}
        while left:
            ended = connection.wait(left, timeout)
            if not ended or any(left.pop(sentinel).wait() for sentinel in ended):
                for one in left.values():
                    one.process.terminate()
        code = next((code for code in (one.wait() for one in self.ranks) if code), 0)
        stdout, stderr = ("".join(one.read(stream) for one in self.ranks) for stream in ("stdout", "stderr"))
        return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)


class Server:
    """A server of scripts with an environment of its own, which libraries read when they are imported."""

    def __init__(self, **environment):
        command = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)

    def run(self, script, *words, before="") -> SimpleNamespace:
        with tempfile.TemporaryDirectory() as folder:
            request = [script, [*map(str, words)], {}, f"{folder}/out", before]
            print(json.dumps(request), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            stdout, stderr = (Path(f"{folder}/out.{stream}").read_text() for stream in ("stdout", "stderr"))
        return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)

    def close(self) -> None:
        self.process.communicate()  # it ends with its stdin


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import warm  # noqa: F401

    for line in sys.stdin:
        one = multiprocessing.get_context("fork").Process(target=work, args=json.loads(line))
        one.start()
        one.join(120)
        one.kill()
        print(one.exitcode, flush=True)
