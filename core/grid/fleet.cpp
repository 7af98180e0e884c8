#include <algorithm>
#include <bit>

#include <fmt/format.h>

#include "core/grid/grid.hpp"

namespace bulkhead::grid {

namespace {

// Classes times sets of a fleet: 12 bytes each.
constexpr std::size_t bucket_limit = std::size_t{1} << 24U;
constexpr unsigned word_bits = 64;

void set_bit(std::vector<std::uint64_t>& words, std::size_t at) {
  words[at / word_bits] |= std::uint64_t{1} << (at % word_bits);
}
void clear_bit(std::vector<std::uint64_t>& words, std::size_t at) {
  words[at / word_bits] &= ~(std::uint64_t{1} << (at % word_bits));
}

}  // namespace

Result<ModelId> Fleet::add_model(const Tables& tables) {
  if (models_.size() >= max_models)
    return Error(Errc::no_capacity, fmt::format("a fleet of more than {} GPU models", max_models));
  Model model;
  model.tables = &tables;
  for (unsigned p = 0; p < tables.profile_count(); ++p)
    model.ranks.emplace_back((tables.ranked(p).size() + word_bits - 1) / word_bits, 0);
  model.filled.assign(tables.set_count() * class_words_, 0);
  model.counts.assign(tables.set_count(), 0);
  model.present.assign(tables.set_count() / word_bits + 1, 0);
  models_.push_back(std::move(model));
  return static_cast<ModelId>(models_.size() - 1);
}

Result<ClassId> Fleet::add_class(ModelId model) {
  BH_ASSERT(model < models_.size());
  const std::size_t sets = models_[model].tables->set_count();
  if (class_model_.size() >= max_classes || buckets_.size() + sets > bucket_limit)
    return Error(Errc::no_capacity,
                 fmt::format("a fleet of more than {} classes, or {} classes and instance sets together",
                             max_classes, bucket_limit),
                 "give fewer classes to the model with the most instance sets");
  const auto cls = static_cast<ClassId>(class_model_.size());
  class_model_.push_back(model);
  models_[model].classes.push_back(cls);
  bucket_at_.push_back(buckets_.size());
  buckets_.resize(buckets_.size() + sets);
  if (const std::size_t words = class_model_.size() / word_bits + 1; words > class_words_) {
    for (auto& each : models_) {
      std::vector<std::uint64_t> wider(each.tables->set_count() * words, 0);
      for (std::size_t s = 0; s < each.tables->set_count(); ++s)
        std::copy_n(each.filled.begin() + static_cast<std::ptrdiff_t>(s * class_words_), class_words_,
                    wider.begin() + static_cast<std::ptrdiff_t>(s * words));
      each.filled = std::move(wider);
    }
    class_words_ = words;
  }
  return cls;
}

void Fleet::reserve(std::size_t gpus) { gpus_.reserve(std::min(gpus, max_gpus)); }

Result<GpuId> Fleet::add_gpu(ClassId cls, SetId set) {
  BH_ASSERT(cls < class_model_.size() && set < models_[class_model_[cls]].tables->set_count());
  if (gpus_.size() >= max_gpus)
    return Error(Errc::no_capacity, fmt::format("a fleet of more than {} GPUs", max_gpus));
  const auto gpu = static_cast<GpuId>(gpus_.size());
  gpus_.push_back({no_gpu, no_gpu, set, cls, State::open});
  join(gpu);
  Model& model = models_[class_model_[cls]];
  model.total_units += model.tables->units();
  model.used_units += model.tables->units() - model.tables->free_units(set);
  ++live_;
  return gpu;
}

void Fleet::remove_gpu(GpuId gpu) {
  if (!present(gpu)) return;
  if (gpus_[gpu].state == State::open) withdraw(gpu);
  Model& model = models_[model_of(gpu)];
  model.total_units -= model.tables->units();
  model.used_units -= model.tables->units() - model.tables->free_units(gpus_[gpu].set);
  gpus_[gpu].state = State::gone;
  gpus_[gpu].set = 0;
  --live_;
}

void Fleet::drain(GpuId gpu, bool on) {
  if (!present(gpu) || drained(gpu) == on) return;
  if (on) {
    withdraw(gpu);
    gpus_[gpu].state = State::drained;
  } else {
    gpus_[gpu].state = State::open;
    join(gpu);
  }
}

bool Fleet::reclass(GpuId gpu, ClassId cls) {
  if (!present(gpu) || cls >= class_model_.size() || class_model_[cls] != model_of(gpu)) return false;
  if (gpus_[gpu].cls == cls) return true;
  if (gpus_[gpu].state == State::open) unlink(gpu);
  gpus_[gpu].cls = cls;
  if (gpus_[gpu].state == State::open) link(gpu, no_gpu);
  return true;
}

// The first GPU of a class came into a set: the bits that say so.
void Fleet::arrive(Model& model, ClassId cls, SetId set) {
  model.filled[set * class_words_ + cls / word_bits] |= std::uint64_t{1} << (cls % word_bits);
  set_bit(model.present, set);
  for (unsigned p = 0; p < model.ranks.size(); ++p) {
    if (const auto rank = model.tables->rank_of(p, set); rank != Tables::no_rank)
      set_bit(model.ranks[p], rank);
  }
}
void Fleet::leave(Model& model, ClassId cls, SetId set) {
  model.filled[set * class_words_ + cls / word_bits] &= ~(std::uint64_t{1} << (cls % word_bits));
  if (model.counts[set] != 0) return;
  clear_bit(model.present, set);
  for (unsigned p = 0; p < model.ranks.size(); ++p) {
    if (const auto rank = model.tables->rank_of(p, set); rank != Tables::no_rank)
      clear_bit(model.ranks[p], rank);
  }
}

void Fleet::link(GpuId gpu, GpuId prev) {
  Gpu& it = gpus_[gpu];
  Bucket& home = bucket(it.cls, it.set);
  it.prev = prev;
  it.next = prev == no_gpu ? home.head : gpus_[prev].next;
  (prev == no_gpu ? home.head : gpus_[prev].next) = gpu;
  if (it.next != no_gpu) gpus_[it.next].prev = gpu;
  Model& model = models_[class_model_[it.cls]];
  ++model.counts[it.set];
  if (home.count++ == 0) arrive(model, it.cls, it.set);
}

void Fleet::unlink(GpuId gpu) {
  const Gpu& it = gpus_[gpu];
  Bucket& home = bucket(it.cls, it.set);
  (it.prev == no_gpu ? home.head : gpus_[it.prev].next) = it.next;
  if (it.next != no_gpu) gpus_[it.next].prev = it.prev;
  Model& model = models_[class_model_[it.cls]];
  --model.counts[it.set];
  if (--home.count == 0) leave(model, it.cls, it.set);
}

// A GPU begins or ceases to take instances.
void Fleet::join(GpuId gpu) {
  Model& model = models_[model_of(gpu)];
  ++model.open;
  const auto places = model.tables->places();
  for (auto bits = model.tables->bits(gpus_[gpu].set); bits != 0; bits &= bits - 1)
    ++model.held[places[static_cast<unsigned>(std::countr_zero(bits))].profile];
  link(gpu, no_gpu);
}
void Fleet::withdraw(GpuId gpu) {
  Model& model = models_[model_of(gpu)];
  --model.open;
  const auto places = model.tables->places();
  for (auto bits = model.tables->bits(gpus_[gpu].set); bits != 0; bits &= bits - 1)
    --model.held[places[static_cast<unsigned>(std::countr_zero(bits))].profile];
  unlink(gpu);
}

// The state of a GPU, and the sums that follow it; not its bucket.
void Fleet::change(GpuId gpu, SetId set) {
  Gpu& it = gpus_[gpu];
  Model& model = models_[class_model_[it.cls]];
  const Tables& its = *model.tables;
  model.used_units += its.free_units(it.set);
  model.used_units -= its.free_units(set);
  if (it.state == State::open) {
    const std::uint64_t before = its.bits(it.set), now = its.bits(set);
    for (auto bits = now & ~before; bits != 0; bits &= bits - 1)
      ++model.held[its.places()[static_cast<unsigned>(std::countr_zero(bits))].profile];
    for (auto bits = before & ~now; bits != 0; bits &= bits - 1)
      --model.held[its.places()[static_cast<unsigned>(std::countr_zero(bits))].profile];
  }
  it.set = set;
}

void Fleet::shift(GpuId gpu, SetId set) {
  const bool open = gpus_[gpu].state == State::open;
  if (open) unlink(gpu);
  change(gpu, set);
  if (open) link(gpu, no_gpu);
}

std::optional<Choice> Fleet::choose(const Request& request, bool* cut) const {
  if (cut != nullptr) *cut = false;
  if (request.model >= models_.size() || request.profile >= models_[request.model].ranks.size())
    return std::nullopt;
  const Model& model = models_[request.model];
  const auto ranked = model.tables->ranked(request.profile);
  const auto& words = model.ranks[request.profile];
  std::size_t shown = 0;
  for (std::size_t w = 0; w < words.size(); ++w) {
    for (std::uint64_t bits = words[w]; bits != 0; bits &= bits - 1) {
      const Ranked& best = ranked[w * word_bits + static_cast<unsigned>(std::countr_zero(bits))];
      const std::uint64_t* filled = &model.filled[best.set * class_words_];
      for (std::size_t c = 0; c < class_words_; ++c) {
        std::uint64_t classes = filled[c];
        if (!request.classes.empty()) classes &= c < request.classes.size() ? request.classes[c] : 0;
        for (; classes != 0; classes &= classes - 1) {
          const auto cls =
              static_cast<ClassId>(c * word_bits + static_cast<unsigned>(std::countr_zero(classes)));
          for (GpuId gpu = bucket(cls, best.set).head; gpu != no_gpu; gpu = gpus_[gpu].next) {
            if (request.filter) {
              if (shown++ == request.scan) {
                if (cut != nullptr) *cut = true;
                return std::nullopt;
              }
              if (!request.filter(gpu)) continue;
            }
            return Choice{gpu, request.profile, model.tables->places()[best.place].start, best.growth};
          }
        }
      }
    }
  }
  return std::nullopt;
}

bool Fleet::place(GpuId gpu, unsigned profile, unsigned start) {
  if (gpu >= gpus_.size() || gpus_[gpu].state != State::open) return false;
  const Tables& its = tables_of(gpu);
  const auto at = its.place_of(profile, start);
  if (!at) return false;
  const SetId set = its.next(gpus_[gpu].set, *at);
  if (set == no_set) return false;
  shift(gpu, set);
  return true;
}

bool Fleet::remove(GpuId gpu, unsigned profile, unsigned start) {
  if (!present(gpu)) return false;
  const Tables& its = tables_of(gpu);
  const auto at = its.place_of(profile, start);
  if (!at) return false;
  const SetId set = its.without(gpus_[gpu].set, *at);
  if (set == no_set) return false;
  shift(gpu, set);
  return true;
}

void Fleet::adopt(GpuId gpu, SetId set) {
  BH_ASSERT(present(gpu) && set < tables_of(gpu).set_count());
  shift(gpu, set);
}

std::size_t Fleet::count(ClassId cls, SetId set) const { return bucket(cls, set).count; }
GpuId Fleet::first(ClassId cls, SetId set) const { return bucket(cls, set).head; }
std::size_t Fleet::empty_gpus(ModelId model) const { return models_[model].counts[0]; }

}  // namespace bulkhead::grid
