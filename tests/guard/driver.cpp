// A resource manager behind libc's ioctl, for descriptors of $BULKHEAD_ROOT/dev/nvidiactl: clients, devices,
// memory, duplicates; what it holds is in the file $TEST_TRUTH, shared by all processes. Preloaded after the
// guard.
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>

#include "abi/rm/rm.hpp"
#include "tests/guard/truth.hpp"

namespace {

using namespace bulkhead::abi;

struct Object {
  std::uint32_t client, parent, handle, cls;
  std::uint32_t body;
};
constexpr unsigned max_objects = 1U << 20;
constexpr unsigned chains = 1U << 16;
struct Book {
  std::uint32_t pid;
  unsigned count, next_client, next_body;
  std::uint32_t first[chains];  // index + 1
  std::uint32_t following[max_objects];
  Object objects[max_objects];
  std::uint64_t bytes[max_objects];  // of bodies
  std::uint32_t references[max_objects];
  std::uint32_t free_object, free_body;  // index + 1
};
Book* book;
Truth* truth;
Truth::Process* me;
dev_t device;
ino_t inode;
std::atomic<int> lock{0};

__attribute__((constructor)) void begin() {
  const char* root = getenv("BULKHEAD_ROOT");
  const char* path = getenv("TEST_TRUTH");
  if (root == nullptr || path == nullptr) return;
  char name[4096];
  snprintf(name, sizeof name, "%s/dev/nvidiactl", root);
  struct stat about = {};
  if (stat(name, &about) != 0) return;
  device = about.st_dev;
  inode = about.st_ino;
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  truth = static_cast<Truth*>(mmap(nullptr, sizeof(Truth), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  close(fd);
  book = static_cast<Book*>(mmap(nullptr, sizeof(Book), PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  madvise(book, sizeof(Book), MADV_WIPEONFORK);
}

std::uint32_t chain_of(std::uint32_t client, std::uint32_t handle) {
  return (client * 2654435761U ^ handle * 40503U) & (chains - 1);
}

Object* find(std::uint32_t client, std::uint32_t handle) {
  for (std::uint32_t i = book->first[chain_of(client, handle)]; i != 0; i = book->following[i - 1]) {
    Object& object = book->objects[i - 1];
    if (object.client == client && object.handle == handle) return &object;
  }
  return nullptr;
}

Object* add(std::uint32_t client, std::uint32_t parent, std::uint32_t handle, std::uint32_t cls,
            std::uint32_t body) {
  std::uint32_t index = book->free_object;
  if (index != 0) {
    book->free_object = book->following[index - 1];
  } else {
    if (book->count == max_objects) return nullptr;
    index = ++book->count;
  }
  std::uint32_t& first = book->first[chain_of(client, handle)];
  book->objects[index - 1] = {client, parent, handle, cls, body};
  book->following[index - 1] = first;
  first = index;
  return &book->objects[index - 1];
}

void drop(Object& object) {
  std::uint32_t* link = &book->first[chain_of(object.client, object.handle)];
  const auto index = static_cast<std::uint32_t>(&object - book->objects) + 1;
  while (*link != index) link = &book->following[*link - 1];
  *link = book->following[index - 1];
  book->following[index - 1] = book->free_object;
  book->free_object = index;
  if (object.cls == class_device_memory && --book->references[object.body] == 0) {
    me->bytes.fetch_sub(book->bytes[object.body]);
  }
  const Object was = object;
  object.client = 0;
  if (was.cls != class_device && was.cls != class_subdevice && was.cls != class_client && was.cls != 0x9999)
    return;
  for (unsigned i = 0; i < book->count; ++i) {
    Object& child = book->objects[i];
    if (child.client == was.client && child.client != 0 && child.handle != was.handle &&
        (was.cls == class_client || child.parent == was.handle)) {
      drop(child);
    }
  }
}

template <class Form>
void allocate(Form* form) {
  if (form->cls == class_client || form->cls == class_root) {
    form->handle = 0xc1d00000U + (static_cast<std::uint32_t>(getpid()) << 8) + (++book->next_client & 0xff);
    add(form->handle, form->handle, form->handle, class_client, 0);
    form->status = ok;
    return;
  }
  if (find(form->root, form->root) == nullptr) {
    form->status = err_invalid_client;
    return;
  }
  if (find(form->root, form->handle) != nullptr) {
    form->status = err_insert_duplicate_name;
    return;
  }
  std::uint32_t body = 0;
  if (form->cls == class_device_memory) {
    auto* params = reinterpret_cast<MemoryParams*>(form->params);
    if (getenv("TEST_DRIVER_FAILS") != nullptr) {
      form->status = err_invalid_argument;
      return;
    }
    params->size = (params->size + 4095) / 4096 * 4096;
    if (const char* more = getenv("TEST_DRIVER_ROUNDS")) params->size += strtoull(more, nullptr, 0);
    body = book->next_body++ % max_objects;
    while (book->references[body] != 0) body = book->next_body++ % max_objects;
    book->bytes[body] = params->size;
    book->references[body] = 1;
    truth->took(params->size, *me);
  }
  form->status = add(form->root, form->parent, form->handle, form->cls, body) != nullptr ? ok : err_no_memory;
}

constexpr std::uint32_t foreign = 0x9998;  // class of a handle to another process's memory

void control(Control* form) {
  form->status = ok;
  if (form->command == cmd_import_objects_from_fd) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(form->params);
    add(form->client, words[1], words[2], foreign, 0);
  }
  if (form->command == cmd_fb_get_info_v2) {
    auto* info = reinterpret_cast<FbInfo*>(form->params);
    for (unsigned i = 0; i < info->count && i < 128; ++i) {
      info->list[i].data = (80U << 20) - (info->list[i].index == fb_heap_free ? 1000 : 0);
    }
  }
}

}  // namespace

extern "C" int ioctl(int fd, unsigned long request, ...) noexcept {
  va_list rest;
  va_start(rest, request);
  void* argument = va_arg(rest, void*);
  va_end(rest);
  struct stat about = {};
  if ((request >> 8 & 0xff) != ioctl_magic || book == nullptr || fstat(fd, &about) != 0 ||
      about.st_ino != inode || about.st_dev != device) {
    return static_cast<int>(syscall(SYS_ioctl, fd, request, argument));
  }
  while (lock.exchange(1) != 0) {
  }
  const auto pid = static_cast<std::uint32_t>(getpid());
  if (book->pid != pid) {
    book->pid = pid;
    me = truth->of(pid);
  }
  switch (request & 0xff) {
    case esc_alloc:
      if ((request >> 16 & 0x3fff) == sizeof(Alloc)) {
        allocate(static_cast<Alloc*>(argument));
      } else {
        allocate(static_cast<AllocOld*>(argument));
      }
      break;
    case esc_free: {
      auto* form = static_cast<Free*>(argument);
      Object* object = find(form->root, form->handle);
      form->status = object == nullptr ? err_object_not_found : ok;
      if (object != nullptr) drop(*object);
      break;
    }
    case esc_dup_object: {
      auto* form = static_cast<Dup*>(argument);
      const Object* source = find(form->source_client, form->source_handle);
      form->status = ok;
      if (source == nullptr) {  // another process's
        add(form->client, form->parent, form->handle, foreign, 0);
        break;
      }
      if (source->cls == class_device_memory) ++book->references[source->body];
      add(form->client, form->parent, form->handle, source->cls, source->body);
      break;
    }
    case esc_control:
      control(static_cast<Control*>(argument));
      break;
    case esc_share:
      static_cast<std::uint32_t*>(argument)[5] = ok;
      break;
    case esc_vid_heap_control:
      static_cast<std::uint32_t*>(argument)[5] = ok;
      break;
    default:
      break;
  }
  lock.store(0);
  return 0;
}
