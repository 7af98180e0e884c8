// Work in order: streams, events, the thread for what the host does, and waiting.
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "base/clock.hpp"
#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

namespace {

constexpr std::uint64_t shortest_sleep_ns = 100'000;  // below, a sleep takes longer than what is waited for
constexpr std::uint64_t longest_sleep_ns = 50'000'000;
constexpr std::uint64_t stepped_sleep_ns = 500'000;  // the time of a stepped twin moves when others say so

rm::GroupName name_of(CUcontext context) { return {process().rm.client(), context->group}; }

void sleep_until(std::uint64_t due_ns) {
  for (;;) {
    const std::uint64_t now = monotonic_ns();
    if (now >= due_ns) return;
    if (due_ns - now < shortest_sleep_ns) {
      ::sched_yield();
      continue;
    }
    const std::uint64_t ns = due_ns - now - shortest_sleep_ns / 2;
    const timespec span{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
    ::nanosleep(&span, nullptr);
  }
}

// Reads how far the group is.
CUresult look(CUcontext context, rm::Progress& progress) {
  auto seen = process().driver->progress(name_of(context));
  if (!seen.ok()) {
    if (context->sticky == CUDA_SUCCESS) context->sticky = CUDA_ERROR_LAUNCH_FAILED;  // its channels are gone
    return context->sticky;
  }
  progress = *seen;
  context->completed = progress.completed;
  if (context->fault_ticket != 0 && progress.completed >= context->fault_ticket &&
      context->sticky == CUDA_SUCCESS)
    context->sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
  return context->sticky;
}

// Until the group has finished `ticket`. What others do on the GPU may make it later: so it looks again, at
// growing intervals while the prediction keeps being wrong.
CUresult wait_ticket(Lock& lock, CUcontext context, std::uint64_t ticket) {
  std::uint64_t patience = 20'000;
  while (context->completed < ticket) {
    if (context->sticky != CUDA_SUCCESS) return context->sticky;
    rm::Progress progress;
    if (const auto failed = look(context, progress); failed != CUDA_SUCCESS) return failed;
    if (progress.completed >= ticket) break;
    const auto least = process().driver->at_least_ns(name_of(context), ticket);
    std::uint64_t ns = least.ok() ? *least : 0;
    if (progress.stepped) {
      ns = stepped_sleep_ns;
    } else {
      ns = std::clamp(ns, patience, longest_sleep_ns);
      patience = std::min<std::uint64_t>(patience * 2, 500'000);
    }
    lock.unlock();
    sleep_until(monotonic_ns() + ns);
    lock.lock();
  }
  return context->sticky;
}

void read_time(CUcontext context, EventState& state) {
  if (state.done_ns != 0 || !state.submitted) return;
  const auto at = process().driver->finished_at_ns(name_of(context), state.point.ticket);
  if (at.ok()) state.done_ns = std::max<std::uint64_t>(*at, 1);
}

// A job's time of completion is kept for a thousand jobs: events are read before theirs is gone.
CUresult read_old_times(Lock& lock, CUcontext context) {
  while (!context->timed.empty() &&
         context->timed.front()->point.ticket + rm::queue_depth - 24 <= context->last_ticket) {
    const auto state = context->timed.front();
    context->timed.pop_front();
    if (state.use_count() == 1) continue;  // nobody will ask
    if (const auto failed = wait_ticket(lock, context, state->point.ticket); failed != CUDA_SUCCESS)
      return failed;
    read_time(context, *state);
  }
  return CUDA_SUCCESS;
}

CUresult submit_now(Lock& lock, CUstream_st& stream, std::uint64_t ns, bool faults) {
  CUcontext const context = stream.context;
  if (context->sticky != CUDA_SUCCESS) return context->sticky;
  if (const auto failed = read_old_times(lock, context); failed != CUDA_SUCCESS) return failed;
  for (;;) {
    const auto ticket = process().driver->submit(name_of(context), ns);
    if (ticket.ok()) {
      context->last_ticket = *ticket;
      stream.last.ticket = *ticket;
      if (faults && context->fault_ticket == 0) context->fault_ticket = *ticket;
      return CUDA_SUCCESS;
    }
    if (ticket.error().code() != Errc::in_use) {
      context->sticky = CUDA_ERROR_LAUNCH_FAILED;
      return context->sticky;
    }
    // A full channel: the launch waits, as on the real one.
    const std::uint64_t oldest =
        context->last_ticket - std::min<std::uint64_t>(context->last_ticket, rm::queue_depth - 1);
    if (const auto failed = wait_ticket(lock, context, oldest); failed != CUDA_SUCCESS) return failed;
  }
}

// What the host still has to do before the next thing of this stream.
std::uint64_t behind(const CUstream_st& stream) {
  const CUctx_st& context = *stream.context;
  std::uint64_t deferred = stream.last.deferred;
  if (&stream == context.legacy.get()) {
    for (const auto& [handle, other] : context.streams) {
      if ((other->flags & 1U) == 0) deferred = std::max(deferred, other->last.deferred);
    }
    for (const auto& [thread, other] : context.of_threads)
      deferred = std::max(deferred, other->last.deferred);
  } else if ((stream.flags & 1U) == 0) {
    deferred = std::max(deferred, context.legacy->last.deferred);
  }
  return deferred > context.deferred_done ? deferred : 0;
}

void defer(const std::shared_ptr<CUstream_st>& stream, std::function<void(Lock&)> run) {
  CUctx_st& context = *stream->context;
  context.queue.push_back({stream, std::move(run)});
  stream->last.deferred = ++context.deferred;
  start_thread(&context);
  context.changed.notify_all();
}

void work(CUcontext context) {
  Lock lock(process().mutex);
  for (;;) {
    context->changed.wait(lock, [&] { return context->stopping || !context->queue.empty(); });
    if (context->queue.empty()) break;
    const auto next = context->queue.front();
    static_cast<void>(wait_ticket(lock, context, next.stream->last.ticket));
    next.run(lock);
    context->queue.pop_front();
    ++context->deferred_done;
    context->changed.notify_all();
  }
  context->has_thread = false;
  context->changed.notify_all();
}

}  // namespace

void start_thread(CUcontext context) {
  if (context->has_thread) return;
  context->has_thread = true;
  std::thread(work, context).detach();
}

void stop_thread(Lock& lock, CUcontext context) {
  context->stopping = true;
  context->changed.notify_all();
  context->changed.wait(lock, [&] { return !context->has_thread; });
}

std::shared_ptr<CUstream_st> find_stream(CUcontext context, CUstream stream) {
  if (stream == nullptr || stream == CU_STREAM_LEGACY) return context->legacy;
  if (stream == CU_STREAM_PER_THREAD) {
    auto& own = context->of_threads[static_cast<pid_t>(::syscall(SYS_gettid))];
    if (own == nullptr) {
      own = std::make_shared<CUstream_st>();
      own->context = context;
      own->id = process().next_id++;
    }
    return own;
  }
  // A stream may be used while another context is current, as long as it lives.
  if (const auto here = context->streams.find(stream); here != context->streams.end()) return here->second;
  for (CUcontext other : process().contexts) {
    if (const auto there = other->streams.find(stream); there != other->streams.end()) return there->second;
  }
  return nullptr;
}

bool done(CUcontext context, const Point& point) {
  if (context == nullptr || !context->alive) return true;
  if (point.deferred > context->deferred_done) return false;
  if (point.ticket <= context->completed) return true;
  rm::Progress progress;
  static_cast<void>(look(context, progress));
  return context->completed >= point.ticket || context->sticky != CUDA_SUCCESS;
}

CUresult wait(Lock& lock, CUcontext context, const Point& point) {
  if (point.deferred > context->deferred_done)
    context->changed.wait(lock, [&] { return context->deferred_done >= point.deferred || !context->alive; });
  return wait_ticket(lock, context, point.ticket);
}

CUresult wait_all(Lock& lock, CUcontext context) {
  if (context->deferred > context->deferred_done) {
    const auto failed = wait(lock, context, {0, context->deferred});
    if (failed != CUDA_SUCCESS) return failed;
  }
  const auto result = wait_ticket(lock, context, context->last_ticket);
  if (context->alive) settle_pools(context);
  return result;
}

CUresult fault_seen(CUcontext context) {
  if (context->fault_ticket != 0 && context->sticky == CUDA_SUCCESS) {
    rm::Progress progress;
    static_cast<void>(look(context, progress));
  }
  return context->sticky;
}

CUresult submit(Lock& lock, const std::shared_ptr<CUstream_st>& stream, std::uint64_t ns, bool faults) {
  if (behind(*stream) == 0) return submit_now(lock, *stream, ns, faults);
  defer(stream,
        [stream, ns, faults](Lock& held) { static_cast<void>(submit_now(held, *stream, ns, faults)); });
  return CUDA_SUCCESS;
}

CUresult do_in_order(Lock& lock, const std::shared_ptr<CUstream_st>& stream,
                     std::function<void(Lock&)> what) {
  if (behind(*stream) == 0) {
    what(lock);
  } else {
    defer(stream, std::move(what));
  }
  return CUDA_SUCCESS;
}

CUresult call_host(Lock&, const std::shared_ptr<CUstream_st>& stream, CUhostFn function, void* data) {
  defer(stream, [function, data](Lock& lock) {
    lock.unlock();
    function(data);
    lock.lock();
  });
  return CUDA_SUCCESS;
}

// An event goes through the channel like work does: when the group is off the GPU, it does not happen.
CUresult record(Lock& lock, CUevent_st& event, const std::shared_ptr<CUstream_st>& stream) {
  auto state = std::make_shared<EventState>();
  state->context = stream->context;
  const bool timed = (event.flags & 2U) == 0;
  const auto happen = [state, stream, timed](Lock& held) {
    const auto result = submit_now(held, *stream, 1, false);
    state->submitted = true;
    state->point.ticket = stream->last.ticket;
    if (timed && result == CUDA_SUCCESS) stream->context->timed.push_back(state);
    return result;
  };
  event.state = state;
  if (behind(*stream) == 0) return happen(lock);
  defer(stream, [happen](Lock& held) { static_cast<void>(happen(held)); });
  state->point.deferred = stream->last.deferred;
  return CUDA_SUCCESS;
}

CUresult wait_for_event(Lock&, CUevent_st& event, const std::shared_ptr<CUstream_st>& stream) {
  const auto state = event.state;
  if (state == nullptr || done(state->context, state->point)) return CUDA_SUCCESS;
  if (state->context == stream->context) {
    stream->last.deferred = std::max(stream->last.deferred, state->point.deferred);
    return CUDA_SUCCESS;  // one context's jobs are in order
  }
  defer(stream, [state](Lock& lock) {
    if (state->context->alive) static_cast<void>(wait(lock, state->context, state->point));
  });
  return CUDA_SUCCESS;
}

}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

#define WITH_STREAM(call, stream, handle)                  \
  ENTER(call, context);                                    \
  const auto stream = find_stream(call.context(), handle); \
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE

namespace {

CUresult make_stream(CUstream* out, unsigned flags, int priority) {
  ENTER(call, context);
  if (out == nullptr || flags > 1) return CUDA_ERROR_INVALID_VALUE;
  auto stream = std::make_shared<CUstream_st>();
  stream->context = call.context();
  stream->flags = flags;
  stream->priority = std::clamp(priority, -5, 0);
  stream->id = process().next_id++;
  *out = stream.get();
  call.context()->streams.emplace(stream.get(), stream);
  return CUDA_SUCCESS;
}

CUevent_st* find_event(CUevent event) {
  const auto found = process().events.find(event);
  return found != process().events.end() ? found->second.get() : nullptr;
}

CUresult forbid_capture(CUstream_st& stream) {  // what is not allowed on a stream that captures
  if (stream.capture == nullptr) return CUDA_SUCCESS;
  stream.capture->invalid = true;
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

bool event_done(const CUevent_st& event) {
  return event.state == nullptr || done(event.state->context, event.state->point);
}

}  // namespace

EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned flags) { return make_stream(stream, flags, 0); }
EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  return make_stream(stream, flags, priority);
}
EXPORT CUresult cuStreamDestroy_v2(CUstream handle) {
  if (handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD)
    return CUDA_ERROR_INVALID_HANDLE;
  ENTER(call, driver);
  for (CUcontext context : process().contexts) {
    if (context->streams.erase(handle) != 0) return CUDA_SUCCESS;  // its work goes on
  }
  return CUDA_ERROR_INVALID_HANDLE;
}
EXPORT CUresult cuStreamDestroy(CUstream stream) { return cuStreamDestroy_v2(stream); }
EXPORT CUresult cuStreamSynchronize(CUstream handle) {
  WITH_STREAM(call, stream, handle);
  if (const auto failed = forbid_capture(*stream); failed != CUDA_SUCCESS) return failed;
  CUcontext const context = stream->context;
  if (stream == context->legacy) return wait_all(call.lock(), context);
  const auto result = wait(call.lock(), context, stream->last);
  // A deferred launch made the last ticket later.
  const auto again = result == CUDA_SUCCESS ? wait(call.lock(), context, stream->last) : result;
  if (context->alive) settle_pools(context);
  return again;
}
EXPORT CUresult cuStreamQuery(CUstream handle) {
  WITH_STREAM(call, stream, handle);
  if (const auto failed = forbid_capture(*stream); failed != CUDA_SUCCESS) return failed;
  CUcontext const context = stream->context;
  const Point point =
      stream == context->legacy ? Point{context->last_ticket, context->deferred} : stream->last;
  const bool ready = done(context, point);
  if (context->sticky != CUDA_SUCCESS) return context->sticky;
  return ready ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
  WITH_STREAM(call, stream, handle);
  if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *flags = stream->flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  WITH_STREAM(call, stream, handle);
  if (priority == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *priority = stream->priority;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  WITH_STREAM(call, stream, handle);
  if (id == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *id = stream->id;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
  WITH_STREAM(call, stream, handle);
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *device = stream->context->device->ordinal;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  WITH_STREAM(call, stream, handle);
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *context = stream->context;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCtx_v2(CUstream handle, CUcontext* context, void** green) {
  if (green != nullptr) *green = nullptr;
  return cuStreamGetCtx(handle, context);
}
EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned) {
  WITH_STREAM(call, stream, handle);
  CUevent_st* const event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->capture != nullptr) {  // joins the capture
    if (stream->capture == nullptr) {
      stream->capture = event->capture;
      stream->capture->streams.insert(stream.get());
    } else if (stream->capture != event->capture) {
      return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    for (CUgraphNode node : event->tail) {
      if (std::find(stream->tail.begin(), stream->tail.end(), node) == stream->tail.end())
        stream->tail.push_back(node);
    }
    return CUDA_SUCCESS;
  }
  if (stream->capture != nullptr) {
    capture_node(*stream, CU_GRAPH_NODE_TYPE_WAIT_EVENT)->event = event;
    return CUDA_SUCCESS;
  }
  return wait_for_event(call.lock(), *event, stream);
}
EXPORT CUresult cuCtxWaitEvent(CUcontext context, CUevent event_handle) {
  ENTER(call, driver);
  CUevent_st* const event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (process().contexts.count(context) == 0 || !context->alive) return CUDA_ERROR_INVALID_CONTEXT;
  return wait_for_event(call.lock(), *event, context->legacy);
}
EXPORT CUresult cuStreamAttachMemAsync(CUstream handle, CUdeviceptr, size_t, unsigned) {
  WITH_STREAM(call, stream, handle);
  return CUDA_SUCCESS;  // pages of managed memory do not move here
}
EXPORT CUresult cuStreamCopyAttributes(CUstream to, CUstream from) {
  WITH_STREAM(call, stream, to);
  return find_stream(call.context(), from) != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

EXPORT CUresult cuEventCreate(CUevent* out, unsigned flags) {
  ENTER(call, context);
  if (out == nullptr || flags > 7) return CUDA_ERROR_INVALID_VALUE;
  auto event = std::make_unique<CUevent_st>();
  event->context = call.context();
  event->flags = flags;
  *out = event.get();
  process().events.emplace(event.get(), std::move(event));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventDestroy_v2(CUevent event) {
  ENTER(call, driver);
  return process().events.erase(event) != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
EXPORT CUresult cuEventDestroy(CUevent event) { return cuEventDestroy_v2(event); }
EXPORT CUresult cuEventRecordWithFlags(CUevent event_handle, CUstream handle, unsigned) {
  WITH_STREAM(call, stream, handle);
  CUevent_st* const event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->context->device != stream->context->device) return CUDA_ERROR_INVALID_HANDLE;
  event->capture = stream->capture;
  event->tail.clear();
  if (stream->capture != nullptr) {
    event->tail = stream->tail;
    return CUDA_SUCCESS;
  }
  return record(call.lock(), *event, stream);
}
EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  return cuEventRecordWithFlags(event, stream, 0);
}
EXPORT CUresult cuCtxRecordEvent(CUcontext context, CUevent event_handle) {
  ENTER(call, driver);
  CUevent_st* const event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (process().contexts.count(context) == 0 || !context->alive) return CUDA_ERROR_INVALID_CONTEXT;
  return record(call.lock(), *event, context->legacy);
}
EXPORT CUresult cuEventQuery(CUevent event_handle) {
  ENTER(call, driver);
  const CUevent_st* const event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->capture != nullptr) return CUDA_ERROR_CAPTURED_EVENT;
  const bool ready = event_done(*event);
  if (event->context->sticky != CUDA_SUCCESS) return event->context->sticky;
  return ready ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
EXPORT CUresult cuEventSynchronize(CUevent event_handle) {
  ENTER(call, driver);
  CUevent_st* const event = find_event(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->capture != nullptr) return CUDA_ERROR_CAPTURED_EVENT;
  const auto state = event->state;
  if (state == nullptr || !state->context->alive) return CUDA_SUCCESS;
  auto result = wait(call.lock(), state->context, state->point);
  if (result == CUDA_SUCCESS) result = wait(call.lock(), state->context, state->point);
  if (result != CUDA_SUCCESS) return result;
  read_time(state->context, *state);
  settle_pools(state->context);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent start_handle, CUevent end_handle) {
  ENTER(call, driver);
  if (milliseconds == nullptr) return CUDA_ERROR_INVALID_VALUE;
  CUevent_st* const start = find_event(start_handle);
  CUevent_st* const end = find_event(end_handle);
  if (start == nullptr || end == nullptr || start->state == nullptr || end->state == nullptr ||
      ((start->flags | end->flags) & 2U) != 0 || start->context->device != end->context->device)
    return CUDA_ERROR_INVALID_HANDLE;
  if (!event_done(*start) || !event_done(*end)) return CUDA_ERROR_NOT_READY;
  for (EventState* state : {start->state.get(), end->state.get()}) {
    if (state->context->sticky != CUDA_SUCCESS) return state->context->sticky;
    read_time(state->context, *state);
    if (state->done_ns == 0) return CUDA_ERROR_INVALID_HANDLE;
  }
  *milliseconds = static_cast<float>(
      (static_cast<double>(end->state->done_ns) - static_cast<double>(start->state->done_ns)) / 1e6);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
  return cuEventElapsedTime(milliseconds, start, end);
}

// ---- launches
namespace {

CUresult launch(CUfunction function, const unsigned* size, CUstream handle, void** params, void** extra) {
  WITH_STREAM(call, stream, handle);
  if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  for (int i = 0; i < 6; ++i) {
    if (size[i] == 0) return CUDA_ERROR_INVALID_VALUE;
  }
  if (static_cast<std::uint64_t>(size[3]) * size[4] * size[5] > 1024) return CUDA_ERROR_INVALID_VALUE;
  const std::uint64_t ns = duration(*function, params, extra);
  if (stream->capture != nullptr) {
    CUgraphNode const node = capture_node(*stream, CU_GRAPH_NODE_TYPE_KERNEL);
    node->ns = ns;
    node->kernel = {function, size[0], size[1], size[2], size[3], size[4],
                    size[5],  0,       params,  extra,   nullptr, nullptr};
    return CUDA_SUCCESS;
  }
  if (const auto failed = fit_stack(stream->context); failed != CUDA_SUCCESS) return failed;
  if (function->work != nullptr && params != nullptr) function->work(*stream->context->device, size, params);
  return submit(call.lock(), stream, ns, function->faults);
}

}  // namespace

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                               unsigned by, unsigned bz, unsigned, CUstream stream, void** params,
                               void** extra) {
  const unsigned size[6] = {gx, gy, gz, bx, by, bz};
  return launch(function, size, stream, params, extra);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                                 void** extra) {
  if (config == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const unsigned size[6] = {config->gridDimX,  config->gridDimY,  config->gridDimZ,
                            config->blockDimX, config->blockDimY, config->blockDimZ};
  return launch(function, size, config->hStream, params, extra);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz,
                                          unsigned bx, unsigned by, unsigned bz, unsigned, CUstream stream,
                                          void** params) {
  if (const CUcontext context = current(); context != nullptr) {
    // All blocks must be on the GPU at once: 32 on a multiprocessor at most, and 2048 threads.
    const std::uint64_t threads = static_cast<std::uint64_t>(bx) * by * bz,
                        blocks = static_cast<std::uint64_t>(gx) * gy * gz;
    const std::uint64_t at_once =
        std::min<std::uint64_t>(32, threads != 0 ? 2048 / std::min<std::uint64_t>(threads, 2048) : 32);
    if (blocks > at_once * context->device->multiprocessors) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
  }
  const unsigned size[6] = {gx, gy, gz, bx, by, bz};
  return launch(function, size, stream, params, nullptr);
}
EXPORT CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* data) {
  WITH_STREAM(call, stream, handle);
  if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (stream->capture != nullptr) {
    capture_node(*stream, CU_GRAPH_NODE_TYPE_HOST)->host = {function, data};
    return CUDA_SUCCESS;
  }
  return call_host(call.lock(), stream, function, data);
}
EXPORT CUresult cuStreamAddCallback(CUstream handle, CUstreamCallback callback, void* data, unsigned flags) {
  WITH_STREAM(call, stream, handle);
  if (callback == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (const auto failed = forbid_capture(*stream); failed != CUDA_SUCCESS) return failed;
  const auto run = [callback, data, handle, stream](Lock& lock) {
    const auto status = stream->context->sticky;
    lock.unlock();
    callback(handle, status, data);
    lock.lock();
  };
  // Always on the context's thread, never inside the call.
  defer(stream, run);
  return CUDA_SUCCESS;
}

// ---- waiting for and writing memory words in stream order
namespace {
template <class Word>
CUresult write_word(CUstream handle, CUdeviceptr at, Word value) {
  WITH_STREAM(call, stream, handle);
  return do_in_order(call.lock(), stream, [at, value](Lock&) {
    copy_bytes(at, reinterpret_cast<std::uint64_t>(&value), sizeof value);
  });
}
}  // namespace
EXPORT CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr at, std::uint32_t value, unsigned) {
  return write_word(stream, at, value);
}
EXPORT CUresult cuStreamWriteValue64_v2(CUstream stream, CUdeviceptr at, std::uint64_t value, unsigned) {
  return write_word(stream, at, value);
}
