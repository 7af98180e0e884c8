"""bulkhead serve's telemetry from outside: /metrics, the API, a Prometheus that scrapes it, and what hangs or dies."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "serve"))
from daemon import PREFIX, Checks, Place, free_port, pretty, wait_for  # noqa: E402

NODE = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [3g.40gb, 1g.10gb, 1g.10gb, 1g.10gb]
  - select: {index: "1"}
    mode: mig
    layout: dynamic
  - select: {index: "2-6"}
    mode: exclusive
  - select: {index: "7"}
    mode: share
"""
QUICK = os.environ.get("BULKHEAD_QUICK", "1") != "0"
LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Page:
    """The lines of /metrics; page.of(name, gpu="3") gives what fits."""

    def __init__(self, text):
        self.text, self.lines, self.strange = text, [], []
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            found = LINE.match(line)
            if not found:
                self.strange.append(line)
                continue
            self.lines.append((found[1], dict(LABEL.findall(found[2] or "")), float(found[3])))

    def of(self, name, **labels):
        return [(has, value) for got, has, value in self.lines
                if got == name and all(has.get(key) == str(value) for key, value in labels.items())]

    def one(self, name, **labels):
        found = self.of(name, **labels)
        return found[0][1] if len(found) == 1 else None


def scrape(client):
    answer = client.ask("GET", "/metrics")
    if answer.status != 200:
        raise RuntimeError("/metrics: " + pretty(answer))
    return Page(answer.body.decode())


def lint(text):
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def monitors(pid):
    """The processes that sample for a daemon; any thread of it may be their parent."""
    found = []
    for task in os.listdir("/proc/%d/task" % pid):
        try:
            with open("/proc/%d/task/%s/children" % (pid, task)) as got:
                for child in got.read().split():
                    with open("/proc/%s/cmdline" % child) as words:
                        if "\0monitor\0" in words.read():
                            found.append(int(child))
        except OSError:
            pass
    return found


def main():
    checks = Checks()
    check = checks.check
    with Place(config="dcgm_names: true\nrequests_per_second: 100000\n", node=NODE, apply=True) as place:
        daemon, twin = place.daemon, place.twin
        admin = daemon.local()
        for name in ("blue", "red", "green"):
            daemon.tenant(name)
        users = {name: daemon.tls(daemon.token("tenant", name, name)["secret"]) for name in ("blue", "red", "green")}
        operator = daemon.tls(daemon.token("operator")["secret"])

        # ---- /metrics
        page = wait_for(lambda: (lambda p: p if len(p.of("bulkhead_gpu_power_watts")) == 8 and p.of("bulkhead_slice_memory_used_bytes") else None)(scrape(admin)))
        check("every GPU's power is on the page", page, pretty(admin.ask("GET", "/metrics")))
        page = page or scrape(admin)
        check("every line is one", not page.strange, *page.strange)
        check("the slices of GPU 0 are there, free ones without a tenant",
              len(page.of("bulkhead_slice_memory_used_bytes", gpu=0)) == 4 and not any("tenant" in has for has, _ in page.of("bulkhead_slice_memory_used_bytes")),
              page.of("bulkhead_slice_memory_used_bytes"))
        check("power and temperature are those of an idle H100", all(30 < value < 200 for _, value in page.of("bulkhead_gpu_power_watts")) and
              all(15 < value < 80 for _, value in page.of("bulkhead_gpu_temperature_celsius")), page.of("bulkhead_gpu_power_watts"))
        ours = "\n".join(line for line in page.text.splitlines() if "DCGM_FI_" not in line) + "\n"
        if shutil.which("promtool"):
            code, said = lint(ours)
            check("promtool finds nothing to say about our names", code == 0, said)
            code, said = lint(page.text)
            check("with dcgm-exporter's names it parses, and dislikes only them", code in (0, 3) and
                  all(line.startswith("DCGM_FI_") for line in said.splitlines() if line.strip()), code, said)
            page_with_nothing = lint("bulkhead_x{a=\"b} 1\n")[0]
            check("and promtool would have said so", page_with_nothing == 1, page_with_nothing)
        else:
            print("# promtool is not there (Debian: prometheus): the page's grammar is only looked at by this test's own reader")
        wanted = {"DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_SM_CLOCK", "DCGM_FI_DEV_MEM_CLOCK",
                  "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE", "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "DCGM_FI_DEV_MEM_COPY_UTIL",
                  "DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "DCGM_FI_PROF_GR_ENGINE_ACTIVE", "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
                  "DCGM_FI_PROF_DRAM_ACTIVE", "DCGM_FI_PROF_PCIE_TX_BYTES", "DCGM_FI_PROF_PCIE_RX_BYTES"}
        page = wait_for(lambda: (lambda p: p if wanted <= {name for name, _, _ in p.lines} else None)(scrape(admin))) or scrape(admin)
        check("dashboards for dcgm-exporter find their names", wanted <= {name for name, _, _ in page.lines}, wanted - {name for name, _, _ in page.lines})
        board = page.of("DCGM_FI_DEV_GPU_TEMP", gpu=3)
        check("and their labels", board and {"gpu", "UUID", "device", "modelName", "Hostname", "pci_bus_id"} <= set(board[0][0]), board)

        # ---- who has what
        def lease(tenant, **ask):
            made = admin.ask("POST", PREFIX + "/leases", {"tenant": tenant, "ttlSeconds": 600, **ask})
            if made.status != 201:
                raise RuntimeError("no lease: " + pretty(made))
            number = made.json()["id"]
            wait_for(lambda: admin.ask("GET", PREFIX + "/leases/%d" % number).json()["state"] == "active")
            return admin.ask("GET", PREFIX + "/leases/%d" % number).json()

        slice_ = lease("blue", **{"class": "mig", "profile": "3g.40gb"})
        whole = lease("red", **{"class": "exclusive"})
        cut = lease("green", **{"class": "mig", "profile": "2g.20gb"})  # on GPU 1, whose MIG mode is turned on for it
        check("all three leases are active", {one["state"] for one in (slice_, whole, cut)} == {"active"}, slice_, whole, cut)
        page = wait_for(lambda: (lambda p: p if p.of("bulkhead_slice_sm_active_ratio", tenant="green") and p.of("bulkhead_slice_sm_active_ratio", tenant="blue")
                              and p.of("bulkhead_gpu_power_watts", tenant="red") else None)(scrape(admin))) or scrape(admin)
        check("a slice's values name its tenant and lease", page.of("bulkhead_slice_sm_active_ratio", tenant="blue", lease=slice_["id"], gpu=0),
              page.of("bulkhead_slice_sm_active_ratio"))
        check("a whole GPU's do", page.of("bulkhead_gpu_power_watts", tenant="red", lease=whole["id"]), page.of("bulkhead_gpu_power_watts"))
        check("a slice that was cut for a lease is sampled soon after, MIG mode and all", page.of("bulkhead_slice_sm_active_ratio", tenant="green", gpu=1),
              page.of("bulkhead_slice_info"))
        check("the sampler let go for that and came back, in the same process", page.one("bulkhead_sampler_restarts_total") == 0 and
              page.one("bulkhead_gpu_state", gpu=1, state="sampling") == 1, page.of("bulkhead_gpu_state", gpu=1))
        check("a lease says where it is and until when", page.of("bulkhead_lease_info", lease=slice_["id"], tenant="blue", state="active") and
              page.of("bulkhead_lease_expires_timestamp_seconds", lease=slice_["id"]), page.of("bulkhead_lease_info"))
        check("dcgm-exporter's MIG labels are there", page.of("DCGM_FI_PROF_GR_ENGINE_ACTIVE", GPU_I_PROFILE="3g.40gb", tenant="blue"),
              page.of("DCGM_FI_PROF_GR_ENGINE_ACTIVE"))

        # ---- the API
        everything = operator.ask("GET", PREFIX + "/telemetry").json()
        check("an operator sees all GPUs with values", [gpu["index"] for gpu in everything["gpus"]] == list(range(8)) and
              all("power" in gpu["values"] for gpu in everything["gpus"]), json.dumps(everything)[:1500])
        seen = users["blue"].ask("GET", PREFIX + "/telemetry").json()
        check("a tenant sees its slice alone, without the GPU's values", len(seen["gpus"]) == 1 and "values" not in seen["gpus"][0] and
              [one["lease"] for one in seen["gpus"][0]["slices"]] == [slice_["id"]] and "sm" in seen["gpus"][0]["slices"][0]["values"], json.dumps(seen)[:1500])
        seen = users["red"].ask("GET", PREFIX + "/telemetry").json()
        check("who has a whole GPU sees it whole", len(seen["gpus"]) == 1 and "power" in seen["gpus"][0]["values"] and seen["gpus"][0]["lease"] == whole["id"],
              json.dumps(seen)[:1500])
        gpu = whole["devices"][0]["gpu"]
        instance = page.of("bulkhead_slice_info", tenant="blue")[0][0]["slice"]

        def history(client, **query):
            return client.ask("GET", PREFIX + "/telemetry/history?" + urllib.parse.urlencode(query))

        past = wait_for(lambda: (lambda a: a if a.status == 200 and len(a.json()["points"]) >= 3 else None)(history(operator, gpu=gpu, signal="power"))) or \
            history(operator, gpu=gpu, signal="power")
        points = past.json().get("points", [])
        check("the past of a GPU's power is seconds that count up to now", len(points) >= 3 and abs(points[-1][0] - time.time()) < 20 and
              all(30 < mean < 200 and worst >= mean - 1 for _, mean, worst in points), pretty(past))
        check("its tenant may read it from when it had it", history(users["red"], gpu=gpu, signal="power").status == 200)
        check("others may not, nor learn whether it is there", history(users["blue"], gpu=gpu, signal="power").status == 404 and
              history(users["blue"], gpu=0, signal="power").status == 404 and history(users["red"], gpu=0, slice=instance, signal="sm").status == 404)
        past = wait_for(lambda: (lambda a: a if a.status == 200 and a.json()["points"] else None)(history(users["blue"], gpu=0, slice=instance, signal="sm")))
        check("a slice's past is its tenant's", past, pretty(history(users["blue"], gpu=0, slice=instance, signal="sm")))
        bad = history(operator, gpu=0, signal="pwer", grain="day", **{"from": "yesterday"})
        check("every mistake of a question is said at once", bad.status == 400 and all(word in bad.json()["detail"] for word in ("signal:", "grain:", "from:")), pretty(bad))
        check("a day of minutes is an answer as well", history(operator, gpu=0, signal="power", grain="minute",
              **{"from": "2020-01-01T00:00:00Z"}).status == 200)

        # ---- links and sensors of the host
        counters = os.path.join(twin.dir, "root/sys/class/infiniband/mlx5_0/ports/1/counters")
        os.makedirs(counters)

        def link(packets, errors):
            for name, value in (("port_rcv_packets", packets), ("port_xmit_packets", packets), ("port_rcv_errors", errors), ("port_xmit_discards", 0)):
                with open(os.path.join(counters, name), "w") as out:
                    out.write("%d\n" % value)

        link(1000000, 0)
        check("a port of InfiniBand is on the page", wait_for(lambda: scrape(admin).one("bulkhead_infiniband_packets_total", device="mlx5_0", port=1) == 2e6))
        link(2000000, 60)  # 60 of two million: below 0.01 %; looked at when Prometheus has been asked

        # ---- a real Prometheus
        if shutil.which("prometheus"):
            port, token = free_port(), daemon.token("auditor")["secret"]
            folder = os.path.join(place.work, "prometheus")
            os.makedirs(folder)
            with open(os.path.join(folder, "prometheus.yml"), "w") as out:
                json.dump({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [
                    {"job_name": "bulkhead", "scheme": "https", "authorization": {"credentials": token}, "tls_config": {"ca_file": daemon.certificate},
                     "static_configs": [{"targets": ["127.0.0.1:%d" % daemon.port]}]}]}, out)  # JSON is YAML
            server = subprocess.Popen(["prometheus", "--config.file=" + os.path.join(folder, "prometheus.yml"), "--storage.tsdb.path=" + os.path.join(folder, "data"),
                                       "--web.listen-address=127.0.0.1:%d" % port], stdout=subprocess.DEVNULL, stderr=open(os.path.join(folder, "log"), "w"))
            try:
                def query(text):
                    try:
                        url = "http://127.0.0.1:%d/api/v1/query?%s" % (port, urllib.parse.urlencode({"query": text}))
                        with urllib.request.urlopen(url, timeout=5) as got:
                            return json.load(got)["data"]["result"]
                    except OSError:
                        return []

                up = wait_for(lambda: [one for one in query('up{job="bulkhead"}') if one["value"][1] == "1"], 60)
                check("a real Prometheus scrapes it, over TLS, with an auditor's token", up, open(os.path.join(folder, "log")).read()[-1500:])
                check("and has every GPU's power", len(wait_for(lambda: query("bulkhead_gpu_power_watts")) or []) == 8)
                check("and joins a tenant with its slice", len(query('bulkhead_slice_sm_active_ratio{tenant="blue"}')) == 1)
                # The counter is asked every few seconds, and a range that has just begun is guessed at its ends.
                def joules():
                    watts = {one["metric"]["gpu"]: float(one["value"][1]) for one in query("avg_over_time(bulkhead_gpu_power_watts[20s])")}
                    rate = {one["metric"]["gpu"]: float(one["value"][1]) for one in query("rate(bulkhead_gpu_energy_joules_total[20s])")}
                    joules.seen = (rate, watts)
                    return len(rate) == len(watts) == 8 and all(abs(rate[gpu] - watts[gpu]) < 0.3 * watts[gpu] for gpu in rate)

                check("the joules' rate is the power", wait_for(joules, 60), *joules.seen)
                check("no sample is refused", all(float(one["value"][1]) == float(two["value"][1]) for one, two in
                      zip(query("scrape_samples_scraped"), query("scrape_samples_post_metric_relabeling"))))
            finally:
                server.terminate()
                server.wait(20)
        else:
            print("# prometheus is not there (Debian: prometheus): it is not asked to scrape")

        # ---- links again
        page = wait_for(lambda: (lambda p: p if p.one("bulkhead_infiniband_loss_ratio", device="mlx5_0") else None)(scrape(admin))) or scrape(admin)
        check("a few losses are no alarm", page.one("bulkhead_infiniband_loss_alarm", device="mlx5_0") == 0 and
              0 < (page.one("bulkhead_infiniband_loss_ratio", device="mlx5_0") or 1) < 1e-4, page.of("bulkhead_infiniband_loss_ratio"))
        link(3000000, 2000)
        check("more than 0.01 % is one", wait_for(lambda: scrape(admin).one("bulkhead_infiniband_loss_alarm", device="mlx5_0") == 1), scrape(admin).of("bulkhead_infiniband_loss_ratio"))
        check("PCIe errors are counted for every GPU", len({has["pci"] for has, _ in page.of("bulkhead_pcie_errors_total", severity="fatal")}) >= 8,
              page.of("bulkhead_pcie_errors_total", severity="fatal"))

        # ---- one GPU's driver call hangs
        twin.bulkhead("twin", "break", "hang-call", "--function", "nvmlDeviceGetTemperature", "--gpu", "3", "--delay-ms", "25000" if QUICK else "60000", "--dir", twin.dir)
        page = wait_for(lambda: (lambda p: p if (p.one("bulkhead_gpu_hung_seconds", gpu=3) or 0) > 0 else None)(scrape(admin))) or scrape(admin)
        check("a hung GPU is said to hang", page.one("bulkhead_gpu_state", gpu=3, state="hung") == 1, page.of("bulkhead_gpu_state", gpu=3))
        took, oldest = [], 0.0
        for _ in range(50):
            began = time.monotonic()
            answer = admin.ask("GET", "/metrics")
            took.append(time.monotonic() - began)
            page = Page(answer.body.decode())
            oldest = max([oldest] + [value for has, value in page.of("bulkhead_gpu_value_age_seconds", group="quick") if has["gpu"] != "3"])
            time.sleep(0.05)
        print("# while it hangs: /metrics in %.1f ms (median), %.1f ms (worst of 50); oldest power of the other GPUs %.2f s" %
              (sorted(took)[25] * 1e3, max(took) * 1e3, oldest))
        check("the others' values stay fresh meanwhile", 0 < oldest < 5, oldest)
        check("and the page is answered", max(took) < 5, took)
        hung = operator.ask("GET", PREFIX + "/telemetry").json()["gpus"][3]
        check("the API names the call", hung["state"] == "hung" and hung.get("call") == "nvmlDeviceGetTemperature", hung)
        page = wait_for(lambda: (lambda p: p if p.one("bulkhead_gpu_power_watts", gpu=3) is None else None)(scrape(admin)))
        check("after a while its old values are no more told as if they were new", page and page.one("bulkhead_gpu_power_watts", gpu=2) is not None)
        twin.bulkhead("twin", "mend", "--dir", twin.dir)
        check("once the call answers, so does the GPU", wait_for(lambda: scrape(admin).one("bulkhead_gpu_power_watts", gpu=3) is not None, 90))

        # ---- the sampler's process dies; the daemon does not
        first = monitors(daemon.process.pid)
        check("one process samples for the daemon", len(first) == 1, first)
        os.kill(first[0], 11)
        page = wait_for(lambda: (lambda p: p if p.one("bulkhead_sampler_restarts_total") == 1 else None)(scrape(admin))) or scrape(admin)
        check("a sampler that crashes is counted, and the daemon answers on", page.one("bulkhead_sampler_restarts_total") == 1 and
              admin.ask("GET", "/readyz").status == 200)
        second = wait_for(lambda: [one for one in monitors(daemon.process.pid) if one != first[0]]) or [0]
        check("it is started again, as another process", len(second) == 1 and second[0] != 0, first, second)
        time.sleep(2)  # what the page shows is a second old
        check("and its values come back", wait_for(lambda: (lambda p: p.one("bulkhead_sampling_up") == 1 and
              (p.one("bulkhead_gpu_value_age_seconds", gpu=0, group="quick") or 99) < 3)(scrape(admin))), daemon.said())
        daemon.kill()
        check("when the daemon is killed the sampler goes with it", wait_for(lambda: not os.path.exists("/proc/%d" % second[0]), 10))

    with Place(config="telemetry: off\n", node=NODE) as place:
        admin = place.daemon.local()
        page = scrape(admin)
        check("telemetry: off asks no driver and says nothing of GPUs' sensors", not page.of("bulkhead_gpu_power_watts") and not monitors(place.daemon.process.pid))
        check("and the API says why", admin.ask("GET", PREFIX + "/telemetry").status == 503)
    checks.done()


if __name__ == "__main__":
    main()
