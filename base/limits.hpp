// Every bound over outside data, in one place.
#pragma once

#include <cstddef>

namespace bulkhead::limits {

inline constexpr std::size_t node_file_bytes = 1U << 20U;  // a node file; larger is refused unread
inline constexpr std::size_t proc_file_bytes = 4U << 20U;  // one file of /proc or /sys
inline constexpr std::size_t yaml_depth = 32;              // nesting of a node file
inline constexpr std::size_t gpus = 64;                    // GPUs of a host
inline constexpr std::size_t processes = 65536;            // processes of a host
inline constexpr std::size_t directory_entries = 65536;    // entries of one directory

}  // namespace bulkhead::limits
