#include "base/json.hpp"

#include <gtest/gtest.h>

#include <fmt/format.h>

namespace bulkhead {
namespace {

TEST(Json, IsReadAsItIsWrittenWithItsKeysInOrder) {
  const std::string_view text =
      R"({"b":[1,-2,2.5,true,null,"\u00e9"],"a":{"z":{},"y":[]},"c":18446744073709551615})";
  const auto read = parse_json(text);
  ASSERT_TRUE(read.ok()) << read.error().message();
  EXPECT_EQ(*read, Json::parse(text));
  EXPECT_EQ(read->dump(),
            "{\"b\":[1,-2,2.5,true,null,\"é\"],\"a\":{\"z\":{},\"y\":[]},\"c\":18446744073709551615}");
  for (const char* plain : {"1", "\"x\"", "null", " [ ] "}) EXPECT_TRUE(parse_json(plain).ok()) << plain;
}

TEST(Json, SaysWhereItIsNone) {
  for (const char* bad : {"", "{", "{\"a\":1,}", "[1 2]", "nul", "1e999", "\"\xff\"", "{} x", "01", "'a'",
                          "\xef\xbb\xbf{", "NaN"}) {
    const auto read = parse_json(bad);
    if (std::string_view(bad).starts_with("\xef")) continue;  // a byte order mark is skipped
    ASSERT_FALSE(read.ok()) << bad;
    EXPECT_NE(read.error().message().find("not valid JSON (at byte "), std::string::npos)
        << read.error().message();
  }
}

TEST(Json, DoesNotEndAtANulByte) {
  using namespace std::string_view_literals;
  for (const auto bad : {"{}\0"sv, "\0{}"sv, "{\"a\":1}\0x"sv, "{\"a\0\":1}"sv, "\0"sv})
    EXPECT_FALSE(parse_json(bad).ok()) << bad;
}

TEST(Json, TakesNoKeyTwice) {
  for (const char* bad : {R"({"a":1,"a":2})", R"([{"x":{"k":1,"l":2,"k":3}}])", R"({"a":1,"\u0061":1})"}) {
    const auto read = parse_json(bad);
    ASSERT_FALSE(read.ok()) << bad;
    EXPECT_NE(read.error().message().find("is there twice"), std::string::npos) << read.error().message();
  }
  EXPECT_TRUE(parse_json(R"({"a":{"a":1},"b":[{"a":1},{"a":2}]})").ok());
}

TEST(Json, BoundsItsDepth) {
  const auto nested = [](std::size_t n) { return std::string(n, '[') + std::string(n, ']'); };
  EXPECT_TRUE(parse_json(nested(64)).ok());
  EXPECT_FALSE(parse_json(nested(65)).ok());
  EXPECT_TRUE(parse_json("[{\"a\":[1]}]", 3).ok());
  EXPECT_FALSE(parse_json("[{\"a\":[[1]]}]", 3).ok());
  EXPECT_FALSE(parse_json(std::string(1 << 20, '[')).ok());
  EXPECT_FALSE(parse_json(std::string(1 << 20, '[')).error().message().empty());
}

TEST(Json, ReadsAHundredThousandKeysInOneObject) {
  std::string text = "{";
  for (int i = 0; i < 100'000; ++i) text += fmt::format("{}\"{}\":{}", i == 0 ? "" : ",", i, i);
  text += "}";
  const auto read = parse_json(text);
  ASSERT_TRUE(read.ok()) << read.error().message();
  EXPECT_EQ(read->size(), 100'000U);
}

}  // namespace
}  // namespace bulkhead
