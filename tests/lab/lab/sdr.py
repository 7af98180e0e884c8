"""Sensor data records for QEMU's BMC: full records of every shape that edge/bmc reads."""

# name, number, type, unit, M, B, B exponent, R exponent, linearisation, format (0 unsigned, 1 and 2 signed), raw thresholds
# (upper non-recoverable, critical, non-critical, then lower non-recoverable, critical, non-critical; 0 for none)
FULL = [
    ("CPU0 Temp", 1, 0x01, 1, 1, 0, 0, 0, 0, 0, (100, 95, 90, 0, 0, 5)),
    ("GPU0 Temp", 2, 0x01, 1, 1, 0, 0, 0, 0, 2, (95, 90, 85, 0, 0, 0)),  # two's complement: below zero as well
    ("Inlet Temp", 3, 0x01, 1, 5, -40, 0, -1, 0, 0, (0, 170, 160, 0, 0, 0)),
    ("FAN1", 4, 0x04, 18, 100, 0, 0, 0, 0, 0, (0, 0, 0, 0, 5, 8)),
    ("12V", 5, 0x02, 4, 6, 0, 0, -2, 0, 0, None),
    ("PSU1 Power", 6, 0x0B, 6, 8, 0, 0, 0, 0, 0, (0, 240, 0, 0, 0, 0)),
    ("FAN2 period", 7, 0x04, 18, 1, 0, 0, -4, 7, 0, None),  # 1/x: what a tachometer counts
]


def header(kind, body):
    return bytes([0, 0, 0x51, kind, len(body)]) + body


def full(name, number, kind, unit, m, b, b_exp, r_exp, linear, form, thresholds):
    levels = thresholds or (0,) * 6
    mask = sum(bit for bit, level in zip((0x20, 0x10, 0x08, 0x04, 0x02, 0x01), levels) if level)
    return header(0x01, bytes([
        0x20, 0, number, 0x07, number,      # owner, LUN, number; entity: system board
        0x7F, 0x68, kind, 0x01,             # initialisation, capabilities, type, threshold events
        0, 0, 0, 0, mask, mask,             # event masks; settable and readable thresholds
        form << 6, unit, 0, linear,         # units, base unit, modifier, linearisation
        m & 0xFF, (m >> 2) & 0xC0, b & 0xFF, (b >> 2) & 0xC0, 0, (r_exp & 0xF) << 4 | (b_exp & 0xF),
        0, 0, 0, 0, 0xFF, 0,                # analogue flags, nominal, normal range, range
        *levels, 0, 0, 0, 0, 0, 0xC0 | len(name)]) + name.encode())


def compact(name, number, kind, unit):
    return header(0x02, bytes([0x20, 0, number, 0x07, number, 0x7F, 0x68, kind, 0x01, 0, 0, 0, 0, 0xFF, 0xFF, 0, unit, 0,
                               0, 0, 0, 0, 0, 0, 0, 0, 0xC0 | len(name)]) + name.encode())


def numbered(number, record):
    return bytes([number & 0xFF, number >> 8]) + record[2:]


def repository():
    """QEMU marks a sensor present from its compact record only, so each full record has such a twin."""
    return b"".join(full(*row) + compact(row[0], row[1], row[2], row[3]) for row in FULL)


if __name__ == "__main__":
    import sys
    sys.stdout.buffer.write(repository())
