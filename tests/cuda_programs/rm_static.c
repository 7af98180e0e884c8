/* A program without a dynamic loader that speaks to the driver itself: nothing preloaded sees it, only who
 * watches its system calls. It makes a client, a device and objects of device memory, and prints what RM
 * answered as a line of JSON. rm_static [--bytes N] [--count N] [--hold SECONDS] [--gpu N] Exit 3: the device
 * answers no driver calls (a twin's, when nobody performs them for this program). */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* nvos.h of the open kernel modules: NVOS64, NVOS00, NV0080_ALLOC_PARAMETERS, NV_MEMORY_ALLOCATION_PARAMS. */
struct alloc {
  uint32_t root, parent, handle, cls;
  uint64_t params, rights;
  uint32_t params_size, flags, status, pad;
};
struct release {
  uint32_t root, parent, handle, status;
};
struct device {
  uint32_t device, share_client, target_client, target_device, flags, pad;
  uint64_t va_space_size, va_start, va_limit;
  uint32_t va_mode, pad2;
};
struct memory {
  uint32_t owner, type, flags, width, height;
  int32_t pitch;
  uint32_t attr, attr2, format, compression, zcull, pad;
  uint64_t range_lo, range_hi, size, alignment, offset, limit, address;
  uint32_t ctag_offset, va_space, internal_flags, tag, numa_node, pad2;
};
_Static_assert(sizeof(struct alloc) == 48 && sizeof(struct device) == 56 && sizeof(struct memory) == 128,
               "as the driver has them");

static int file;
static uint32_t client;

static long request(unsigned number, void* argument, size_t size) {
  const unsigned long code = 3UL << 30 | (unsigned long)size << 16 | (unsigned long)'F' << 8 | number;
  return syscall(SYS_ioctl, file, code, argument);
}

/* RM's status; -1: no driver there. */
static long make(uint32_t parent, uint32_t handle, uint32_t cls, void* params) {
  struct alloc call = {client, parent, handle, cls, (uint64_t)(uintptr_t)params, 0, 0, 0, 0, 0};
  if (request(0x2b, &call, sizeof call) != 0) return -1;
  if (cls == 0x41) client = call.handle;
  return call.status;
}

int main(int count, char** words) {
  unsigned long bytes = 64UL << 20;
  int objects = 1, gpu = 0;
  double seconds = 0;
  for (int i = 1; i + 1 < count; i += 2) {
    if (strcmp(words[i], "--bytes") == 0)
      bytes = strtoul(words[i + 1], NULL, 0);
    else if (strcmp(words[i], "--count") == 0)
      objects = atoi(words[i + 1]);
    else if (strcmp(words[i], "--hold") == 0)
      seconds = atof(words[i + 1]);
    else if (strcmp(words[i], "--gpu") == 0)
      gpu = atoi(words[i + 1]);
    else
      return fprintf(stderr, "rm_static: what is %s\n", words[i]), 2;
  }
  const char* root = getenv("BULKHEAD_ROOT");
  char path[4096];
  snprintf(path, sizeof path, "%s/dev/nvidiactl", root != NULL ? root : "");
  file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return fprintf(stderr, "rm_static: open %s: %s\n", path, strerror(errno)), 1;

  struct device device = {(uint32_t)gpu, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  long status = make(0, 0, 0x41, NULL);
  if (status < 0) {
    printf("{\"error\": \"%s\", \"granted\": 0, \"refused\": 0}\n", strerrorname_np(errno));
    return 3;
  }
  if (status == 0) status = make(client, 0x5c000002, 0x80, &device);
  if (status == 0) status = make(0x5c000002, 0x5c000003, 0x2080, NULL);
  int granted = 0, refused = 0;
  for (int i = 0; i < objects && status == 0; ++i) {
    struct memory memory;
    memset(&memory, 0, sizeof memory);
    memory.owner = client;
    memory.flags = 0x1c101;
    memory.attr = 0x11800000;
    memory.attr2 = 0x100005;
    memory.size = bytes;
    memory.alignment = 2UL << 20;
    const long answer = make(0x5c000002, 0x5c000100 + (uint32_t)i, 0x40, &memory);
    if (answer == 0)
      ++granted;
    else if (answer == 0x51)
      ++refused; /* no memory */
    else
      status = answer < 0 ? 0xffff : answer;
  }
  printf("{\"status\": %ld, \"granted\": %d, \"refused\": %d, \"bytes\": %lu}\n", status, granted, refused,
         (unsigned long)granted * bytes);
  fflush(stdout);
  if (seconds > 0) {
    const struct timespec span = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&span, NULL);
  }
  if (granted > 0) { /* one by hand, the rest with the client */
    struct release call = {client, 0x5c000002, 0x5c000100, 0};
    request(0x29, &call, sizeof call);
  }
  struct release all = {client, client, client, 0};
  request(0x29, &all, sizeof all);
  return status == 0 ? 0 : 1;
}
