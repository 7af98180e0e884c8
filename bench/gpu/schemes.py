"""Who manages the tenants: one class a scheme. A scheme turns a program and what it asks for into a command to start;
only Bulkhead can change a tenant while it runs. All use of bulkhead's commands is here.
"""
import json
import os
import shutil
import subprocess
import tempfile
import time


class Unavailable(Exception):
    """This scheme cannot run here; the message says why."""


class Asked:
    """What a tenant asks for. `share` is in percent: a weight, or the limit of a scheme that knows only limits."""

    def __init__(self, name, share=50, cls="batch", ceiling=None, memory=None, guard=False):
        self.name, self.share, self.cls, self.ceiling, self.memory, self.guard = (
            name,
            share,
            cls,
            ceiling,
            memory,
            guard,
        )


class Native:
    name, title, live = "native", "time slicing, unmanaged", False

    def start(self):
        """Whatever the scheme needs to run beside its tenants."""

    def stop(self):
        pass

    def command(self, asked, argv):
        """(argv, additions to the environment)"""
        return list(argv), {}

    def about(self):
        return ""


class Bulkhead(Native):
    name, title, live = "bulkhead", "bulkhead", True

    def __init__(self, program, gpu=0):
        self.program, self.gpu = program, gpu

    def call(self, *words, timeout=20):
        done = subprocess.run([self.program, "share", *words], capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(
                f"bulkhead share {' '.join(words)}: exit {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-400:]}"
            )
        return done.stdout

    def start(self):
        if not os.access(self.program, os.X_OK):
            raise Unavailable(f"{self.program} is not there: ./do build, and carry it")

    def command(self, asked, argv):
        words = [
            self.program,
            "share",
            "run",
            "--untested",
            "--gpu",
            str(self.gpu),
            "--weight",
            str(asked.share),
            "--class",
            asked.cls,
            "--name",
            asked.name,
        ]
        if asked.ceiling:
            words += ["--ceiling", str(asked.ceiling)]
        if asked.memory:
            words += ["--memory", asked.memory]
        if asked.guard:
            words += ["--guard"]
        return words + ["--", *argv], {}

    def set(self, name, weight=None, cls=None, ceiling=None):
        words = ["set", name]
        if weight is not None:
            words += ["--weight", str(weight)]
        if cls is not None:
            words += ["--class", cls]
        if ceiling is not None:
            words += ["--ceiling", str(ceiling)]
        self.call(*words)

    def list(self):
        """name -> what `share list --json` says of it."""
        return {t["name"]: t for t in json.loads(self.call("list", "--json"))["tenants"]}

    def now(self, name, key):
        """A word of the tenant's `now`; None when it has none yet."""
        return ((self.list().get(name) or {}).get("now") or {}).get(key)

    def selftest(self):
        done = subprocess.run(
            [self.program, "share", "selftest", "--gpu", str(self.gpu), "--json"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        try:
            return {**json.loads(done.stdout), "exit": done.returncode}
        except ValueError:
            raise RuntimeError(
                f"bulkhead share selftest: exit {done.returncode}: {done.stderr.strip()[-400:]}"
            ) from None


class Mps(Native):
    name, title = "mps", "MPS, active thread percentage"

    def __init__(self):
        self.place = None

    def start(self):
        if not shutil.which("nvidia-cuda-mps-control"):
            raise Unavailable("no nvidia-cuda-mps-control")
        self.place = tempfile.mkdtemp(prefix="mps-")
        self.environment = {
            "CUDA_MPS_PIPE_DIRECTORY": self.place + "/pipe",
            "CUDA_MPS_LOG_DIRECTORY": self.place + "/log",
        }
        for folder in self.environment.values():
            os.mkdir(folder)
        done = subprocess.run(
            ["nvidia-cuda-mps-control", "-d"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode != 0:
            raise Unavailable(
                f"nvidia-cuda-mps-control -d: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-200:]}"
            )
        time.sleep(1)

    def stop(self):
        if not self.place:
            return
        try:
            subprocess.run(
                ["nvidia-cuda-mps-control"],
                input="quit -t 2\n",
                env={**os.environ, **self.environment},
                capture_output=True,
                text=True,
                timeout=30,
            )
        except subprocess.TimeoutExpired:
            pass
        shutil.rmtree(self.place, ignore_errors=True)
        self.place = None

    def command(self, asked, argv):
        return list(argv), {**self.environment, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(asked.share)}


class Hami(Native):
    name, title = "hami", "HAMi-core"

    def __init__(self, peers):
        self.library = os.path.join(peers, "lib/hami/libvgpu.so")
        self.place = None

    def start(self):
        if not os.path.exists(self.library):
            raise Unavailable("not built: bench/gpu/peers.sh")
        self.place = tempfile.mkdtemp(prefix="hami-")
        os.makedirs("/tmp/vgpulock", exist_ok=True)  # its lock; the folder is the host's to make

    def stop(self):
        if self.place:
            shutil.rmtree(self.place, ignore_errors=True)
        self.place = None

    def command(self, asked, argv):
        # A region of its own each, as each container has; the policy that enforces also when a tenant is alone.
        limit = asked.share if asked.cls != "interactive" else 100
        return list(argv), {
            "LD_PRELOAD": self.library,
            "CUDA_DEVICE_SM_LIMIT": str(limit),
            "CUDA_DEVICE_MEMORY_LIMIT": "20g",
            "GPU_CORE_UTILIZATION_POLICY": "force",
            "LIBCUDA_LOG_LEVEL": "1",
            "CUDA_TASK_PRIORITY": "0" if asked.cls == "interactive" else "1",
            "CUDA_DEVICE_MEMORY_SHARED_CACHE": f"{self.place}/{asked.name}.cache",
        }


class VgpuManager(Native):
    name, title = "vgpu-manager", "vgpu-manager (AIMD)"

    def __init__(self, peers, uuid):
        self.library, self.uuid, self.place = os.path.join(peers, "lib/vgpu-manager/libvgpu-control.so"), uuid, None

    def start(self):
        if not os.path.exists(self.library):
            raise Unavailable("not built: bench/gpu/peers.sh")
        if not shutil.which("unshare"):
            raise Unavailable("no unshare")
        self.place = tempfile.mkdtemp(prefix="vgpu-")

    def stop(self):
        if self.place:
            shutil.rmtree(self.place, ignore_errors=True)
        self.place = None

    def command(self, asked, argv):
        # Its configuration is a file at a fixed path, one a container: each tenant gets mounts of its own. It knows its
        # own processes by the host's /proc as a container with cgroup v2 sees it ("0::/"): the tenant's one process is
        # entered there.
        limit = asked.share if asked.cls != "interactive" else 100
        own = f"{self.place}/{asked.name}"
        for folder in ("etc/config", "etc/watcher", "etc/.host_proc", "lock", "node"):
            os.makedirs(f"{own}/{folder}", exist_ok=True)
        for folder in ("/etc/vgpu-manager", "/tmp/.vgpu_lock", "/tmp/.vmem_node"):
            os.makedirs(folder, exist_ok=True)
        inside = (
            f"mkdir {own}/etc/.host_proc/$$ && echo 0::/ > {own}/etc/.host_proc/$$/cgroup && "
            f"mount --bind {own}/etc /etc/vgpu-manager && mount --bind {own}/lock /tmp/.vgpu_lock && "
            f'mount --bind {own}/node /tmp/.vmem_node && export LD_PRELOAD={self.library} && exec "$@"'
        )
        return (
            ["unshare", "--mount", "sh", "-c", inside, "tenant", *argv],
            {
                "CUDA_CORE_LIMIT": str(limit),
                "CUDA_CORE_SOFT_LIMIT": str(limit),
                "CUDA_SM_CONTROLLER": "aimd",
                "CUDA_MEM_LIMIT": "20g",
                "MANAGER_COMPATIBILITY_MODE": "2",
                "MANAGER_VISIBLE_DEVICES": self.uuid,
                "NVIDIA_VISIBLE_DEVICES": self.uuid,
            },
        )


class XSched(Native):
    """HPF: highest priority first. PUP: a part of the GPU for each process."""

    def __init__(self, peers, policy):
        self.name = "xsched" if policy == "HPF" else "xsched-" + policy.lower()
        self.title = f"XSched, {policy}, level 1"
        self.policy, self.place, self.server = policy, os.path.join(peers, "lib/xsched"), None

    def start(self):
        if not os.path.exists(self.place + "/xserver"):
            raise Unavailable("not built: bench/gpu/peers.sh")
        # Its shim stands in libcuda's place: it must be told where the real one is.
        known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout.splitlines()
        self.real = next((line.split()[-1] for line in known if line.strip().startswith("libcuda.so.1 ")), None)
        self.server = subprocess.Popen(
            [self.place + "/xserver", self.policy, "50000"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LD_LIBRARY_PATH": self.place},
        )
        time.sleep(1)
        if self.server.poll() is not None:
            raise Unavailable(f"xserver ended at once with {self.server.returncode}")

    def stop(self):
        if self.server and self.server.poll() is None:
            self.server.terminate()
            try:
                self.server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
        self.server = None

    def command(self, asked, argv):
        return list(argv), {
            "LD_LIBRARY_PATH": self.place + ":" + os.environ.get("LD_LIBRARY_PATH", ""),
            "XSCHED_SCHEDULER": "GLB",
            "XSCHED_POLICY": self.policy,
            "XSCHED_AUTO_XQUEUE": "ON",
            "XSCHED_AUTO_XQUEUE_LEVEL": "1",
            "XSCHED_AUTO_XQUEUE_PRIORITY": "1" if asked.cls == "interactive" else "0",
            "XSCHED_AUTO_XQUEUE_UTILIZATION": str(asked.share),
            "XSCHED_AUTO_XQUEUE_THRESHOLD": "16",
            "XSCHED_AUTO_XQUEUE_BATCH_SIZE": "8",
            **({"XSCHED_CUDA_LIB": self.real} if self.real else {}),
        }

    def about(self):
        about = self.place + "/ABOUT"
        return open(about).read().strip() if os.path.exists(about) else ""
