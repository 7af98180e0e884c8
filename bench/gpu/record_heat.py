#!/usr/bin/env python3
"""Records temperature and power of a real GPU under a changing load, once a second, as CSV: what core/thermal is
judged by. Load: float16 products with pauses, of seeded strength and length; nothing of the card is set.

  python3 bench/gpu/record_heat.py --seconds 540 --seed 1 >heat.csv      (needs PyTorch with CUDA)
"""
import argparse
import ctypes
import random
import sys
import threading
import time

import torch

options = argparse.ArgumentParser()
options.add_argument("--seconds", type=float, default=540)
options.add_argument("--seed", type=int, default=1)
options = options.parse_args()

nvml = ctypes.CDLL("libnvidia-ml.so.1")


def check(code):
    if code != 0:
        sys.exit(f"NVML says {code}")


check(nvml.nvmlInit_v2())
device = ctypes.c_void_p()
check(nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)))


def energy_mj():
    value = ctypes.c_ulonglong()
    check(nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(value)))
    return value.value


def celsius():
    value = ctypes.c_uint()
    check(nvml.nvmlDeviceGetTemperature(device, 0, ctypes.byref(value)))
    return value.value


duty = 0.0
over = False


def work():
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    while not over:
        start = time.monotonic()
        share = duty
        if share <= 0:
            time.sleep(0.05)
            continue
        while time.monotonic() - start < 0.1 * share:
            for _ in range(4):
                a @ b
            torch.cuda.synchronize()
        time.sleep(max(0.0, 0.1 * (1 - share)))


worker = threading.Thread(target=work, daemon=True)
worker.start()
chance = random.Random(options.seed)
begun = time.monotonic()
change_at = begun
last_energy, last_at = energy_mj(), begun
tick = begun
print("seconds,celsius,watts,duty")
while time.monotonic() - begun < options.seconds:
    if time.monotonic() >= change_at:
        duty = 0.0 if chance.random() < 0.35 else chance.choice([0.3, 0.6, 1.0])
        change_at = time.monotonic() + chance.uniform(20, 110)
    tick += 1
    time.sleep(max(0.0, tick - time.monotonic()))
    now, energy = time.monotonic(), energy_mj()
    print(f"{now - begun:.3f},{celsius()},{(energy - last_energy) / 1000 / (now - last_at):.1f},{duty}", flush=True)
    last_energy, last_at = energy, now
over = True
worker.join()
