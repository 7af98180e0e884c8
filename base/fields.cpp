#include "base/fields.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include <fmt/format.h>

#include "base/text.hpp"

namespace bulkhead {

namespace {

constexpr std::size_t most_told = 20;

bool clean(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) == 0x7f;
  });
}

}  // namespace

Fields::Fields(const Json& object, std::string path, std::vector<std::string>& mistakes)
    : object_(object), path_(std::move(path)), mistakes_(mistakes) {
  if (!object_.is_object())
    mistakes_.push_back(path_.empty() ? "must be a JSON object" : path_ + ": must be a JSON object");
}

std::string Fields::path_of(std::string_view key) const {
  const std::string shown = printable(key, 64);
  return path_.empty() ? shown : path_ + "." + shown;
}

void Fields::mistake(std::string_view key, std::string_view what) {
  mistakes_.push_back(fmt::format("{}: {}", path_of(key), what));
}

const Json* Fields::find(std::string_view key) {
  known_.emplace(key);
  if (!object_.is_object()) return nullptr;
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool Fields::has(std::string_view key) { return find(key) != nullptr; }

std::optional<std::uint64_t> Fields::whole(std::string_view key, std::uint64_t least, std::uint64_t most) {
  const Json* value = find(key);
  if (value == nullptr) return std::nullopt;
  // A number written as 2.0 or 1e3 is not whole here: what a client means by it is not ours to guess.
  if (value->is_number_unsigned() || (value->is_number_integer() && value->get<std::int64_t>() >= 0)) {
    const auto number = value->get<std::uint64_t>();
    if (number >= least && number <= most) return number;
  }
  mistake(key, fmt::format("must be a whole number from {} to {}", least, most));
  return std::nullopt;
}

std::optional<std::int64_t> Fields::number(std::string_view key, std::int64_t least, std::int64_t most) {
  const Json* value = find(key);
  if (value == nullptr) return std::nullopt;
  const bool fits = value->is_number_unsigned()
                        ? value->get<std::uint64_t>() <=
                              static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())
                        : value->is_number_integer();
  if (fits) {
    const auto number = value->get<std::int64_t>();
    if (number >= least && number <= most) return number;
  }
  mistake(key, fmt::format("must be a whole number from {} to {}", least, most));
  return std::nullopt;
}

std::optional<bool> Fields::flag(std::string_view key) {
  const Json* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->is_boolean()) return value->get<bool>();
  mistake(key, "must be true or false");
  return std::nullopt;
}

std::optional<std::string> Fields::text(std::string_view key, std::size_t most) {
  const Json* value = find(key);
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) {
    const auto& text = value->get_ref<const std::string&>();
    if (text.size() <= most && clean(text)) return text;
  }
  mistake(key, fmt::format("must be a string of at most {} bytes without control characters", most));
  return std::nullopt;
}

std::vector<std::string> Fields::texts(std::string_view key, std::size_t most_items, std::size_t most_bytes) {
  const Json* value = array(key, most_items);
  std::vector<std::string> out;
  if (value == nullptr) return out;
  for (std::size_t i = 0; i < value->size(); ++i) {
    const Json& item = (*value)[i];
    if (item.is_string() && item.get_ref<const std::string&>().size() <= most_bytes &&
        clean(item.get_ref<const std::string&>()))
      out.push_back(item.get<std::string>());
    else
      mistake(fmt::format("{}[{}]", key, i),
              fmt::format("must be a string of at most {} bytes without control characters", most_bytes));
  }
  return out;
}

const Json* Fields::object(std::string_view key) {
  const Json* value = find(key);
  if (value == nullptr || value->is_object()) return value;
  mistake(key, "must be a JSON object");
  return nullptr;
}

const Json* Fields::array(std::string_view key, std::size_t most_items) {
  const Json* value = find(key);
  if (value == nullptr) return nullptr;
  if (value->is_array() && value->size() <= most_items) return value;
  mistake(key, fmt::format("must be a list of at most {}", most_items));
  return nullptr;
}

void Fields::no_others() {
  if (!object_.is_object()) return;
  const std::vector<std::string_view> names(known_.begin(), known_.end());
  std::size_t told = 0;
  for (const auto& [key, value] : object_.items()) {
    if (known_.contains(key) || ++told > most_told) continue;
    const auto near = closest(key, names);
    mistake(key,
            near.empty() ? std::string("no such key") : fmt::format("no such key; did you mean '{}'?", near));
  }
}

Status no_mistakes(std::string_view what, const std::vector<std::string>& mistakes) {
  if (mistakes.empty()) return ok_status();
  std::vector<std::string> told(
      mistakes.begin(), mistakes.begin() + static_cast<std::ptrdiff_t>(std::min(mistakes.size(), most_told)));
  if (mistakes.size() > most_told) told.push_back(fmt::format("and {} more", mistakes.size() - most_told));
  return Error(Errc::invalid, fmt::format("{}: {}", what, join(told, "; ")));
}

}  // namespace bulkhead
