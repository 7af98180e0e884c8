// The mapped page, its lock and its undo journal.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <type_traits>

#include "base/fd.hpp"
#include "base/result.hpp"
#include "twin/rm/page.hpp"

namespace bulkhead::twin::rm {

class Store {
 public:
  static Result<std::unique_ptr<Store>> open(const std::filesystem::path& path);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // The page is the caller's while this lives. What a dead holder left half done is undone first.
  class Lock {
   public:
    explicit Lock(Store& store);
    ~Lock();
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
    bool held() const { return held_; }

   private:
    Store& store_;
    std::unique_lock<std::mutex> threads_;
    bool held_ = false;
  };

  Page& page() const { return *page_; }

  // Every change goes through edit(), which saves the old content first, and becomes final with commit(). Always name
  // the whole element: two saved regions must be the same or apart.
  template <class T>
  T& edit(T& what) {
    static_assert(std::is_trivially_copyable_v<T>);
    save(&what, sizeof(T));
    return what;
  }
  void commit();
  void abandon();  // takes back everything since the last commit

  // A free element of a table, cleared; 0: the table is full.
  template <class T, std::size_t N>
  Index take(T (&table)[N], FreeList& list) {
    Index at = list.head;
    if (at == 0 && list.used + 1 >= N) return 0;
    edit(page_->counters);
    if (at != 0) {
      list.head = table[at].link;
    } else {
      at = ++list.used;
    }
    edit(table[at]) = T{};
    table[at].used = 1;
    return at;
  }
  template <class T, std::size_t N>
  void give_back(T (&table)[N], FreeList& list, Index at) {
    edit(page_->counters);
    edit(table[at]) = T{};
    table[at].link = list.head;
    list.head = at;
  }

 private:
  Store() = default;
  void save(const void* what, std::size_t size);
  void after_fork();

  std::filesystem::path path_;
  UniqueFd fd_;
  pid_t owner_ = 0;
  Page* page_ = nullptr;
  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();
};

}  // namespace bulkhead::twin::rm
