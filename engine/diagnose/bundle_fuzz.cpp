// Whatever stands before it, a secret on a line of its own, or behind a space, is not in what leaves; and
// text without one is left as it is the second time.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "engine/diagnose/diagnose.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace bulkhead;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  constexpr std::string_view secret = "Zq7Kx81mPv02LrT5wY";
  std::uint64_t removed = 0;
  const auto plain = diagnose::without_secrets(text, removed);
  if (removed == 0 && plain != text) __builtin_trap();
  if (plain.size() > text.size() + removed * 16) __builtin_trap();
  if (text.find(secret) != std::string_view::npos) return 0;
  for (const std::string_view between : {"\n", " "}) {
    for (const std::string_view form : {"HF_TOKEN=", "password: ", "\"api_key\": \"",
                                        "Authorization: Bearer ", "bearer ", "ghp_", "client_secret='"}) {
      std::string whole(text);
      whole += between;
      whole += form;
      whole += secret;
      whole += "\nafter";
      removed = 0;
      const auto out = diagnose::without_secrets(whole, removed);
      if (removed == 0 || out.find(secret) != std::string::npos) __builtin_trap();
    }
  }
  return 0;
}
