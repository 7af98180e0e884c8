#include "edge/archive/archive.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include <fmt/format.h>
#include <zlib.h>

namespace bulkhead::archive {

namespace {

constexpr std::size_t block = 512;

std::string_view field(std::string_view header, std::size_t at, std::size_t size) {
  const auto text = header.substr(at, size);
  return text.substr(0, text.find('\0'));
}

bool octal(std::string_view text, std::uint64_t& out) {
  out = 0;
  bool any = false;
  for (const char c : text) {
    if (c == ' ' || c == '\0') {
      if (any) break;
      continue;
    }
    if (c < '0' || c > '7' || out >> 60U != 0) return false;
    out = out * 8 + static_cast<std::uint64_t>(c - '0');
    any = true;
  }
  return any;
}

}  // namespace

bool is_gzip(std::string_view bytes) { return bytes.starts_with("\x1f\x8b\x08"); }
bool is_tar(std::string_view bytes) { return bytes.size() >= block && bytes.substr(257, 5) == "ustar"; }

Result<std::string> gunzip(std::string_view bytes, std::size_t limit) {
  z_stream stream = {};
  if (inflateInit2(&stream, 15 + 16) != Z_OK) return Error(Errc::no_capacity, "zlib: no memory");
  std::string out;
  std::vector<char> piece(1U << 18U);
  std::size_t given = 0;
  int code = Z_OK;
  while (code == Z_OK) {
    if (stream.avail_in == 0) {
      const auto n = std::min<std::size_t>(bytes.size() - given, 1U << 30U);
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data() + given));
      stream.avail_in = static_cast<uInt>(n);
      given += n;
    }
    stream.next_out = reinterpret_cast<Bytef*>(piece.data());
    stream.avail_out = static_cast<uInt>(piece.size());
    code = inflate(&stream, Z_NO_FLUSH);
    out.append(piece.data(), piece.size() - stream.avail_out);
    if (out.size() > limit) {
      inflateEnd(&stream);
      return Error(Errc::invalid, fmt::format("unpacks to more than {} bytes", limit));
    }
    if (code == Z_STREAM_END && (stream.avail_in > 2 || given < bytes.size())) {
      const auto* next = reinterpret_cast<const char*>(stream.next_in);
      if (stream.avail_in > 2 && is_gzip(std::string_view(next, stream.avail_in)))
        code = inflateReset(&stream);
    }
  }
  inflateEnd(&stream);
  // A report cut short by a full disk still has its beginning.
  if (code != Z_STREAM_END && out.empty())
    return Error(Errc::corrupt, "is no gzip file, or damaged at its beginning");
  return out;
}

Result<std::string> gzip(std::string_view bytes) {
  z_stream stream = {};
  if (deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK)
    return Error(Errc::no_capacity, "zlib: no memory");
  std::string out;
  out.resize(deflateBound(&stream, bytes.size()) + 32);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  const int code = deflate(&stream, Z_FINISH);
  out.erase(std::min<std::size_t>(out.size(), stream.total_out));
  deflateEnd(&stream);
  if (code != Z_STREAM_END) return Error(Errc::io, "zlib could not compress");
  return out;
}

Result<std::vector<Member>> untar(std::string_view bytes) {
  std::vector<Member> out;
  std::size_t at = 0;
  std::string long_name;
  while (at + block <= bytes.size() && out.size() < 10'000) {
    const auto header = bytes.substr(at, block);
    if (header.find_first_not_of('\0') == std::string_view::npos) break;
    std::uint64_t size = 0;
    if (!octal(header.substr(124, 12), size) || size > bytes.size())
      return out.empty() ? Result<std::vector<Member>>(Error(Errc::corrupt, "is no tar archive"))
                         : Result(std::move(out));
    at += block;
    if (size > bytes.size() - at) break;
    const char type = header[156];
    const auto content = bytes.substr(at, size);
    at += (size + block - 1) / block * block;
    if (type == 'L') {
      long_name = std::string(content.substr(0, std::min<std::size_t>(content.find('\0'), 511)));
      continue;
    }
    if (type == '0' || type == '\0') {
      std::string name = long_name;
      if (name.empty()) {
        const auto prefix =
            is_tar(header) && header[262] == '\0' ? field(header, 345, 155) : std::string_view();
        name = (prefix.empty() ? "" : std::string(prefix) + "/") + std::string(field(header, 0, 100));
      }
      out.push_back({std::move(name), std::string(content)});
    }
    long_name.clear();
    if (at > bytes.size()) break;
  }
  return out;
}

Result<std::string> tar(const std::vector<Member>& members, WallTime when) {
  std::string out;
  for (const auto& member : members) {
    if (member.name.empty() || member.name.size() > 99)
      return Error(Errc::invalid, member.name + ": no name for a member of an archive");
    std::array<char, block> header = {};
    const auto put = [&](std::size_t at, std::string_view text) {
      std::memcpy(header.data() + at, text.data(), text.size());
    };
    put(0, member.name);
    put(100, "0000600");
    put(108, "0000000");
    put(116, "0000000");
    put(124, fmt::format("{:011o}", member.content.size()));
    put(136, fmt::format("{:011o}", static_cast<std::uint64_t>(when.time_since_epoch().count()) / 1000));
    put(148, "        ");
    header[156] = '0';
    put(257, std::string_view("ustar\0"
                              "00",
                              8));
    unsigned sum = 0;
    for (const char c : header) sum += static_cast<unsigned char>(c);
    put(148, fmt::format("{:06o}", sum));
    header[154] = '\0';
    header[155] = ' ';
    out.append(header.data(), header.size());
    out += member.content;
    out.append((block - member.content.size() % block) % block, '\0');
  }
  out.append(2 * block, '\0');
  return out;
}

}  // namespace bulkhead::archive
