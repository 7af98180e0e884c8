#include <gtest/gtest.h>

#include <unistd.h>

#include <string_view>

#include "engine/monitor/monitor.hpp"

int main(int argc, char** argv) {
  // The monitor's child is the program that started it: here, the tests.
  if (argc > 1 && std::string_view(argv[1]) == "monitor")
    ::_exit(bulkhead::monitor::serve(3).ok() ? 0 : 1);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
