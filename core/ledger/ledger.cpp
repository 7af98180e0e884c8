#include "core/ledger/ledger.hpp"

#include <algorithm>
#include <set>

namespace bulkhead::ledger {

Ledger::Index Ledger::find(std::uint32_t client, std::uint32_t handle) const {
  const auto at = by_handle_.find(key(client, handle));
  return at != by_handle_.end() ? at->second : 0;
}

Ledger::Index Ledger::take_node() {
  if (live_ >= max_objects) return 0;
  ++live_;
  if (!free_nodes_.empty()) {
    const Index at = free_nodes_.back();
    free_nodes_.pop_back();
    nodes_[at] = {};
    nodes_[at].used = true;
    return at;
  }
  nodes_.emplace_back().used = true;
  return static_cast<Index>(nodes_.size() - 1);
}

Ledger::Index Ledger::take_block() {
  if (!free_blocks_.empty()) {
    const Index at = free_blocks_.back();
    free_blocks_.pop_back();
    blocks_[at] = {};
    blocks_[at].used = true;
    return at;
  }
  blocks_.emplace_back().used = true;
  return static_cast<Index>(blocks_.size() - 1);
}

void Ledger::link(Index node, Index parent) {
  nodes_[node].parent = parent;
  nodes_[node].next = nodes_[parent].first_child;
  nodes_[node].previous = 0;
  if (nodes_[parent].first_child != 0) nodes_[nodes_[parent].first_child].previous = node;
  nodes_[parent].first_child = node;
}

void Ledger::unlink(Index node) {
  Node& gone = nodes_[node];
  if (gone.previous != 0) {
    nodes_[gone.previous].next = gone.next;
  } else if (gone.parent != 0) {
    nodes_[gone.parent].first_child = gone.next;
  }
  if (gone.next != 0) nodes_[gone.next].previous = gone.previous;
  gone.parent = gone.next = gone.previous = 0;
}

Ledger::Index Ledger::client_node(const Event& event) {
  if (const Index known = find(event.client, event.client); known != 0) return known;
  const Index made = take_node();
  if (made == 0) return 0;
  Node& node = nodes_[made];
  node.client = node.handle = event.client;
  node.what = What::client;
  node.process = event.process;
  node.fd = event.fd;
  by_handle_[key(event.client, event.client)] = made;
  return made;
}

// What was made before the watch began, or through a class nobody records, still has children that go with
// it.
Ledger::Index Ledger::parent_node(const Event& event, Index client) {
  if (event.parent == event.client) return client;
  if (const Index known = find(event.client, event.parent); known != 0) return known;
  const Index made = take_node();
  if (made == 0) return 0;
  Node& node = nodes_[made];
  node.client = event.client;
  node.handle = event.parent;
  node.placeholder = true;
  link(made, client);
  by_handle_[key(event.client, event.parent)] = made;
  return made;
}

bool Ledger::guarded(Index top) const {
  Index at = top;
  for (;;) {
    const Node& node = nodes_[at];
    if (node.block != 0 || node.imported || node.what == What::group) return true;
    if (node.first_child != 0) {
      at = node.first_child;
      continue;
    }
    while (at != top && nodes_[at].next == 0) at = nodes_[at].parent;
    if (at == top) return false;
    at = nodes_[at].next;
  }
}

Ledger::Index Ledger::place(const Event& event) {
  if (event.handle == 0 || event.handle == event.client) return 0;
  if (const Index known = find(event.client, event.handle); known != 0 && !nodes_[known].placeholder) {
    // The driver would have refused a handle that is taken; so either what is known here is gone, or nothing
    // was made.
    if (event.hearsay != 0 && guarded(known)) return 0;
    free_tree(known);
  }
  const Index client = client_node(event);
  Index parent = client != 0 ? parent_node(event, client) : 0;
  if (parent == 0) return 0;
  Index made = find(event.client, event.handle);
  if (made != 0) {  // a placeholder becomes what it is, and keeps its children
    for (Index at = parent; at != 0; at = nodes_[at].parent) {
      if (at == made) parent = client;  // no tree of the driver's: nothing is below itself
    }
    unlink(made);
    nodes_[made].placeholder = false;
  } else {
    made = take_node();
    if (made == 0) return 0;
    by_handle_[key(event.client, event.handle)] = made;
  }
  link(made, parent);
  Node& node = nodes_[made];
  node.client = event.client;
  node.handle = event.handle;
  node.cls = event.cls;
  node.what = event.what;
  node.gpu = event.gpu < max_gpus ? event.gpu : no_gpu;
  return made;
}

bool Ledger::add(const Event& event) {
  if (event.what == What::client) return false;
  const Index made = place(event);
  if (made == 0) return false;
  Node& node = nodes_[made];
  node.engine = event.engine;
  if (event.what == What::group) node.born_ns = event.bytes;
  if (event.what == What::group || event.what == What::channel || event.what == What::subdevice)
    ++generation_;
  if (event.what == What::memory && event.gpu < max_gpus) {
    const Index block = take_block();
    blocks_[block].bytes = event.bytes;
    blocks_[block].gpu = event.gpu;
    memory_[event.gpu] += event.bytes;
    hold(made, block);
  }
  return true;
}

bool Ledger::add_duplicate(const Event& event) {
  Index source = find(event.source_client, event.source_handle);
  if (source == 0 || nodes_[source].placeholder || source == find(event.client, event.handle)) return false;
  Event like = event;
  like.what = nodes_[source].what;
  like.cls = nodes_[source].cls;
  like.gpu = nodes_[source].gpu;
  // A duplicate of these is another handle to the same channels, which the source's own handle rules.
  if (like.what == What::client || like.what == What::group || like.what == What::channel) return false;
  const Index block = nodes_[source].block;
  const bool imported = nodes_[source].imported;
  if (block != 0) ++blocks_[block].handles;  // what goes to make place may be the source's own tree
  const Index made = place(like);
  if (made != 0) {
    if (block != 0) hold(made, block);
    if (imported) {
      nodes_[made].imported = true;
      ++imports_;
    }
  }
  if (block != 0) {
    --blocks_[block].handles;
    release(block);
  }
  return made != 0;
}

void Ledger::hold(Index node, Index block) {
  nodes_[node].block = block;
  ++blocks_[block].handles;
}

// Frees the bytes when nothing keeps them. Kept without a handle by a process they count as an object, so that
// they are bounded; orphans are a sum.
void Ledger::release(Index at) {
  Block& block = blocks_[at];
  if (!block.used || block.handles != 0) return;
  if (block.exporter == has_ended) {
    orphaned_[block.gpu] += block.bytes;
  } else if (block.exporter != 0) {
    ++live_;
    return;
  }
  memory_[block.gpu] -= block.bytes;
  block = {};
  free_blocks_.push_back(at);
}

void Ledger::give_back(Index at) {
  Node& node = nodes_[at];
  if (node.imported) --imports_;
  if (node.what == What::group || node.what == What::channel || node.what == What::subdevice) ++generation_;
  const Index block = node.block;
  by_handle_.erase(key(node.client, node.handle));
  unlink(at);
  node = {};
  free_nodes_.push_back(at);
  --live_;
  if (block != 0) {
    --blocks_[block].handles;
    release(block);
  }
}

void Ledger::free_tree(Index top) {
  Index at = top;
  for (;;) {
    while (nodes_[at].first_child != 0) at = nodes_[at].first_child;
    const Index parent = nodes_[at].parent;
    give_back(at);
    if (at == top) break;
    at = parent;
  }
}

bool Ledger::orphans() const {
  return imports_ == 0 &&
         std::any_of(orphaned_.begin(), orphaned_.end(), [](std::uint64_t bytes) { return bytes != 0; });
}

bool Ledger::let_orphans_go() {
  if (imports_ != 0) return false;
  bool any = orphans();
  orphaned_.fill(0);
  for (Block& block : blocks_) {
    if (!block.used || block.exporter != has_ended) continue;
    block.exporter = 0;
    any = true;
  }
  return any;
}

bool Ledger::end_process(std::uint32_t process) {
  if (const auto known = processes_.find(process); known != processes_.end()) {
    managed_[known->second.managed_gpu] -= known->second.managed;
    processes_.erase(known);
  }
  for (Index at = 1; at < nodes_.size(); ++at) {
    if (nodes_[at].used && nodes_[at].what == What::client && nodes_[at].process == process) free_tree(at);
  }
  for (Index at = 1; at < blocks_.size(); ++at) {
    Block& block = blocks_[at];
    if (!block.used || block.exporter != process) continue;
    block.exporter = has_ended;
    if (block.handles != 0) continue;
    --live_;
    release(at);
  }
  return true;
}

bool Ledger::apply(const Event& event) {
  switch (event.kind) {
    case Kind::process: {
      if (event.process == 0 || processes_.size() >= max_processes || processes_.contains(event.process))
        return false;
      processes_[event.process] = {.pid = static_cast<int>(event.source_client), .start_time = event.bytes};
      return true;
    }
    case Kind::process_gone:
      return end_process(event.process);
    case Kind::moved: {
      bool any = false;
      for (Node& node : nodes_) {
        if (!node.used || node.what != What::client || node.process != event.process || node.fd != event.fd)
          continue;
        node.process = event.cls;
        node.fd = static_cast<int>(event.source_handle);
        any = true;
      }
      if (any) ++generation_;
      return any;
    }
    case Kind::object:
      return add(event);
    case Kind::duplicate:
      return add_duplicate(event);
    case Kind::import: {
      Event like = event;
      like.what = What::memory;
      const Index made = place(like);
      if (made == 0) return false;
      nodes_[made].imported = true;
      ++imports_;
      return true;
    }
    case Kind::free: {
      const Index at = find(event.client, event.handle);
      if (at == 0) return false;
      if (event.hearsay != 0 && guarded(at)) return false;
      free_tree(at);
      return true;
    }
    case Kind::exported: {
      const Index at = find(event.client, event.handle);
      if (at == 0 || nodes_[at].block == 0) return false;
      if (event.process != 0 && !processes_.contains(event.process)) return false;
      Block& block = blocks_[nodes_[at].block];
      // The first exporter that lives stands for all: none of them need be told apart.
      if (block.exporter != 0 && (block.exporter != has_ended || event.process == 0)) return false;
      block.exporter = event.process != 0 ? event.process : has_ended;
      return true;
    }
    case Kind::kept: {
      if (event.gpu >= max_gpus || !processes_.contains(event.process)) return false;
      const Index at = take_block();
      blocks_[at].bytes = event.bytes;
      blocks_[at].gpu = event.gpu;
      blocks_[at].exporter = event.process;
      memory_[event.gpu] += event.bytes;
      ++live_;
      return true;
    }
    case Kind::orphaned:
      if (event.gpu >= max_gpus) return false;
      orphaned_[event.gpu] += event.bytes;
      return true;
    case Kind::unheld:
      return let_orphans_go();
    case Kind::managed: {
      const auto process = processes_.find(event.process);
      if (process == processes_.end() || event.gpu >= max_gpus) return false;
      Process& who = process->second;
      if (who.managed == event.bytes && who.managed_gpu == event.gpu) return false;
      managed_[who.managed_gpu] -= who.managed;
      who.managed = event.bytes;
      who.managed_gpu = event.gpu;
      managed_[who.managed_gpu] += who.managed;
      return true;
    }
    case Kind::none:
      break;
  }
  return false;
}

std::uint64_t Ledger::used(std::uint32_t gpu) const {
  return gpu < max_gpus ? memory_[gpu] + orphaned_[gpu] + managed_[gpu] : 0;
}

bool Ledger::knows(std::uint32_t client, std::uint32_t handle) const {
  const Index at = find(client, handle);
  return at != 0 && !nodes_[at].placeholder;
}

bool Ledger::has_memory(std::uint32_t client, std::uint32_t handle) const {
  const Index at = find(client, handle);
  return at != 0 && nodes_[at].block != 0;
}

std::optional<What> Ledger::what(std::uint32_t client, std::uint32_t handle) const {
  const Index at = find(client, handle);
  if (at == 0 || nodes_[at].placeholder) return std::nullopt;
  return nodes_[at].what;
}

std::optional<std::uint32_t> Ledger::gpu_of(std::uint32_t client, std::uint32_t handle) const {
  for (Index at = find(client, handle); at != 0; at = nodes_[at].parent) {
    if (nodes_[at].gpu != no_gpu) return nodes_[at].gpu;
  }
  std::optional<std::uint32_t> only;
  if (const Index top = find(client, client); top != 0) {
    for (Index at = nodes_[top].first_child; at != 0; at = nodes_[at].next) {
      if (nodes_[at].what != What::device || nodes_[at].gpu == no_gpu) continue;
      if (only && *only != nodes_[at].gpu) return std::nullopt;
      only = nodes_[at].gpu;
    }
  }
  return only;
}

std::uint32_t Ledger::home_of(std::uint32_t process) const {
  std::uint32_t device = no_gpu, group = no_gpu;
  for (Index top = 1; top < nodes_.size(); ++top) {
    if (!nodes_[top].used || nodes_[top].what != What::client || nodes_[top].process != process) continue;
    for (Index at = nodes_[top].first_child; at != 0; at = nodes_[at].next) {
      if (nodes_[at].what != What::device || nodes_[at].gpu == no_gpu) continue;
      device = std::min<std::uint32_t>(device, nodes_[at].gpu);
      for (Index below = nodes_[at].first_child; below != 0; below = nodes_[below].next)
        if (nodes_[below].what == What::group) group = std::min<std::uint32_t>(group, nodes_[at].gpu);
    }
  }
  if (group != no_gpu) return group;
  return device != no_gpu ? device : 0;
}

std::vector<Group> Ledger::groups() const {
  std::vector<Group> out;
  for (const Node& node : nodes_) {
    if (!node.used || node.what != What::group || node.placeholder) continue;
    Group group{.process = 0,
                .gpu = node.gpu,
                .engine = node.engine,
                .client = node.client,
                .handle = node.handle,
                .born_ns = node.born_ns};
    for (Index at = node.first_child; at != 0; at = nodes_[at].next)
      if (nodes_[at].what == What::channel) group.channels.push_back(nodes_[at].handle);
    if (group.channels.empty()) continue;
    std::sort(group.channels.begin(), group.channels.end());
    if (const Index top = find(node.client, node.client); top != 0) {
      group.process = nodes_[top].process;
      group.fd = nodes_[top].fd;
      for (Index device = nodes_[top].first_child; device != 0; device = nodes_[device].next) {
        if (nodes_[device].gpu != node.gpu) continue;
        for (Index at = nodes_[device].first_child; at != 0; at = nodes_[at].next)
          if (nodes_[at].what == What::subdevice &&
              (group.subdevice == 0 || nodes_[at].handle < group.subdevice))
            group.subdevice = nodes_[at].handle;
      }
    }
    out.push_back(std::move(group));
  }
  std::sort(out.begin(), out.end(),
            [](const Group& a, const Group& b) { return key(a.client, a.handle) < key(b.client, b.handle); });
  return out;
}

std::vector<int> Ledger::files_of(std::uint32_t process) const {
  std::set<int> files;
  for (const Node& node : nodes_)
    if (node.used && node.what == What::client && node.process == process) files.insert(node.fd);
  return {files.begin(), files.end()};
}

std::vector<std::uint32_t> Ledger::clients_of(std::uint32_t process, int fd) const {
  std::vector<std::uint32_t> clients;
  for (const Node& node : nodes_)
    if (node.used && node.what == What::client && node.process == process && node.fd == fd)
      clients.push_back(node.handle);
  return clients;
}

std::optional<std::pair<std::uint32_t, int>> Ledger::owner_of(std::uint32_t client) const {
  const Index at = find(client, client);
  if (at == 0) return std::nullopt;
  return std::pair{nodes_[at].process, nodes_[at].fd};
}

void Ledger::snapshot(const std::function<void(const Event&)>& take) const {
  for (const auto& [number, process] : processes_) {
    take({.kind = Kind::process,
          .process = number,
          .source_client = static_cast<std::uint32_t>(process.pid),
          .bytes = process.start_time});
    if (process.managed != 0 || process.managed_gpu != 0)
      take({.kind = Kind::managed,
            .gpu = static_cast<std::uint8_t>(process.managed_gpu),
            .process = number,
            .bytes = process.managed});
  }
  std::vector<Index> first(blocks_.size());  // the handle that was told already
  for (Index top = 1; top < nodes_.size(); ++top) {
    if (!nodes_[top].used || nodes_[top].what != What::client) continue;
    const Node& client = nodes_[top];
    Index at = client.first_child;
    bool told = false;
    while (at != 0) {
      const Node& node = nodes_[at];
      if (!node.placeholder) {  // one is made again by its children; without any it says nothing
        Event event{.kind = Kind::object,
                    .what = node.what,
                    .gpu = node.gpu,
                    .process = client.process,
                    .client = node.client,
                    .parent = nodes_[node.parent].handle,
                    .handle = node.handle,
                    .cls = node.cls,
                    .bytes = node.born_ns,
                    .fd = client.fd,
                    .engine = node.engine};
        if (node.imported) {
          event.kind = Kind::import;
        } else if (node.block != 0 && first[node.block] != 0) {
          event.kind = Kind::duplicate;
          event.source_client = nodes_[first[node.block]].client;
          event.source_handle = nodes_[first[node.block]].handle;
        } else if (node.block != 0) {
          event.bytes = blocks_[node.block].bytes;
          first[node.block] = at;
        }
        take(event);
        told = true;
        if (event.kind == Kind::object && node.block != 0 && blocks_[node.block].exporter != 0)
          take({.kind = Kind::exported,
                .process = blocks_[node.block].exporter == has_ended ? 0 : blocks_[node.block].exporter,
                .client = node.client,
                .handle = node.handle});
      }
      if (node.first_child != 0) {
        at = node.first_child;
        continue;
      }
      while (at != top && nodes_[at].next == 0) at = nodes_[at].parent;
      if (at == top) break;
      at = nodes_[at].next;
    }
    if (!told) {  // a client without objects is told by one that is freed again
      const Event brief{.kind = Kind::object,
                        .process = client.process,
                        .client = client.handle,
                        .parent = client.handle,
                        .handle = client.handle ^ 1U,
                        .fd = client.fd};
      take(brief);
      take({.kind = Kind::free, .client = brief.client, .handle = brief.handle});
    }
  }
  for (const Block& block : blocks_) {
    if (block.used && block.handles == 0)
      take({.kind = Kind::kept, .gpu = block.gpu, .process = block.exporter, .bytes = block.bytes});
  }
  for (std::size_t gpu = 0; gpu < max_gpus; ++gpu) {
    if (orphaned_[gpu] != 0)
      take({.kind = Kind::orphaned, .gpu = static_cast<std::uint8_t>(gpu), .bytes = orphaned_[gpu]});
  }
}

}  // namespace bulkhead::ledger
