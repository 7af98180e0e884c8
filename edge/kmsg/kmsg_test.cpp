#include "edge/kmsg/kmsg.hpp"

#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

namespace bulkhead::kmsg {
namespace {

TEST(Kmsg, SaysWhatWasOverwritten) {
  const auto path = std::filesystem::temp_directory_path() / ("kmsg-" + std::to_string(::getpid()));
  std::ofstream(path) << "6,10,1,-;a\n SUBSYSTEM=pci\n6,11,2,-;b\n6,20,3,-;c\n6,21,4,-;half";
  auto reader = Reader::open(path, true);
  ASSERT_TRUE(reader.ok());
  const auto batch = reader->read();
  ASSERT_TRUE(batch.ok());
  EXPECT_EQ(batch->text, "6,10,1,-;a\n6,11,2,-;b\n6,20,3,-;c\n");
  EXPECT_EQ(batch->lost, 8U);
  std::ofstream(path, std::ios::app) << " line\n";
  EXPECT_EQ(reader->read()->text, "6,21,4,-;half line\n");
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace bulkhead::kmsg
