// The bill of a period as one self-contained page: no script, no outside reference, prints on paper.
#pragma once

#include <string>
#include <vector>

#include "core/bill/bill.hpp"

namespace bulkhead::cli {

std::string usage_page(const bill::Statement& statement);
// "Energy may be off by ..." and what was not read, one sentence each; for the page and the terminal.
std::vector<std::string> usage_notes(const bill::Statement& statement);

}  // namespace bulkhead::cli
