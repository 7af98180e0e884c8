#include "twin/rm/objects.hpp"

#include "abi/rm/rm.hpp"
#include "twin/rm/rm.hpp"

namespace bulkhead::twin::rm {

Index& Objects::bucket(std::uint32_t client, std::uint32_t handle) const {
  std::uint32_t mixed = (client * 0x9e3779b1U) ^ (handle * 0x85ebca77U);
  mixed ^= mixed >> 15U;
  return page_.hash[mixed % hash_buckets];
}

Index Objects::find(std::uint32_t client, std::uint32_t handle) const {
  for (Index at = bucket(client, handle); at != 0; at = page_.objects[at].hash_next) {
    const Object& object = page_.objects[at];
    if (object.handle == handle && page_.clients[object.client].handle == client) return at;
  }
  return 0;
}

Index Objects::find_client(std::uint32_t client) const {
  const Index object = find(client, client);
  return object != 0 ? page_.objects[object].client : 0;
}

Index Objects::add_client(Index file, std::uint32_t handle, const Owner& owner) {
  const Index at = store_.take(page_.clients, page_.counters.clients);
  if (at == 0) return 0;
  const Index root = store_.take(page_.objects, page_.counters.objects);
  if (root == 0) {
    store_.give_back(page_.clients, page_.counters.clients, at);
    return 0;
  }
  Client& client = page_.clients[at];
  client.handle = handle;
  client.pid = owner.pid;
  client.uid = owner.uid;
  client.start_time = owner.start_time;
  client.name = owner.name;
  client.file = file;
  client.object = root;
  Object& object = page_.objects[root];
  object.handle = handle;
  object.cls = abi::class_client;
  object.gpu = none;
  object.client = at;
  Index& chain = bucket(handle, handle);
  object.hash_next = chain;
  store_.edit(chain) = root;
  return at;
}

Index Objects::add(Index parent_at, std::uint32_t handle, std::uint32_t cls, std::uint32_t gpu) {
  const Index at = store_.take(page_.objects, page_.counters.objects);
  if (at == 0) return 0;
  Object& parent = store_.edit(page_.objects[parent_at]);
  Object& object = page_.objects[at];
  object.handle = handle;
  object.cls = cls;
  object.gpu = gpu;
  object.client = parent.client;
  object.parent = parent_at;
  object.next_sibling = parent.first_child;
  if (parent.first_child != 0) store_.edit(page_.objects[parent.first_child]).previous_sibling = at;
  parent.first_child = at;
  Index& chain = bucket(page_.clients[object.client].handle, handle);
  object.hash_next = chain;
  store_.edit(chain) = at;
  return at;
}

Index Objects::charge_of(Index client_at, std::uint32_t gpu) {
  const Client& client = page_.clients[client_at];
  for (Index at = 1; at <= page_.counters.charges.used; ++at) {
    const Charge& charge = page_.charges[at];
    if (charge.used != 0 && charge.pid == client.pid && charge.start_time == client.start_time && charge.gpu == gpu)
      return at;
  }
  const Index at = store_.take(page_.charges, page_.counters.charges);
  if (at == 0) return 0;
  Charge& charge = page_.charges[at];
  charge.pid = client.pid;
  charge.start_time = client.start_time;
  charge.name = client.name;
  charge.gpu = gpu;
  charge.dirty = 1;
  return at;
}

bool Objects::add_memory(Index object_at, std::uint64_t bytes) {
  const Object& object = page_.objects[object_at];
  const Index at = store_.take(page_.memory, page_.counters.memory);
  if (at == 0) return false;
  Memory& memory = page_.memory[at];
  memory.gpu = object.gpu;
  memory.bytes = bytes;
  memory.owner_pid = page_.clients[object.client].pid;
  store_.edit(page_.gpus[memory.gpu]).memory_bytes += bytes;
  hold_memory(object_at, at);
  return true;
}

void Objects::hold_memory(Index object_at, Index memory_at) {
  Memory& memory = store_.edit(page_.memory[memory_at]);
  Object& object = store_.edit(page_.objects[object_at]);
  object.memory = memory_at;
  object.next_holder = memory.first_holder;
  memory.first_holder = object_at;
  charge_holder(memory_at);
}

void Objects::charge_holder(Index memory_at) {
  Memory& memory = store_.edit(page_.memory[memory_at]);
  Index holder = memory.first_holder;
  for (Index at = holder; at != 0; at = page_.objects[at].next_holder) {
    if (page_.clients[page_.objects[at].client].pid == memory.owner_pid) holder = at;
  }
  const Index charge = holder != 0 ? charge_of(page_.objects[holder].client, memory.gpu) : 0;
  if (charge == memory.charge) return;
  if (memory.charge != 0) {
    Charge& before = store_.edit(page_.charges[memory.charge]);
    before.bytes -= memory.bytes;
    before.dirty = 1;
  }
  if (charge != 0) {
    Charge& after = store_.edit(page_.charges[charge]);
    after.bytes += memory.bytes;
    after.dirty = 1;
  }
  memory.charge = charge;
}

bool Objects::export_memory(Index file, Index memory) {
  const Index at = store_.take(page_.exports, page_.counters.exports);
  if (at == 0) return false;
  page_.exports[at].file = file;
  page_.exports[at].memory = memory;
  ++store_.edit(page_.memory[memory]).exports;
  return true;
}

bool Objects::add_group(Index object_at, std::uint32_t engine) {
  Object& object = store_.edit(page_.objects[object_at]);
  const Index at = store_.take(page_.groups, page_.counters.groups);
  if (at == 0) return false;
  const Index charge = charge_of(object.client, object.gpu);
  object.group = at;
  Group& group = page_.groups[at];
  group.gpu = object.gpu;
  group.engine = engine;
  group.object = object_at;
  group.slice_ns = slice_at_creation_us * 1000;
  group.charge = charge;
  if (charge != 0) {
    Charge& who = store_.edit(page_.charges[charge]);
    ++who.groups;
    who.dirty = 1;
  }
  if (engine == abi::engine_compute) scheduler_.add(at);
  return true;
}

void Objects::join_group(Index channel, Index group) {
  store_.edit(page_.objects[channel]).group = group;
  ++store_.edit(page_.groups[group]).channels;
}

void Objects::set_disables(Index channel_at, std::uint32_t count) {
  Object& channel = store_.edit(page_.objects[channel_at]);
  if (channel.group != 0 && (channel.disables == 0) != (count == 0)) {
    Group& group = store_.edit(page_.groups[channel.group]);
    group.disabled = count == 0 ? group.disabled - 1 : group.disabled + 1;
  }
  channel.disables = count;
}

void Objects::let_go(Index memory_at) {
  charge_holder(memory_at);
  const Memory& memory = page_.memory[memory_at];
  if (memory.first_holder != 0 || memory.exports != 0) return;
  store_.edit(page_.gpus[memory.gpu]).memory_bytes -= memory.bytes;
  store_.give_back(page_.memory, page_.counters.memory, memory_at);
}

void Objects::free_leaf(Index at) {
  Object& object = store_.edit(page_.objects[at]);
  if (object.memory != 0) {
    Memory& memory = store_.edit(page_.memory[object.memory]);
    if (memory.first_holder == at) {
      memory.first_holder = object.next_holder;
    } else {
      Index before = memory.first_holder;
      while (page_.objects[before].next_holder != at) before = page_.objects[before].next_holder;
      store_.edit(page_.objects[before]).next_holder = object.next_holder;
    }
    let_go(object.memory);
  }
  if (object.group != 0) {
    Group& group = store_.edit(page_.groups[object.group]);
    if (group.object == at) {
      if (group.engine == abi::engine_compute) scheduler_.remove(object.group);
      if (group.charge != 0) {
        Charge& who = store_.edit(page_.charges[group.charge]);
        --who.groups;
        who.dirty = 1;
      }
      store_.give_back(page_.groups, page_.counters.groups, object.group);
    } else {
      --group.channels;
      if (object.disables > 0) --group.disabled;
    }
  }
  Index& chain = bucket(page_.clients[object.client].handle, object.handle);
  if (chain == at) {
    store_.edit(chain) = object.hash_next;
  } else {
    Index before = chain;
    while (page_.objects[before].hash_next != at) before = page_.objects[before].hash_next;
    store_.edit(page_.objects[before]).hash_next = object.hash_next;
  }
  if (object.parent == 0) {
    store_.give_back(page_.clients, page_.counters.clients, object.client);
  } else {
    if (object.previous_sibling != 0) {
      store_.edit(page_.objects[object.previous_sibling]).next_sibling = object.next_sibling;
    } else {
      store_.edit(page_.objects[object.parent]).first_child = object.next_sibling;
    }
    if (object.next_sibling != 0)
      store_.edit(page_.objects[object.next_sibling]).previous_sibling = object.previous_sibling;
  }
  store_.give_back(page_.objects, page_.counters.objects, at);
  store_.commit();
}

void Objects::free(Index object) {
  Index at = object;
  for (;;) {
    while (page_.objects[at].first_child != 0) at = page_.objects[at].first_child;
    const Index parent = page_.objects[at].parent;
    free_leaf(at);
    if (at == object) return;
    at = parent;
  }
}

void Objects::free_file(Index file) {
  for (Index at = 1; at <= page_.counters.clients.used; ++at) {
    if (page_.clients[at].used != 0 && page_.clients[at].file == file) free(page_.clients[at].object);
  }
  for (Index at = 1; at <= page_.counters.exports.used; ++at) {
    if (page_.exports[at].used == 0 || page_.exports[at].file != file) continue;
    const Index memory = page_.exports[at].memory;
    --store_.edit(page_.memory[memory]).exports;
    store_.give_back(page_.exports, page_.counters.exports, at);
    let_go(memory);
    store_.commit();
  }
  store_.give_back(page_.files, page_.counters.files, file);
  store_.commit();
}

}  // namespace bulkhead::twin::rm
