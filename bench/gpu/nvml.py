"""What NVML says from outside, through ctypes, and a thread that asks it every 5 ms."""
import ctypes
import threading
import time


class _Process(ctypes.Structure):
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("gi", ctypes.c_uint), ("ci", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Nvml:
    def __init__(self, index=0):
        self.lib = ctypes.CDLL("libnvidia-ml.so.1")
        self._do("nvmlInit_v2")
        self.handle = ctypes.c_void_p()
        self._do("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(self.handle))

    def _do(self, name, *arguments):
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: NVML error {code}")

    def _text(self, name, *leading):
        text = ctypes.create_string_buffer(96)
        self._do(name, *leading, text, ctypes.c_uint(96))
        return text.value.decode()

    def identity(self):
        return {
            "gpu": self._text("nvmlDeviceGetName", self.handle),
            "uuid": self._text("nvmlDeviceGetUUID", self.handle),
            "driver": self._text("nvmlSystemGetDriverVersion"),
        }

    def processes(self):
        """pid -> bytes of every compute process on the board."""
        count = ctypes.c_uint(512)
        table = (_Process * 512)()
        self._do("nvmlDeviceGetComputeRunningProcesses_v3", self.handle, ctypes.byref(count), table)
        return {p.pid: p.used for p in table[: count.value] if p.used != 2**64 - 1}

    def memory(self):
        memory = _Memory()
        self._do("nvmlDeviceGetMemoryInfo", self.handle, ctypes.byref(memory))
        return memory.total, memory.used


class Watch(threading.Thread):
    """Samples (monotonic seconds, sum over processes, GPU's used bytes, processes) until stop()."""

    def __init__(self, nvml, ignore=(), period=0.005):
        super().__init__(daemon=True)
        self.nvml, self.ignore, self.period = nvml, set(ignore), period
        self.samples, self.error, self.ending = [], None, threading.Event()

    def run(self):
        try:
            while not self.ending.wait(self.period):
                used = [v for k, v in self.nvml.processes().items() if k not in self.ignore]
                self.samples.append((time.monotonic(), sum(used), self.nvml.memory()[1], len(used)))
        except RuntimeError as error:
            self.error = str(error)

    def stop(self):
        self.ending.set()
        self.join(timeout=5)

    def peak(self, start=0.0, end=float("inf")):
        """Between two moments the largest sum, the largest GPU total, the most processes."""
        inside = [s for s in self.samples if start <= s[0] <= end]
        return tuple(max((s[k] for s in inside), default=0) for k in (1, 2, 3))
