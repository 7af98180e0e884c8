"""/metrics of 8 GPUs, 56 slices and 50 tenants with a lease each: how long an answer takes and what it costs the daemon,
against GET /healthz on the same connection in the same run. With --hang also while one GPU's driver call hangs.

A twin and a daemon of its own; root. CPU is the daemon's own clock of its process, less what it uses unasked.
"""
import argparse
import os
import re
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "serve"))
from daemon import PREFIX, Place  # noqa: E402

NODE = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0-7"}
    mode: mig
    layout: [1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb]
"""


def page(client):
    answer = client.ask("GET", "/metrics")
    if answer.status != 200:
        raise RuntimeError("/metrics: %d" % answer.status)
    return answer.body.decode()


def cpu(client):
    return float(re.search(r"^bulkhead_cpu_seconds_total (\S+)$", page(client), re.M)[1])


def times(client, path, count, pause):
    out = []
    for _ in range(count):
        began = time.perf_counter()
        client.ask("GET", path)
        out.append((time.perf_counter() - began) * 1e3)
        time.sleep(pause)
    return sorted(out)


def told(name, one):
    print("%-34s median %.2f ms, p90 %.2f, worst %.2f" % (name, statistics.median(one), one[len(one) * 9 // 10], one[-1]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--dcgm", action="store_true", help="with the names of dcgm-exporter, too")
    parser.add_argument("--hang", action="store_true")
    given = parser.parse_args()
    with Place(config="requests_per_second: 100000\naccess_log: false\n" + ("dcgm_names: true\n" if given.dcgm else ""), node=NODE, apply=True) as place:
        client = place.daemon.local()
        for number in range(50):
            place.daemon.tenant("t%d" % number)
        for number in range(56):
            answer = client.ask("POST", PREFIX + "/leases", {"class": "mig", "profile": "1g.10gb", "ttlSeconds": 3600, "tenant": "t%d" % (number % 50)})
            if answer.status != 201:
                raise RuntimeError(answer.body.decode())
        end = time.monotonic() + 60
        while time.monotonic() < end and len(re.findall(r'^bulkhead_slice_sm_active_ratio{.*tenant="', page(client), re.M)) < 56:
            time.sleep(0.5)
        text = page(client)
        print("%d lines, %d KiB; %d slices with a tenant, %d GPUs" % (text.count("\n"), len(text) >> 10,
              len(re.findall(r'^bulkhead_slice_sm_active_ratio{.*tenant="', text, re.M)), len(re.findall("^bulkhead_gpu_power_watts{", text, re.M))))
        pause = 0.01
        times(client, "/metrics", 20, pause)
        told("GET /healthz (the floor)", times(client, "/healthz", given.count, pause))
        before, began = cpu(client), time.monotonic()
        told("GET /metrics", times(client, "/metrics", given.count, pause))
        spent, lasted = cpu(client) - before, time.monotonic() - began
        before, began = cpu(client), time.monotonic()
        time.sleep(max(5.0, lasted))
        idle = (cpu(client) - before) / (time.monotonic() - began)
        print("CPU of the daemon                  %.3f ms an answer; unasked %.2f %% of a core, all it does" % ((spent - idle * lasted) / given.count * 1e3, idle * 100))
        if given.hang:
            place.twin.bulkhead("twin", "break", "hang-call", "--function", "nvmlDeviceGetTemperature", "--gpu", "3", "--delay-ms", "60000", "--dir", place.twin.dir)
            time.sleep(4)
            told("GET /metrics while GPU 3 hangs", times(client, "/metrics", given.count, pause))
            ages = {int(gpu): float(age) for gpu, age in re.findall(r'^bulkhead_gpu_value_age_seconds{gpu="(\d)".*group="quick"} (\S+)$', page(client), re.M)}
            print("oldest power or temperature of the other GPUs %.2f s; of GPU 3 %.1f s" % (max(age for gpu, age in ages.items() if gpu != 3), ages.get(3, 0)))


if __name__ == "__main__":
    main()
