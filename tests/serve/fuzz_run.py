#!/usr/bin/env python3
"""fuzz.py against a daemon of its own on a twin; afterwards the daemon must still be right: it ends with 0, its audit
chain is whole, and its memory has not run away.

fuzz_run.py SECONDS [SEED]
"""
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from daemon import PREFIX, Place  # noqa: E402


def main():
    seconds = float(sys.argv[1])
    with Place(config="requests_per_second: 100000\nstreams: 1000\n") as place:
        daemon = place.daemon
        words = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "fuzz.py"), "--socket", daemon.socket, "--url", daemon.url,
                 "--ca", daemon.certificate, "--seconds", str(seconds), "--pid", str(daemon.process.pid)]
        if len(sys.argv) > 2:
            words += ["--seed", sys.argv[2]]
        if os.environ.get("FUZZ_REPORT"):
            words += ["--report", os.environ["FUZZ_REPORT"]]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        lines = done.stdout.rstrip("\n").split("\n")
        counted = re.fullmatch(r"(\d+) passed, (\d+) failed", lines[-1])
        print("\n".join(lines[:-1] if counted else lines))
        if not counted:
            print("not ok - the fuzzer works to its end\n    it ended with %d, its last words are above" % done.returncode)
        passed, failed = map(int, counted.groups()) if counted else (0, 1)
        try:
            whole = daemon.local().ask("GET", PREFIX + "/audit/verdict").json()["whole"]
            with open("/proc/%d/status" % daemon.process.pid) as got:
                megabytes = int(re.search(r"VmHWM:\s+(\d+) kB", got.read())[1]) >> 10
            code = daemon.stop()
            results = {"the audit chain is whole afterwards": whole, "SIGTERM ends it with 0": code == 0, "its memory stayed below 1 GiB (%d MiB)" % megabytes: megabytes < 1024}
        except OSError as why:
            results = {"the daemon is there afterwards: %s" % why: False}
        for sentence, holds in results.items():
            print(("ok - " if holds else "not ok - ") + sentence)
            passed, failed = passed + bool(holds), failed + (not holds)
        with open(daemon.log) as got:
            # The walk over the whole audit log grows with the run, on a thread of its own; all else is bounded.
            slow = sorted(((float(ms), line) for line in got if "/audit/verdict " not in line
                           for ms in re.findall(r" ms=([0-9.]+)", line)), reverse=True)[:3]
        # By the daemon's own clock: the machine may be busy, and this client is slow.
        if slow and slow[0][0] > 1000:
            print("not ok - no request took the daemon more than a second")
            failed += 1
        else:
            print("ok - no request took the daemon more than a second")
            passed += 1
        for _, line in slow:
            print("# slowest, in the daemon's own words: " + line.strip()[:200])
        if failed:
            print("# the daemon's last words:\n" + daemon.said())
        print("%d passed, %d failed" % (passed, failed))
        return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
