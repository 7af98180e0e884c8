// Text that goes into HTML, SVG or XML, between tags and within quoted attributes.
#pragma once

#include <string>
#include <string_view>

namespace bulkhead {

// Control characters, which XML cannot have, become blanks; the rest that means something there is written
// out.
inline std::string markup(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else if (c == '\'')
      out += "&#39;";  // &apos; is none of HTML 4's
    else if (byte < 0x20 || byte == 0x7f)
      out += ' ';
    else
      out += c;
  }
  return out;
}

}  // namespace bulkhead
