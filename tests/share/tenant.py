"""A program that speaks to the driver as libcuda does, by ioctl, and does what its standard input says: one answer a line."""
import ctypes
import fcntl
import mmap
import os
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
CLIENT, DEVICE, SUBDEVICE, GROUP, CHANNEL, MEMORY = 0x41, 0x80, 0x2080, 0xa06c, 0xc86f, 0x40
root = os.environ["BULKHEAD_ROOT"]
managed = {}


class Driver:
    def __init__(self):
        self.fd = os.open(root + "/dev/nvidiactl", os.O_RDWR | os.O_CLOEXEC)
        self.client, status = self.alloc(0, 0, CLIENT, None, root=0)
        assert status == 0, status
        self.next = 0x5d000000

    def ioctl(self, number, packed):
        buffer = ctypes.create_string_buffer(bytes(packed), len(packed))
        request = ctypes.c_ulong(0xc0000000 | len(packed) << 16 | ord("F") << 8 | number)
        if libc.ioctl(self.fd, request, buffer) < 0:
            raise OSError(ctypes.get_errno(), "ioctl %x" % number)
        return buffer.raw

    def alloc(self, parent, handle, cls, params, root=None):
        held = ctypes.create_string_buffer(params, len(params)) if params else None
        at = ctypes.addressof(held) if held else 0
        answer = self.ioctl(0x2b, struct.pack("<IIIIQQIIII", self.client if root is None else root, parent, handle, cls, at, 0, 0, 0, 0, 0))
        return struct.unpack_from("<I", answer, 8)[0], struct.unpack_from("<I", answer, 40)[0]

    def control(self, handle, command, params):
        held = ctypes.create_string_buffer(bytes(params), len(params))
        answer = self.ioctl(0x2a, struct.pack("<IIIIQII", self.client, handle, command, 0, ctypes.addressof(held), len(params), 0))
        return struct.unpack_from("<I", answer, 28)[0], held.raw

    def context(self, gpu=0):
        for parent, handle, cls, params in (
                (self.client, 0x5c000002, DEVICE, struct.pack("<I", gpu) + bytes(52)), (0x5c000002, 0x5c000003, SUBDEVICE, struct.pack("<I", 0)),
                (0x5c000002, 0x5c000015, GROUP, struct.pack("<IIII", 0, 0, 0, 1))):
            assert self.alloc(parent, handle, cls, params)[1] == 0
        for n in range(8):
            assert self.alloc(0x5c000015, 0x5c000020 + n, CHANNEL, bytes(512))[1] == 0
        assert self.control(0x5c000015, 0xa06c0101, bytes([1, 0, 0, 0]))[0] == 0

    def memory(self, size):
        params = bytearray(128)
        struct.pack_into("<I", params, 0, self.client)
        struct.pack_into("<Q", params, 64, size)
        self.next += 1
        return self.next, self.alloc(0x5c000002, self.next, MEMORY, bytes(params))[1]

    def free(self, handle):
        return struct.unpack_from("<I", self.ioctl(0x29, struct.pack("<IIII", self.client, 0x5c000002, handle, 0)), 12)[0]

    def slice_us(self):
        return struct.unpack("<Q", self.control(0x5c000015, 0xa06c0104, bytes(8))[1])[0]


driver = None


def do(words):
    global driver
    verb, *rest = words
    if verb == "context":
        driver = Driver()
        driver.context(*map(int, rest))
        return "%x" % driver.client
    if verb == "alloc":
        handle, status = driver.memory(int(rest[0]) << 20)
        return "%x" % handle if status == 0 else "status %x" % status
    if verb == "fill":  # as many pieces of this size as there are
        n = 0
        while driver.memory(int(rest[0]) << 20)[1] == 0:
            n += 1
        return str(n)
    if verb == "churn":
        for _ in range(int(rest[0])):
            handle, status = driver.memory(2 << 20)
            if status or driver.free(handle):
                return "status %x" % status
        return "done"
    if verb == "free":
        return "%x" % driver.free(int(rest[0], 16))
    if verb == "info":  # what cuMemGetInfo asks: MiB in all, MiB free
        packed = struct.pack("<IIIII", 2, 0x09, 0, 0x16, 0) + bytes(1028 - 20)
        values = struct.unpack_from("<IIIII", driver.control(0x5c000003, 0x20801303, packed)[1])
        return "%d %d" % (values[2] >> 10, values[4] >> 10)
    if verb == "slice":
        return str(driver.slice_us())
    if verb == "set-slice":
        return "%x" % driver.control(0x5c000015, 0xa06c0103, struct.pack("<Q", int(rest[0])))[0]
    if verb == "managed":
        length = int(rest[0]) << 20
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        uvm = os.open(root + "/dev/nvidia-uvm", os.O_RDWR | os.O_CLOEXEC)
        at = libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        got = libc.mmap(at, length, 3, mmap.MAP_SHARED | 0x10, uvm, 0)
        if got is None or got == ctypes.c_void_p(-1).value:
            return os.strerror(ctypes.get_errno())
        managed[at] = length
        return "%x" % at
    if verb == "unmanage":
        at = int(rest[0], 16)
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(managed.pop(at)))
        return "done"
    if verb == "export":  # and free: its descriptor alone keeps the memory
        handle, status = driver.memory(int(rest[0]) << 20)
        if status:
            return "status %x" % status
        into = os.open(root + "/dev/nvidiactl", os.O_RDWR | os.O_CLOEXEC)
        packed = bytearray(2128)
        struct.pack_into("<iIH", packed, 0, into, 0x5c000002, 1)
        struct.pack_into("<I", packed, 76, handle)
        struct.pack_into("<HH", packed, 2124, 1, 0)
        status = driver.control(driver.client, 0x3d0b, packed)[0]
        return "status %x" % status if status else "%x" % driver.free(handle)
    if verb == "fork":  # a child with a context and memory of its own, which stays
        reader, writer = os.pipe()
        if os.fork() == 0:
            driver = Driver()
            driver.context()
            os.write(writer, b"x%x" % driver.memory(int(rest[0]) << 20)[1])
            os.close(writer)
            os.execvp("sleep", ["sleep", rest[1]]) if len(rest) > 1 else __import__("time").sleep(3600)
        os.close(writer)
        return os.read(reader, 64).decode()
    if verb == "fds":
        return " ".join(sorted(os.readlink("/proc/self/fd/" + n) for n in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + n)))
    if verb == "uid":
        return "%d %d" % (os.getuid(), os.getgid())
    if verb == "exit":
        sys.exit(int(rest[0]))
    return "no such command"


for line in sys.stdin:
    try:
        print(do(line.split()), flush=True)
    except OSError as error:
        print("error %d" % error.errno, flush=True)
