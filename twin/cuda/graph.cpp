// Graphs: nodes, capture, instances and their launches.
#include <algorithm>
#include <cstring>

#include "twin/cuda/driver.hpp"

namespace bulkhead::twin::cuda {

CUgraphNode add_node(CUgraph graph, int type, std::vector<CUgraphNode> after) {
  auto node = std::make_unique<CUgraphNode_st>();
  node->type = type;
  node->graph = graph;
  node->after = std::move(after);
  graph->nodes.push_back(std::move(node));
  return graph->nodes.back().get();
}

CUgraphNode capture_node(CUstream_st& stream, int type) {
  CUgraphNode const node = add_node(stream.capture->graph, type, stream.tail);
  stream.tail = {node};
  return node;
}

namespace {

constexpr unsigned long long auto_free_on_launch = 1;

CUgraph find_graph(CUgraph graph) { return process().graphs.count(graph) != 0 ? graph : nullptr; }

// Children of child nodes are graphs as well, owned by their node.
bool owns(CUgraph graph, CUgraphNode node) {
  return std::any_of(graph->nodes.begin(), graph->nodes.end(),
                     [&](const auto& owned) { return owned.get() == node; });
}
CUgraphNode find_node(CUgraphNode node) {
  if (node == nullptr) return nullptr;
  for (const auto& [handle, graph] : process().graphs) {
    if (owns(handle, node)) return node;
  }
  for (const auto& [handle, graph] : process().graphs) {
    for (const auto& outer : graph->nodes) {
      if (outer->child != nullptr && owns(outer->child.get(), node)) return node;
    }
  }
  return nullptr;
}

// In an order in which every node comes after what it depends on; false: there is none.
bool order(const CUgraph_st& graph, std::vector<CUgraphNode>& out) {
  std::set<CUgraphNode> placed;
  while (out.size() < graph.nodes.size()) {
    const std::size_t before = out.size();
    for (const auto& node : graph.nodes) {
      if (placed.count(node.get()) != 0) continue;
      if (!std::all_of(node->after.begin(), node->after.end(),
                       [&](CUgraphNode other) { return placed.count(other) != 0; }))
        continue;
      placed.insert(node.get());
      out.push_back(node.get());
    }
    if (out.size() == before) return false;
  }
  return true;
}

std::shared_ptr<CUgraph_st> clone(const CUgraph_st& graph, std::map<CUgraphNode, CUgraphNode>& copies) {
  auto made = std::make_shared<CUgraph_st>();
  for (const auto& node : graph.nodes) {
    auto copy = std::make_unique<CUgraphNode_st>(*node);
    copy->graph = made.get();
    if (node->child != nullptr) copy->child = clone(*node->child, copies);
    copies[node.get()] = copy.get();
    made->nodes.push_back(std::move(copy));
  }
  for (const auto& node : made->nodes) {
    for (CUgraphNode& other : node->after) other = copies.at(other);
  }
  return made;
}

bool has_memory(const CUgraph_st& graph) {
  return std::any_of(graph.nodes.begin(), graph.nodes.end(), [](const auto& node) {
    return node->type == CU_GRAPH_NODE_TYPE_MEM_ALLOC || (node->child != nullptr && has_memory(*node->child));
  });
}

// Memory first, so that a launch that does not fit does nothing.
CUresult attach_all(const CUgraph_st& graph, unsigned long long flags, CUcontext context,
                    std::vector<GraphMemory*>& attached) {
  for (const auto& node : graph.nodes) {
    if (node->child != nullptr) {
      if (const auto failed = attach_all(*node->child, flags, context, attached); failed != CUDA_SUCCESS)
        return failed;
    }
    if (node->type != CU_GRAPH_NODE_TYPE_MEM_ALLOC || !node->enabled) continue;
    GraphMemory& memory = *node->memory;
    if (!memory.chunks.empty()) {
      if ((flags & auto_free_on_launch) == 0)
        return CUDA_ERROR_INVALID_VALUE;  // the last launch's is not freed
      graph_detach(memory, nullptr, {});
    }
    if (const auto failed = graph_attach(memory); failed != CUDA_SUCCESS) return failed;
    attached.push_back(&memory);
    Allocation made;
    made.kind = Kind::graph;
    made.bytes = memory.bytes;
    made.mapped_bytes = memory.mapped_bytes;
    made.context = context;
    made.id = process().next_id++;
    process().allocations[memory.base] = made;
  }
  return CUDA_SUCCESS;
}

struct Run {
  Lock& lock;
  std::shared_ptr<CUstream_st> stream;
  std::uint64_t ns = 0;  // of kernels since the last thing that is not one

  CUresult flush() {
    const std::uint64_t all = ns;
    ns = 0;
    return all == 0 ? CUDA_SUCCESS : submit(lock, stream, all);
  }

  CUresult node(const CUgraphNode_st& of) {
    switch (of.type) {
      case CU_GRAPH_NODE_TYPE_KERNEL:
        ns += std::max<std::uint64_t>(of.ns, 1);
        if (!of.kernel.func->faults) return CUDA_SUCCESS;
        {
          const std::uint64_t all = ns;
          ns = 0;
          return submit(lock, stream, all, true);
        }
      case CU_GRAPH_NODE_TYPE_MEMCPY:
        return do_in_order(lock, stream, [copy = of.copy](Lock&) { copy_3d(copy); });
      case CU_GRAPH_NODE_TYPE_MEMSET:
        return do_in_order(lock, stream, [set = of.set](Lock&) { set_bytes(set); });
      case CU_GRAPH_NODE_TYPE_HOST:
        if (const auto failed = flush(); failed != CUDA_SUCCESS) return failed;
        return call_host(lock, stream, of.host.fn, of.host.userData);
      case CU_GRAPH_NODE_TYPE_GRAPH:
        return graph(*of.child);
      case CU_GRAPH_NODE_TYPE_EVENT_RECORD:
      case CU_GRAPH_NODE_TYPE_WAIT_EVENT: {
        if (const auto failed = flush(); failed != CUDA_SUCCESS) return failed;
        const auto event = process().events.find(of.event);
        if (event == process().events.end()) return CUDA_ERROR_INVALID_HANDLE;
        return of.type == CU_GRAPH_NODE_TYPE_EVENT_RECORD ? record(lock, *event->second, stream)
                                                          : wait_for_event(lock, *event->second, stream);
      }
      case CU_GRAPH_NODE_TYPE_MEM_FREE: {
        if (const auto failed = flush(); failed != CUDA_SUCCESS) return failed;
        const auto memory = process().graph_memory.find(of.pointer);
        if (memory != process().graph_memory.end()) {
          graph_detach(*memory->second, stream->context, stream->last);
        } else if (const auto found = process().allocations.find(of.pointer);
                   found != process().allocations.end() && found->second.kind == Kind::async) {
          pool_free(*found->second.pool, of.pointer, *stream);
        }
        return CUDA_SUCCESS;
      }
      default:
        return CUDA_SUCCESS;
    }
  }

  CUresult graph(const CUgraph_st& of) {
    std::vector<CUgraphNode> nodes;
    static_cast<void>(order(of, nodes));
    for (CUgraphNode each : nodes) {
      if (!each->enabled) continue;
      if (const auto failed = node(*each); failed != CUDA_SUCCESS) return failed;
    }
    return CUDA_SUCCESS;
  }
};

void forget_memory(const CUgraph_st& graph) {
  for (const auto& node : graph.nodes) {
    if (node->child != nullptr) forget_memory(*node->child);
    if (node->memory == nullptr) continue;
    const auto known = process().graph_memory.find(node->memory->base);
    // The table's, this node's: nobody else can launch it any more. What is still allocated stays until it is
    // freed.
    if (known != process().graph_memory.end() && known->second.use_count() <= 2 &&
        node->memory->chunks.empty())
      process().graph_memory.erase(known);
  }
}

CUresult capture_graph(CUstream_st& stream, CUgraph graph) {
  std::map<CUgraphNode, CUgraphNode> copies;
  CUgraphNode const node = capture_node(stream, CU_GRAPH_NODE_TYPE_GRAPH);
  node->child = clone(*graph, copies);
  return CUDA_SUCCESS;
}

bool good(const CUgraphNode* after, std::size_t count, std::vector<CUgraphNode>& out) {
  if (count != 0 && after == nullptr) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (after[i] == nullptr) return false;
    out.push_back(after[i]);
  }
  return true;
}

}  // namespace
}  // namespace bulkhead::twin::cuda

using namespace bulkhead::twin::cuda;

EXPORT CUresult cuGraphCreate(CUgraph* out, unsigned flags) {
  ENTER(call, driver);
  if (out == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  auto graph = std::make_shared<CUgraph_st>();
  *out = graph.get();
  process().graphs.emplace(graph.get(), std::move(graph));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphDestroy(CUgraph handle) {
  ENTER(call, driver);
  const auto found = process().graphs.find(handle);
  if (found == process().graphs.end()) return CUDA_ERROR_INVALID_VALUE;
  const auto graph = found->second;
  process().graphs.erase(found);
  forget_memory(*graph);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphClone(CUgraph* out, CUgraph original) {
  ENTER(call, driver);
  if (out == nullptr || find_graph(original) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (has_memory(*original)) return CUDA_ERROR_NOT_SUPPORTED;
  std::map<CUgraphNode, CUgraphNode> copies;
  auto graph = clone(*original, copies);
  *out = graph.get();
  process().graphs.emplace(graph.get(), std::move(graph));
  return CUDA_SUCCESS;
}

#define NEW_NODE(call, out, graph, after, count, params)                                                  \
  ENTER(call, driver);                                                                                    \
  std::vector<CUgraphNode> behind_these;                                                                  \
  if ((out) == nullptr || find_graph(graph) == nullptr || !(params) || !good(after, count, behind_these)) \
  return CUDA_ERROR_INVALID_VALUE

EXPORT CUresult cuGraphAddEmptyNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after, size_t count) {
  NEW_NODE(call, out, graph, after, count, true);
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_EMPTY, std::move(behind_these));
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddKernelNode_v2(CUgraphNode* out, CUgraph graph, const CUgraphNode* after,
                                        size_t count, const CUDA_KERNEL_NODE_PARAMS* params) {
  NEW_NODE(call, out, graph, after, count, params != nullptr);
  CUfunction const function =
      params->func != nullptr ? params->func : reinterpret_cast<CUfunction>(params->kern);
  if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  CUgraphNode const node = add_node(graph, CU_GRAPH_NODE_TYPE_KERNEL, std::move(behind_these));
  node->kernel = *params;
  node->kernel.func = function;
  node->ns = duration(*function, params->kernelParams, params->extra);
  *out = node;
  return CUDA_SUCCESS;
}
namespace {
CUDA_KERNEL_NODE_PARAMS widened(const void* first_form) {
  CUDA_KERNEL_NODE_PARAMS params{};
  std::memcpy(&params, first_form, offsetof(CUDA_KERNEL_NODE_PARAMS, kern));
  return params;
}
CUresult set_kernel(CUgraphNode_st& node, const CUDA_KERNEL_NODE_PARAMS& params) {
  CUfunction const function =
      params.func != nullptr ? params.func : reinterpret_cast<CUfunction>(params.kern);
  if (node.type != CU_GRAPH_NODE_TYPE_KERNEL || function == nullptr) return CUDA_ERROR_INVALID_VALUE;
  node.kernel = params;
  node.kernel.func = function;
  node.ns = duration(*function, params.kernelParams, params.extra);
  return CUDA_SUCCESS;
}
// The instance's copy of a node.
CUgraphNode in_exec(CUgraphExec exec, CUgraphNode node) {
  const auto found = process().execs.find(exec);
  if (found == process().execs.end()) return nullptr;
  const auto copy = found->second->copies.find(node);
  return copy != found->second->copies.end() ? copy->second : nullptr;
}
}  // namespace
EXPORT CUresult cuGraphAddKernelNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after, size_t count,
                                     const void* params) {
  if (params == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto wide = widened(params);
  return cuGraphAddKernelNode_v2(out, graph, after, count, &wide);
}
EXPORT CUresult cuGraphKernelNodeGetParams_v2(CUgraphNode node, CUDA_KERNEL_NODE_PARAMS* params) {
  ENTER(call, driver);
  if (params == nullptr || find_node(node) == nullptr || node->type != CU_GRAPH_NODE_TYPE_KERNEL)
    return CUDA_ERROR_INVALID_VALUE;
  *params = node->kernel;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphKernelNodeGetParams(CUgraphNode node, void* params) {
  CUDA_KERNEL_NODE_PARAMS wide{};
  const auto result =
      params == nullptr ? CUDA_ERROR_INVALID_VALUE : cuGraphKernelNodeGetParams_v2(node, &wide);
  if (result == CUDA_SUCCESS) std::memcpy(params, &wide, offsetof(CUDA_KERNEL_NODE_PARAMS, kern));
  return result;
}
EXPORT CUresult cuGraphKernelNodeSetParams_v2(CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS* params) {
  ENTER(call, driver);
  return params == nullptr || find_node(node) == nullptr ? CUDA_ERROR_INVALID_VALUE
                                                         : set_kernel(*node, *params);
}
EXPORT CUresult cuGraphKernelNodeSetParams(CUgraphNode node, const void* params) {
  if (params == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto wide = widened(params);
  return cuGraphKernelNodeSetParams_v2(node, &wide);
}
EXPORT CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec exec, CUgraphNode node,
                                                  const CUDA_KERNEL_NODE_PARAMS* params) {
  ENTER(call, driver);
  CUgraphNode const copy = in_exec(exec, node);
  return params == nullptr || copy == nullptr ? CUDA_ERROR_INVALID_VALUE : set_kernel(*copy, *params);
}
EXPORT CUresult cuGraphExecKernelNodeSetParams(CUgraphExec exec, CUgraphNode node, const void* params) {
  if (params == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto wide = widened(params);
  return cuGraphExecKernelNodeSetParams_v2(exec, node, &wide);
}
EXPORT CUresult cuGraphAddMemcpyNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after, size_t count,
                                     const CUDA_MEMCPY3D* params, CUcontext) {
  NEW_NODE(call, out, graph, after, count, params != nullptr);
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_MEMCPY, std::move(behind_these));
  (*out)->copy = *params;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddMemsetNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after, size_t count,
                                     const CUDA_MEMSET_NODE_PARAMS* params, CUcontext) {
  NEW_NODE(call, out, graph, after, count, params != nullptr);
  if (params->elementSize != 1 && params->elementSize != 2 && params->elementSize != 4)
    return CUDA_ERROR_INVALID_VALUE;
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_MEMSET, std::move(behind_these));
  (*out)->set = *params;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddHostNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after, size_t count,
                                   const CUDA_HOST_NODE_PARAMS* params) {
  NEW_NODE(call, out, graph, after, count, params != nullptr && params->fn != nullptr);
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_HOST, std::move(behind_these));
  (*out)->host = *params;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddChildGraphNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after,
                                         size_t count, CUgraph child) {
  NEW_NODE(call, out, graph, after, count, find_graph(child) != nullptr && child != graph);
  if (has_memory(*child)) return CUDA_ERROR_NOT_SUPPORTED;
  std::map<CUgraphNode, CUgraphNode> copies;
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_GRAPH, std::move(behind_these));
  (*out)->child = clone(*child, copies);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphChildGraphNodeGetGraph(CUgraphNode node, CUgraph* graph) {
  ENTER(call, driver);
  if (graph == nullptr || find_node(node) == nullptr || node->child == nullptr)
    return CUDA_ERROR_INVALID_VALUE;
  *graph = node->child.get();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddEventRecordNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after,
                                          size_t count, CUevent event) {
  NEW_NODE(call, out, graph, after, count, process().events.count(event) != 0);
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_EVENT_RECORD, std::move(behind_these));
  (*out)->event = event;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddEventWaitNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after,
                                        size_t count, CUevent event) {
  NEW_NODE(call, out, graph, after, count, process().events.count(event) != 0);
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_WAIT_EVENT, std::move(behind_these));
  (*out)->event = event;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddMemAllocNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after,
                                       size_t count, CUDA_MEM_ALLOC_NODE_PARAMS* params) {
  NEW_NODE(call, out, graph, after, count, params != nullptr && params->bytesize != 0);
  if (params->poolProps.location.type != 1) return CUDA_ERROR_NOT_SUPPORTED;
  Device* const device = device_of(params->poolProps.location.id);
  if (device == nullptr) return CUDA_ERROR_INVALID_DEVICE;
  if (params->bytesize > (1UL << 47)) return CUDA_ERROR_OUT_OF_MEMORY;
  auto memory = std::make_shared<GraphMemory>();
  memory->device = device;
  memory->bytes = params->bytesize;
  memory->mapped_bytes = round_up(params->bytesize, pool_granule);
  memory->base = reserve_addresses(memory->mapped_bytes);
  if (memory->base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  params->dptr = memory->base;
  CUgraphNode const node = add_node(graph, CU_GRAPH_NODE_TYPE_MEM_ALLOC, std::move(behind_these));
  node->alloc = *params;
  node->memory = memory;
  process().graph_memory[memory->base] = std::move(memory);
  *out = node;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphMemAllocNodeGetParams(CUgraphNode node, CUDA_MEM_ALLOC_NODE_PARAMS* params) {
  ENTER(call, driver);
  if (params == nullptr || find_node(node) == nullptr || node->type != CU_GRAPH_NODE_TYPE_MEM_ALLOC)
    return CUDA_ERROR_INVALID_VALUE;
  *params = node->alloc;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddMemFreeNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after, size_t count,
                                      CUdeviceptr pointer) {
  NEW_NODE(call, out, graph, after, count, pointer != 0);
  if (process().graph_memory.count(pointer) == 0) return CUDA_ERROR_INVALID_VALUE;
  *out = add_node(graph, CU_GRAPH_NODE_TYPE_MEM_FREE, std::move(behind_these));
  (*out)->pointer = pointer;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphMemFreeNodeGetParams(CUgraphNode node, CUdeviceptr* pointer) {
  ENTER(call, driver);
  if (pointer == nullptr || find_node(node) == nullptr || node->type != CU_GRAPH_NODE_TYPE_MEM_FREE)
    return CUDA_ERROR_INVALID_VALUE;
  *pointer = node->pointer;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddNode_v2(CUgraphNode* out, CUgraph graph, const CUgraphNode* after,
                                  const CUgraphEdgeData*, size_t count, CUgraphNodeParams* params) {
  if (params == nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto& of = params->of;
  switch (params->type) {
    case CU_GRAPH_NODE_TYPE_KERNEL:
      return cuGraphAddKernelNode_v2(out, graph, after, count, &of.kernel);
    case CU_GRAPH_NODE_TYPE_MEMCPY:
      return cuGraphAddMemcpyNode(out, graph, after, count, &of.memcpy.copyParams, nullptr);
    case CU_GRAPH_NODE_TYPE_MEMSET: {
      const CUDA_MEMSET_NODE_PARAMS set{of.memset.dst,         of.memset.pitch, of.memset.value,
                                        of.memset.elementSize, of.memset.width, of.memset.height};
      return cuGraphAddMemsetNode(out, graph, after, count, &set, nullptr);
    }
    case CU_GRAPH_NODE_TYPE_HOST:
      return cuGraphAddHostNode(out, graph, after, count, &of.host);
    case CU_GRAPH_NODE_TYPE_GRAPH:
      return cuGraphAddChildGraphNode(out, graph, after, count, of.graph.graph);
    case CU_GRAPH_NODE_TYPE_EMPTY:
      return cuGraphAddEmptyNode(out, graph, after, count);
    case CU_GRAPH_NODE_TYPE_EVENT_RECORD:
      return cuGraphAddEventRecordNode(out, graph, after, count, of.event.event);
    case CU_GRAPH_NODE_TYPE_WAIT_EVENT:
      return cuGraphAddEventWaitNode(out, graph, after, count, of.event.event);
    case CU_GRAPH_NODE_TYPE_MEM_ALLOC:
      return cuGraphAddMemAllocNode(out, graph, after, count, &of.alloc);
    case CU_GRAPH_NODE_TYPE_MEM_FREE:
      return cuGraphAddMemFreeNode(out, graph, after, count, of.free.dptr);
    default:
      return CUDA_ERROR_NOT_SUPPORTED;
  }
}
EXPORT CUresult cuGraphAddNode(CUgraphNode* out, CUgraph graph, const CUgraphNode* after, size_t count,
                               CUgraphNodeParams* params) {
  return cuGraphAddNode_v2(out, graph, after, nullptr, count, params);
}
EXPORT CUresult cuGraphDestroyNode(CUgraphNode node) {
  ENTER(call, driver);
  if (find_node(node) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (node->memory != nullptr || node->type == CU_GRAPH_NODE_TYPE_MEM_FREE) return CUDA_ERROR_NOT_SUPPORTED;
  CUgraph const graph = node->graph;
  for (const auto& other : graph->nodes) std::erase(other->after, node);
  std::erase_if(graph->nodes, [&](const auto& owned) { return owned.get() == node; });
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphNodeGetType(CUgraphNode node, int* type) {
  ENTER(call, driver);
  if (type == nullptr || find_node(node) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *type = node->type;
  return CUDA_SUCCESS;
}
namespace {
// Fills up to *count; null asks how many there are.
CUresult give_nodes(const std::vector<CUgraphNode>& nodes, CUgraphNode* out, size_t* count) {
  if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (out != nullptr) {
    for (size_t i = 0; i < *count; ++i) out[i] = i < nodes.size() ? nodes[i] : nullptr;
    *count = std::min(*count, nodes.size());
  } else {
    *count = nodes.size();
  }
  return CUDA_SUCCESS;
}
CUgraph any_graph(CUgraph graph) {
  if (find_graph(graph) != nullptr) return graph;
  for (const auto& [handle, outer] : process().graphs) {
    for (const auto& node : outer->nodes) {
      if (node->child.get() == graph) return graph;
    }
  }
  return nullptr;
}
}  // namespace
EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* out, size_t* count) {
  ENTER(call, driver);
  if (any_graph(graph) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::vector<CUgraphNode> nodes;
  for (const auto& node : graph->nodes) nodes.push_back(node.get());
  return give_nodes(nodes, out, count);
}
EXPORT CUresult cuGraphGetRootNodes(CUgraph graph, CUgraphNode* out, size_t* count) {
  ENTER(call, driver);
  if (any_graph(graph) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::vector<CUgraphNode> nodes;
  for (const auto& node : graph->nodes) {
    if (node->after.empty()) nodes.push_back(node.get());
  }
  return give_nodes(nodes, out, count);
}
EXPORT CUresult cuGraphNodeGetDependencies(CUgraphNode node, CUgraphNode* out, size_t* count) {
  ENTER(call, driver);
  return find_node(node) == nullptr ? CUDA_ERROR_INVALID_VALUE : give_nodes(node->after, out, count);
}
EXPORT CUresult cuGraphNodeGetDependencies_v2(CUgraphNode node, CUgraphNode* out, CUgraphEdgeData* edges,
                                              size_t* count) {
  const auto result = cuGraphNodeGetDependencies(node, out, count);
  if (result == CUDA_SUCCESS && edges != nullptr) std::memset(edges, 0, *count * sizeof *edges);
  return result;
}
EXPORT CUresult cuGraphNodeGetDependentNodes(CUgraphNode node, CUgraphNode* out, size_t* count) {
  ENTER(call, driver);
  if (find_node(node) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::vector<CUgraphNode> nodes;
  for (const auto& other : node->graph->nodes) {
    if (std::find(other->after.begin(), other->after.end(), node) != other->after.end())
      nodes.push_back(other.get());
  }
  return give_nodes(nodes, out, count);
}
EXPORT CUresult cuGraphNodeGetDependentNodes_v2(CUgraphNode node, CUgraphNode* out, CUgraphEdgeData* edges,
                                                size_t* count) {
  const auto result = cuGraphNodeGetDependentNodes(node, out, count);
  if (result == CUDA_SUCCESS && edges != nullptr) std::memset(edges, 0, *count * sizeof *edges);
  return result;
}
EXPORT CUresult cuGraphGetEdges(CUgraph graph, CUgraphNode* from, CUgraphNode* to, size_t* count) {
  ENTER(call, driver);
  if (any_graph(graph) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::vector<CUgraphNode> begins, ends;
  for (const auto& node : graph->nodes) {
    for (CUgraphNode before : node->after) {
      begins.push_back(before);
      ends.push_back(node.get());
    }
  }
  size_t same = count != nullptr ? *count : 0;
  const auto result = give_nodes(begins, from, count);
  return result == CUDA_SUCCESS && to != nullptr ? give_nodes(ends, to, &same) : result;
}
EXPORT CUresult cuGraphGetEdges_v2(CUgraph graph, CUgraphNode* from, CUgraphNode* to, CUgraphEdgeData* edges,
                                   size_t* count) {
  const auto result = cuGraphGetEdges(graph, from, to, count);
  if (result == CUDA_SUCCESS && edges != nullptr) std::memset(edges, 0, *count * sizeof *edges);
  return result;
}
EXPORT CUresult cuGraphAddDependencies(CUgraph graph, const CUgraphNode* from, const CUgraphNode* to,
                                       size_t count) {
  ENTER(call, driver);
  if (any_graph(graph) == nullptr || (count != 0 && (from == nullptr || to == nullptr)))
    return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < count; ++i) {
    if (!owns(graph, from[i]) || !owns(graph, to[i]) || from[i] == to[i]) return CUDA_ERROR_INVALID_VALUE;
    to[i]->after.push_back(from[i]);
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddDependencies_v2(CUgraph graph, const CUgraphNode* from, const CUgraphNode* to,
                                          const CUgraphEdgeData*, size_t count) {
  return cuGraphAddDependencies(graph, from, to, count);
}
EXPORT CUresult cuGraphRemoveDependencies(CUgraph graph, const CUgraphNode* from, const CUgraphNode* to,
                                          size_t count) {
  ENTER(call, driver);
  if (any_graph(graph) == nullptr || (count != 0 && (from == nullptr || to == nullptr)))
    return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < count; ++i) {
    if (!owns(graph, to[i]) || std::erase(to[i]->after, from[i]) == 0) return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphRemoveDependencies_v2(CUgraph graph, const CUgraphNode* from, const CUgraphNode* to,
                                             const CUgraphEdgeData*, size_t count) {
  return cuGraphRemoveDependencies(graph, from, to, count);
}

// ---- instances
namespace {
CUresult instantiate(CUgraphExec* out, CUgraph graph, unsigned long long flags) {
  ENTER(call, context);
  if (out == nullptr || find_graph(graph) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::vector<CUgraphNode> nodes;
  if (!order(*graph, nodes)) return CUDA_ERROR_INVALID_VALUE;
  if (has_memory(*graph)) {
    // Memory nodes have one address each: one instance at a time.
    for (const auto& [handle, exec] : process().execs) {
      for (const auto& node : graph->nodes) {
        if (exec->copies.count(node.get()) != 0) return CUDA_ERROR_NOT_SUPPORTED;
      }
    }
  }
  auto exec = std::make_unique<CUgraphExec_st>();
  exec->graph = clone(*graph, exec->copies);
  exec->flags = flags;
  exec->context = call.context();
  *out = exec.get();
  process().execs.emplace(exec.get(), std::move(exec));
  return CUDA_SUCCESS;
}
}  // namespace
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long flags) {
  return instantiate(exec, graph, flags);
}
EXPORT CUresult cuGraphInstantiate(CUgraphExec* exec, CUgraph graph, CUgraphNode* error, char* log,
                                   size_t room) {
  if (error != nullptr) *error = nullptr;
  if (log != nullptr && room != 0) *log = '\0';
  return instantiate(exec, graph, 0);
}
EXPORT CUresult cuGraphInstantiate_v2(CUgraphExec* exec, CUgraph graph, CUgraphNode* error, char* log,
                                      size_t room) {
  return cuGraphInstantiate(exec, graph, error, log, room);
}
EXPORT CUresult cuGraphInstantiateWithParams(CUgraphExec* exec, CUgraph graph,
                                             CUDA_GRAPH_INSTANTIATE_PARAMS* params) {
  if (params == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto result = instantiate(exec, graph, params->flags);
  params->hErrNode_out = nullptr;
  params->result_out = result == CUDA_SUCCESS ? 0 : 1;
  return result;
}
EXPORT CUresult cuGraphExecGetFlags(CUgraphExec exec, uint64_t* flags) {
  ENTER(call, driver);
  if (flags == nullptr || process().execs.count(exec) == 0) return CUDA_ERROR_INVALID_VALUE;
  *flags = exec->flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphUpload(CUgraphExec exec, CUstream) {
  ENTER(call, context);
  return process().execs.count(exec) != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuGraphLaunch(CUgraphExec handle, CUstream stream_handle) {
  ENTER(call, context);
  const auto found = process().execs.find(handle);
  if (found == process().execs.end()) return CUDA_ERROR_INVALID_VALUE;
  const auto stream = find_stream(call.context(), stream_handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const auto graph = found->second->graph;
  if (stream->capture != nullptr) return capture_graph(*stream, graph.get());
  if (const auto failed = fit_stack(stream->context); failed != CUDA_SUCCESS) return failed;
  std::vector<GraphMemory*> attached;
  if (const auto failed = attach_all(*graph, found->second->flags, stream->context, attached);
      failed != CUDA_SUCCESS) {
    for (GraphMemory* memory : attached) graph_detach(*memory, nullptr, {});
    return failed;
  }
  Run run{call.lock(), stream};
  if (const auto failed = run.graph(*graph); failed != CUDA_SUCCESS) return failed;
  return run.flush();
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec handle) {
  ENTER(call, driver);
  const auto found = process().execs.find(handle);
  if (found == process().execs.end()) return CUDA_ERROR_INVALID_VALUE;
  const auto graph = found->second->graph;
  process().execs.erase(found);
  forget_memory(*graph);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphExecUpdate_v2(CUgraphExec handle, CUgraph graph, CUgraphExecUpdateResultInfo* info) {
  ENTER(call, driver);
  const auto found = process().execs.find(handle);
  if (found == process().execs.end() || find_graph(graph) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  CUgraphExec_st& exec = *found->second;
  bool same = exec.graph->nodes.size() == graph->nodes.size();
  for (std::size_t i = 0; same && i < graph->nodes.size(); ++i)
    same = exec.graph->nodes[i]->type == graph->nodes[i]->type && graph->nodes[i]->memory == nullptr;
  if (info != nullptr) *info = {same ? 0 : 2, nullptr, nullptr};  // 2: the topology has changed
  if (!same) return CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE;
  exec.copies.clear();
  exec.graph = clone(*graph, exec.copies);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphExecUpdate(CUgraphExec exec, CUgraph graph, CUgraphNode* error, int* result) {
  CUgraphExecUpdateResultInfo info{};
  const auto answer = cuGraphExecUpdate_v2(exec, graph, &info);
  if (error != nullptr) *error = nullptr;
  if (result != nullptr) *result = info.result;
  return answer;
}
EXPORT CUresult cuGraphNodeSetEnabled(CUgraphExec exec, CUgraphNode node, unsigned enabled) {
  ENTER(call, driver);
  CUgraphNode const copy = in_exec(exec, node);
  if (copy == nullptr || copy->type > CU_GRAPH_NODE_TYPE_MEMSET) return CUDA_ERROR_INVALID_VALUE;
  copy->enabled = enabled != 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphNodeGetEnabled(CUgraphExec exec, CUgraphNode node, unsigned* enabled) {
  ENTER(call, driver);
  CUgraphNode const copy = in_exec(exec, node);
  if (copy == nullptr || enabled == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *enabled = copy->enabled ? 1 : 0;
  return CUDA_SUCCESS;
}

// ---- capture
namespace {
CUresult begin(CUstream handle, int mode, CUgraph into, const CUgraphNode* after, size_t count) {
  ENTER(call, context);
  if (handle == nullptr || handle == CU_STREAM_LEGACY) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture != nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  auto capture = std::make_shared<Capture>();
  if (into == nullptr) {
    auto graph = std::make_shared<CUgraph_st>();
    into = graph.get();
    process().graphs.emplace(into, std::move(graph));
  }
  capture->graph = into;
  capture->origin = stream.get();
  capture->mode = mode;
  capture->id = process().next_id++;
  capture->streams.insert(stream.get());
  stream->capture = capture;
  stream->tail.clear();
  return good(after, count, stream->tail) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
}  // namespace
EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
  return begin(stream, mode, nullptr, nullptr, 0);
}
EXPORT CUresult cuStreamBeginCapture(CUstream stream) { return begin(stream, 0, nullptr, nullptr, 0); }
EXPORT CUresult cuStreamBeginCaptureToGraph(CUstream stream, CUgraph graph, const CUgraphNode* after,
                                            const CUgraphEdgeData*, size_t count, int mode) {
  return graph == nullptr ? CUDA_ERROR_INVALID_VALUE : begin(stream, mode, graph, after, count);
}
EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* out) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const auto capture = stream->capture;
  if (capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (capture->origin != stream.get()) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  // What other streams did must have come back to this one.
  std::set<CUgraphNode> joined(stream->tail.begin(), stream->tail.end());
  std::vector<CUgraphNode> open(stream->tail);
  while (!open.empty()) {
    CUgraphNode const node = open.back();
    open.pop_back();
    for (CUgraphNode before : node->after) {
      if (joined.insert(before).second) open.push_back(before);
    }
  }
  bool unjoined = false;
  const auto end = [&](CUstream_st& other) {
    if (other.capture != capture) return;
    for (CUgraphNode node : other.tail) unjoined |= joined.count(node) == 0;
    other.capture = nullptr;
    other.tail.clear();
  };
  for (CUcontext context : process().contexts) {
    for (const auto& [name, other] : context->streams) end(*other);
    for (const auto& [thread, other] : context->of_threads) end(*other);
  }
  if (capture->invalid || unjoined) {
    process().graphs.erase(capture->graph);
    if (out != nullptr) *out = nullptr;
    return capture->invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  }
  if (out != nullptr) *out = capture->graph;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamIsCapturing(CUstream handle, int* status) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (status == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *status = stream->capture == nullptr ? 0 : stream->capture->invalid ? 2 : 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCaptureInfo_v3(CUstream handle, int* status, uint64_t* id, CUgraph* graph,
                                          const CUgraphNode** after, const CUgraphEdgeData** edges,
                                          size_t* count) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (status == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *status = stream->capture == nullptr ? 0 : stream->capture->invalid ? 2 : 1;
  if (*status != 1) return CUDA_SUCCESS;
  if (id != nullptr) *id = stream->capture->id;
  if (graph != nullptr) *graph = stream->capture->graph;
  if (after != nullptr) *after = stream->tail.data();
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = stream->tail.size();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetCaptureInfo_v2(CUstream stream, int* status, uint64_t* id, CUgraph* graph,
                                          const CUgraphNode** after, size_t* count) {
  return cuStreamGetCaptureInfo_v3(stream, status, id, graph, after, nullptr, count);
}
EXPORT CUresult cuStreamGetCaptureInfo(CUstream stream, int* status, uint64_t* id) {
  return cuStreamGetCaptureInfo_v3(stream, status, id, nullptr, nullptr, nullptr, nullptr);
}
EXPORT CUresult cuStreamUpdateCaptureDependencies(CUstream handle, CUgraphNode* after, size_t count,
                                                  unsigned flags) {
  ENTER(call, context);
  const auto stream = find_stream(call.context(), handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (flags == 1) stream->tail.clear();  // set, not add
  return good(after, count, stream->tail) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuStreamUpdateCaptureDependencies_v2(CUstream stream, CUgraphNode* after,
                                                     const CUgraphEdgeData*, size_t count, unsigned flags) {
  return cuStreamUpdateCaptureDependencies(stream, after, count, flags);
}
EXPORT CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  static thread_local int of_thread = 0;
  if (mode == nullptr || *mode < 0 || *mode > 2) return CUDA_ERROR_INVALID_VALUE;
  std::swap(*mode, of_thread);
  return CUDA_SUCCESS;
}
