#include <string>
#include <string_view>

#include <gtest/gtest.h>

#include "engine/diagnose/diagnose.hpp"

namespace bulkhead::diagnose {
namespace {

std::string cleaned(std::string_view text) {
  std::uint64_t removed = 0;
  return without_secrets(text, removed);
}

TEST(BundleSecrets, AValueIsTakenOutInEveryFormThatLogsHave) {
  constexpr std::string_view secret = "Zq7Kx81mPv02";
  for (const std::string_view line :
       {"HF_TOKEN=Zq7Kx81mPv02", "password: Zq7Kx81mPv02", R"("api_key": "Zq7Kx81mPv02")",
        R"({"log":"{\"api_key\": \"Zq7Kx81mPv02\"}"})", "client_secret='two Zq7Kx81mPv02 words'",
        R"(password="it's Zq7Kx81mPv02")", "Authorization: Bearer Zq7Kx81mPv02",
        R"("Authorization": "Basic Zq7Kx81mPv02")"})
    EXPECT_EQ(cleaned(line).find(secret), std::string::npos) << cleaned(line);
}

// Found by bundle_fuzz: the header's value ran over the next name and stopped at the quote behind it.
TEST(BundleSecrets, OneSecretDoesNotUncoverTheNext) {
  EXPECT_EQ(cleaned("Authorization: Bearer abc client_secret='Zq7Kx81mPv02'\nafter"),
            "Authorization: [removed]\nafter");
  EXPECT_EQ(cleaned("TOKEN= bearer Zq7Kx81mPv02 after"), "TOKEN= [removed] after");
  EXPECT_EQ(cleaned("TOKEN= password: Zq7Kx81mPv02 after"), "TOKEN= [removed] after");
  EXPECT_EQ(cleaned("TOKEN= \"api_key\": \"Zq7Kx81mPv02\" after"), "TOKEN= \"[removed]\" after");
  EXPECT_EQ(cleaned(R"({"token": "a b", "gpu": "3"})"), R"({"token": "[removed]", "gpu": "3"})");
}

TEST(BundleSecrets, WhatIsNoSecretStays) {
  constexpr std::string_view line =
      "NVRM: Xid (PCI:0000:3b:00): 31, pid=7, name=tokenizer, Ch 00000010, MMU Fault; tokens are 7";
  EXPECT_EQ(cleaned(line), line);
}

}  // namespace
}  // namespace bulkhead::diagnose
