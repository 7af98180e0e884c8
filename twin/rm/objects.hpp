// The driver's objects: what handles name, who owns what, and what goes when something goes. Each step commits by
// itself, leaves first, so that a free that is cut off has freed less, never half.
#pragma once

#include "twin/rm/page.hpp"
#include "twin/rm/scheduler.hpp"
#include "twin/rm/store.hpp"

namespace bulkhead::twin::rm {

struct Owner {  // the process that allocates a client
  std::uint32_t pid = 0, uid = 0;
  std::uint64_t start_time = 0;
  Text<64> name = {};
};

class Objects {
 public:
  explicit Objects(Store& store) : store_(store), page_(store.page()), scheduler_(store) {}

  Index find(std::uint32_t client, std::uint32_t handle) const;
  Index find_client(std::uint32_t client) const;  // into Page::clients

  // These return an index, or 0 when a table is full. The caller commits.
  Index add_client(Index file, std::uint32_t handle, const Owner& owner);
  Index add(Index parent, std::uint32_t handle, std::uint32_t cls, std::uint32_t gpu);
  bool add_memory(Index object, std::uint64_t bytes);       // new bytes, charged to the object's process
  void hold_memory(Index object, Index memory);             // another handle of the same bytes
  bool export_memory(Index file, Index memory);
  bool add_group(Index object, std::uint32_t engine);
  void join_group(Index channel, Index group);
  void set_disables(Index channel, std::uint32_t count);

  void free(Index object);     // and everything below it
  void free_file(Index file);  // its clients, what it keeps of others' memory, itself

 private:
  void free_leaf(Index object);
  void let_go(Index memory);        // frees it when nobody holds it
  void charge_holder(Index memory); // to its allocator while it has a handle, else to another holder, else to nobody
  Index charge_of(Index client, std::uint32_t gpu);
  Index& bucket(std::uint32_t client, std::uint32_t handle) const;

  Store& store_;
  Page& page_;
  Scheduler scheduler_;
};

}  // namespace bulkhead::twin::rm
