// Threads that do what would hold the server's own: page through the audit log, render long lists, write log
// lines. Each has a bounded queue.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace bulkhead::serve {

class Worker {
 public:
  explicit Worker(std::size_t most) : most_(most), thread_([this] { serve(); }) {}
  ~Worker() { end(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  bool put(std::function<void()> job) {  // false: too much waits, or it ends
    {
      const std::lock_guard hold(mutex_);
      if (ending_ || jobs_.size() >= most_) return false;
      jobs_.push_back(std::move(job));
    }
    ready_.notify_one();
    return true;
  }
  // Drops what waits and waits for the job at hand.
  void end() {
    std::deque<std::function<void()>> dropped;
    {
      const std::lock_guard hold(mutex_);
      ending_ = true;
      dropped.swap(jobs_);
    }
    ready_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void serve() {
    while (true) {
      std::function<void()> job;
      {
        std::unique_lock hold(mutex_);
        ready_.wait(hold, [this] { return ending_ || !jobs_.empty(); });
        if (jobs_.empty()) return;
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      job();
    }
  }

  const std::size_t most_;
  std::mutex mutex_ = {};
  std::condition_variable ready_ = {};
  std::deque<std::function<void()>> jobs_ = {};
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace bulkhead::serve
