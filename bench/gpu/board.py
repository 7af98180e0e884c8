"""The board: one shared file through which tenants are told to run or rest and tell what they did, so that a window of
a second costs a second and not the start of a Python program.

A slot is 1 MiB: u64 words run (0 rest, 1 run, 2 end, 3 run the other way), count, ring entries, ready, pid, -, stamp
(ns); from byte 64 a ring of 32768 pairs of f64 (monotonic seconds; work done so far, or a latency in seconds).
"""
import bisect
import mmap
import os
import struct

SLOT, RING, FIRST = 1 << 20, 32768, 64
REST, RUN, END, OTHER = 0, 1, 2, 3


class Slot:
    """The tenant's side."""

    def __init__(self, path, index):
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), SLOT, offset=index * SLOT)
        self.entries = 0
        struct.pack_into("<Q", self.memory, 32, os.getpid())

    def run(self):
        return struct.unpack_from("<Q", self.memory, 0)[0]

    def ready(self):
        struct.pack_into("<Q", self.memory, 24, 1)

    def push(self, when, value):
        struct.pack_into("<dd", self.memory, FIRST + (self.entries % RING) * 16, when, value)
        self.entries += 1
        struct.pack_into("<Q", self.memory, 16, self.entries)


class Board:
    """The conductor's side."""

    def __init__(self, path, slots=96):
        self.path, self.slots, self.used = path, slots, 0
        with open(path, "wb") as file:
            file.truncate(slots * SLOT)
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)

    def new_slot(self):
        if self.used == self.slots:
            raise RuntimeError("the board is full")
        self.used += 1
        return self.used - 1

    def word(self, slot, offset):
        return struct.unpack_from("<Q", self.memory, slot * SLOT + offset)[0]

    def command(self, slot, run):
        struct.pack_into("<Q", self.memory, slot * SLOT, run)

    def is_ready(self, slot):
        return self.word(slot, 24) == 1

    def pid(self, slot):
        return self.word(slot, 32)

    def stamp(self, slot):
        return self.word(slot, 48) / 1e9

    def entries(self, slot, since):
        """The ring's pairs from the last one before `since` on."""
        total, base, found = self.word(slot, 16), slot * SLOT + FIRST, []
        for k in range(total - 1, max(-1, total - RING), -1):
            pair = struct.unpack_from("<dd", self.memory, base + (k % RING) * 16)
            found.append(pair)
            if pair[0] < since:
                break
        found.reverse()
        return found

    def rate(self, slot, start, end):
        """Work a second between two moments, interpolated between completions."""
        pairs = self.entries(slot, start)
        if len(pairs) < 2:
            return 0.0
        times = [p[0] for p in pairs]
        if times[-1] < start:
            return 0.0

        def at(moment):
            k = bisect.bisect_right(times, moment)
            if k == 0:
                return pairs[0][1]
            if k < len(pairs):
                (t0, v0), (t1, v1) = pairs[k - 1], pairs[k]
                return v0 + (v1 - v0) * (moment - t0) / (t1 - t0) if t1 > t0 else v1
            # The step under way has not ended: give it what its predecessors took, and never more than one step.
            (t0, v0), (t1, v1) = pairs[0], pairs[-1]
            steps = len(pairs) - 1
            mean = (t1 - t0) / steps
            return v1 + (v1 - v0) / steps * min(1.0, (moment - t1) / mean if mean > 0 else 0.0)

        # The mean over all windows of half the length within this one. Shares come in rounds of up to some hundred
        # milliseconds; a plain difference would be off by a part of a round at either end, this is off by its square.
        half, steps = (end - start) / 2, 100
        moments = [start + half * k / steps for k in range(steps + 1)]
        return sum(at(m + half) - at(m) for m in moments) / len(moments) / half

    def values(self, slot, start, end):
        return [v for t, v in self.entries(slot, start) if start <= t <= end]

    def longest_gap(self, slot, start, end):
        times = [t for t, _ in self.entries(slot, start) if start <= t <= end]
        return max((b - a for a, b in zip(times, times[1:])), default=end - start)

    def close(self):
        self.memory.close()
        try:
            os.unlink(self.path)
        except OSError:
            pass


def percentile(values, fraction):
    """Nearest rank; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, int(len(ordered) * fraction + 0.999999) - 1))]
