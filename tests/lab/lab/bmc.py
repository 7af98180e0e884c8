"""A BMC outside the machine, as QEMU's ipmi-bmc-extern speaks to one: it tells thresholds, gives records in small pieces, loses a
reservation on the way, has a sensor that is off and one whose curve is no formula, and can go deaf (raw 0x30 0x01 SECONDS).
"""
import os, socket, threading, time

import sdr

END_OF_MESSAGE, END_OF_COMMAND, ESCAPE = 0xA0, 0xA1, 0xAA
READINGS = {1: 0x37, 2: 0xF6, 3: 0x80, 4: 0x4B, 5: 0xC8, 6: 0x60, 7: 0x32, 9: 0x10}
OFF, CURVED = 8, 9
EXTRA = [("PSU2 Power", OFF, 0x0B, 6, 8, 0, 0, 0, 0, 0, None), ("VRM Temp", CURVED, 0x01, 1, 1, 0, 0, 0, 0x70, 0, None)]
LARGEST_PIECE = 16


class Controller:
    def __init__(self, path):
        self.rows = sdr.FULL + EXTRA
        self.records = [sdr.numbered(i, sdr.full(*row)) for i, row in enumerate(self.rows)]
        self.reservation, self.reads, self.deaf_until = 1, 0, 0.0
        if os.path.exists(path):
            os.unlink(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        threading.Thread(target=self.serve, daemon=True).start()

    def close(self):
        self.listener.close()

    def serve(self):
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            message, escaped = bytearray(), False
            while octets := stream.recv(4096):
                for o in octets:
                    if escaped:
                        message.append(o & ~0x10)
                        escaped = False
                    elif o == ESCAPE:
                        escaped = True
                    elif o == END_OF_COMMAND:
                        message.clear()  # the machine's own matters: reset, its version
                    elif o == END_OF_MESSAGE:
                        if len(message) >= 4 and time.monotonic() >= self.deaf_until:
                            self.reply(stream, message)
                        message.clear()
                    else:
                        message.append(o)

    def reply(self, stream, message):
        number, function, command, data = message[0], message[1] >> 2, message[2], bytes(message[3:-1])
        answer = bytes([number, (function | 1) << 2 | (message[1] & 3), command]) + self.answer(function, command, data)
        answer += bytes([-sum(answer) & 0xFF])
        wire = bytearray()
        for o in answer:
            wire += bytes([ESCAPE, o | 0x10]) if o in (END_OF_MESSAGE, END_OF_COMMAND, ESCAPE) else bytes([o])
        try:
            stream.sendall(bytes(wire) + bytes([END_OF_MESSAGE]))
        except OSError:
            pass

    def answer(self, function, command, data):
        """Completion code and data."""
        if function == 0x06:
            return {0x01: bytes([0, 0x20, 0, 2, 0x45, 2, 0x02, 0x57, 1, 0, 2, 0]), 0x2F: b"\0\0", 0x2E: b"\0", 0x31: b"\0\0", 0x30: b"\0"}.get(command, b"\xc1")
        if function == 0x0A and command == 0x20:
            return bytes([0, 0x51, len(self.records), 0]) + bytes(10) + b"\x02"
        if function == 0x0A and command == 0x22:
            self.reservation = self.reservation % 200 + 1
            return bytes([0, self.reservation, 0])
        if function == 0x0A and command == 0x23 and len(data) == 6:
            return self.record(data)
        if function == 0x04 and command == 0x2D and data:
            if data[0] == OFF:
                return bytes([0, 0, 0x80, 0])  # events on, scanning off
            return bytes([0, READINGS[data[0]], 0xC0, 0]) if data[0] in READINGS else b"\xcb"
        if function == 0x04 and command == 0x27 and data:
            return self.thresholds(data[0])
        if function == 0x04 and command == 0x23 and data and data[0] == CURVED:
            return bytes([0, data[1], 3, 0, 0xFF, 0xC0, 0, 0xF0])  # m 3, b -1, result times 0.1
        if function == 0x30 and command == 0x01 and data:
            self.deaf_until = time.monotonic() + data[0]
            return b"\0"
        return b"\xc1"

    def record(self, data):
        number, offset, count = data[2] | data[3] << 8, data[4], data[5]
        self.reads += 1
        if data[0] != self.reservation and offset or self.reads == 9:
            self.reservation = self.reservation % 200 + 1  # somebody else changed the repository
            return b"\xc5"
        if number >= len(self.records):
            return b"\xcb"
        if count > LARGEST_PIECE:
            return b"\xca"
        following = number + 1 if number + 1 < len(self.records) else 0xFFFF
        return bytes([0, following & 0xFF, following >> 8]) + self.records[number][offset:offset + count]

    def thresholds(self, number):
        levels = next((row[10] for row in self.rows if row[1] == number), None)
        if not levels:
            return b"\xcd"
        mask = sum(1 << bit for bit, level in enumerate(levels_by_bit(levels)) if level)
        return bytes([0, mask]) + bytes(levels_by_bit(levels))


def levels_by_bit(levels):
    """From the rows' order (upper non-recoverable ... lower non-recoverable, as in a record) to that of the mask's bits."""
    upper_nr, upper_c, upper_nc, lower_nr, lower_c, lower_nc = levels
    return [lower_nc, lower_c, lower_nr, upper_nc, upper_c, upper_nr]
