// Fibers, barriers and warp collectives of the host shim; knows nothing of torch.
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "ops/cuda/host/shim.h"
#include "ops/cuda/host/switch.h"

// Bounds of the section that holds all __shared__ variables; absent if there are none.
extern "C" char __start_saelens_certify_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_saelens_certify_shared[] __attribute__((weak, visibility("hidden")));

namespace saelens_certify::shim {

dim3 thread_index, block_index, block_size, grid_size;
char* dynamic_memory;

namespace {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kDynamicSharedLimit = 227 * 1024;

enum class State { kReady, kBarrier, kCollective, kDone };

struct Thread {
  Fiber fiber;
  State state;
  dim3 index;
  unsigned priority;
  // What it waits at.
  Kind kind;
  unsigned mask;
  uint64_t value;  // brought, then taken away
  int source;
  Where where;
};

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kBarrier:
      return "__syncthreads";
    case Kind::kSyncwarp:
      return "__syncwarp";
    case Kind::kBallot:
      return "__ballot_sync (or any, all)";
    case Kind::kShuffle:
      return "__shfl_sync";
    default:
      return "__reduce_sync";
  }
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// SplitMix64: a draw for every step of every thread has to be cheap.
class Random {
 public:
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }

  void seed(uint64_t seed) { state_ = seed; }
  uint64_t operator()() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  // Below n, which is small.
  size_t below(size_t n) { return static_cast<size_t>(((*this)() >> 32) * n >> 32); }

 private:
  uint64_t state_ = 0;
};

// Lanes of a warp by what they do; those that do not exist count as done.
struct Warp {
  unsigned at_collective, at_barrier, done;
};

class Block {
 public:
  void run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t dynamic_bytes);
  int barrier(int value, const Where& where);
  uint64_t collective(Kind kind, unsigned mask, uint64_t value, int source, const Where& where);
  void maybe_yield() {
    if (random_() % 4 != 0) return;
    wake(current_);
    pause();
  }
  int lane() const { return current_ % kLanes; }

 private:
  // Ends the process; the message says which thread of which block.
  [[noreturn]] void fail(int thread, const char* message, int other = -1) const;
  void describe(int thread) const;
  void check_barrier(int thread) const;
  void check_collective(int thread) const;
  void complete_barrier();
  void complete_collective(int first, unsigned mask, Kind kind);
  void run_block(dim3 index);
  int next();

  void wake(int thread) {
    threads_[thread].state = State::kReady;
    ready_.push_back(thread);
  }
  void pause() { threads_[current_].fiber.leave(); }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  Random random_;
  const std::function<void()>* kernel_ = nullptr;
  int size_ = 0;
  int current_ = 0;
  int arrived_ = 0;
  int counted_ = 0;
  int contenders_ = 1;
  uint64_t launches_ = 0;
};

void Block::describe(int thread) const {
  const Thread& t = threads_[thread];
  std::fprintf(stderr, "  thread (%u, %u, %u), warp %d, lane %d: ", t.index.x, t.index.y, t.index.z,
               thread / kLanes, thread % kLanes);
  if (t.state == State::kBarrier || t.state == State::kCollective) {
    std::fprintf(stderr, "at %s, mask %08x, %s:%u:%u\n", name_of(t.kind), t.mask,
                 t.where.file_name(), t.where.line(), t.where.column());
  } else {
    std::fprintf(stderr, t.state == State::kDone ? "has returned\n" : "has not arrived\n");
  }
}

void Block::fail(int thread, const char* message, int other) const {
  std::fprintf(stderr, "CUDA host shim: %s, in block (%u, %u, %u) of %u threads\n", message,
               block_index.x, block_index.y, block_index.z, static_cast<unsigned>(size_));
  describe(thread);
  if (other >= 0) describe(other);
  std::fflush(stderr);
  std::abort();
}

// Every other thread must still be able to come to this very barrier.
void Block::check_barrier(int thread) const {
  const Thread& t = threads_[thread];
  for (int i = 0; i < size_; ++i) {
    const Thread& other = threads_[i];
    if (other.state == State::kDone) fail(thread, "a thread returned without the barrier", i);
    if (other.state == State::kBarrier && !same_place(t.where, other.where)) {
      fail(thread, "threads wait at different barriers", i);
    }
    const bool same_warp = i / kLanes == thread / kLanes;
    if (other.state == State::kCollective && same_warp && (other.mask >> (thread % kLanes) & 1)) {
      fail(thread, "a lane of the mask went to a barrier", i);
    }
  }
}

// Every lane of the mask must be here already, or still be able to come.
void Block::check_collective(int thread) const {
  const Thread& t = threads_[thread];
  const Warp& warp = warps_[thread / kLanes];
  const int first = thread - thread % kLanes;
  if (!(t.mask >> (thread % kLanes) & 1)) fail(thread, "the mask lacks the calling lane");
  for (unsigned gone = t.mask & (warp.done | warp.at_barrier); gone != 0;) {
    const int i = first + std::countr_zero(gone);
    if (i >= size_) fail(thread, "the mask names a lane that the block does not have");
    if (threads_[i].state == State::kDone) fail(thread, "a lane of the mask has returned", i);
    fail(thread, "a lane of the mask is at a barrier", i);
  }
  for (unsigned here = t.mask & warp.at_collective; here != 0; here &= here - 1) {
    const Thread& other = threads_[first + std::countr_zero(here)];
    // One that waits for others only will come here later.
    if (&other == &t || !(other.mask >> (thread % kLanes) & 1)) continue;
    if (other.kind != t.kind || other.mask != t.mask || !same_place(t.where, other.where)) {
      fail(thread, "lanes of the mask meet at different collectives",
           first + std::countr_zero(here));
    }
    break;  // the rest have been compared with this one
  }
}

int Block::barrier(int value, const Where& where) {
  Thread& t = threads_[current_];
  t.state = State::kBarrier;
  t.kind = Kind::kBarrier;
  t.mask = 0;
  t.where = where;
  warps_[current_ / kLanes].at_barrier |= 1u << lane();
  // Every check that can fail fails when the last of the threads concerned arrives; the first and
  // the last of a barrier see all of them.
  if (arrived_ == 0 || arrived_ + 1 == size_) check_barrier(current_);
  counted_ += value != 0;
  if (++arrived_ == size_) complete_barrier();
  pause();
  return static_cast<int>(t.value);
}

void Block::complete_barrier() {
  for (Warp& warp : warps_) warp.at_barrier = 0;
  for (int i = 0; i < size_; ++i) {
    threads_[i].value = static_cast<uint64_t>(counted_);
    wake(i);
  }
  arrived_ = counted_ = 0;
}

uint64_t Block::collective(Kind kind, unsigned mask, uint64_t value, int source,
                           const Where& where) {
  Thread& t = threads_[current_];
  t.state = State::kCollective;
  t.kind = kind;
  t.mask = mask;
  t.value = value;
  t.source = source;
  t.where = where;
  Warp& warp = warps_[current_ / kLanes];
  warp.at_collective |= 1u << lane();
  check_collective(current_);
  const int first = current_ - current_ % kLanes;
  if (kind == Kind::kShuffle && !(mask >> source & 1)) {
    fail(current_, "a shuffle reads from a lane outside the mask", first + source);
  }
  if ((warp.at_collective & mask) == mask) complete_collective(first, mask, kind);
  pause();
  return t.value;
}

void Block::complete_collective(int first, unsigned mask, Kind kind) {
  for (int lane = 0; lane < kLanes; ++lane) {
    // A lane of the mask may wait for yet others first.
    if ((mask >> lane & 1) && threads_[first + lane].mask != mask) return;
  }
  warps_[first / kLanes].at_collective &= ~mask;
  uint64_t brought[kLanes] = {}, joined = kind == Kind::kReduceMin ? ~uint64_t{0} : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t value = brought[lane] = threads_[first + lane].value;
    if (kind == Kind::kBallot) joined |= value << lane;
    if (kind == Kind::kReduceAdd) joined = static_cast<unsigned>(joined + value);
    if (kind == Kind::kReduceMax) joined = std::max(joined, value);
    if (kind == Kind::kReduceMin) joined = std::min(joined, value);
    if (kind == Kind::kReduceOr) joined |= value;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& t = threads_[first + lane];
    t.value = kind == Kind::kShuffle ? brought[t.source] : joined;
    wake(first + lane);
  }
}

// Of a few ready threads drawn at random the one whose warp ranks highest: one contender means any
// order is as likely as any other, many let some warps run far ahead.
int Block::next() {
  size_t best = random_.below(ready_.size());
  for (int i = 1; i < contenders_; ++i) {
    const size_t other = random_.below(ready_.size());
    if (threads_[ready_[other]].priority > threads_[ready_[best]].priority) best = other;
  }
  const int thread = ready_[best];
  ready_[best] = ready_.back();
  ready_.pop_back();
  return thread;
}

void Block::run_block(dim3 index) {
  block_index = index;
  // Shared memory starts out undefined: every float and double NaN, every index far out of range.
  if (__start_saelens_certify_shared != nullptr) {
    fill_uninstrumented(__start_saelens_certify_shared, __stop_saelens_certify_shared);
  }
  contenders_ = random_() % 2 ? 1 : 8;
  ready_.clear();
  warps_.assign((size_ + kLanes - 1) / kLanes, {0, 0, 0});
  if (size_ % kLanes != 0) warps_.back().done = ~0u << size_ % kLanes;
  unsigned priority = 0;
  for (int i = 0; i < size_; ++i) {
    if (i % kLanes == 0) priority = static_cast<unsigned>(random_());
    threads_[i].priority = priority;
    wake(i);
  }
  arrived_ = counted_ = 0;
  for (int done = 0; done < size_;) {
    if (ready_.empty()) {
      // Lanes whose partners wait elsewhere; name one of each.
      int stuck = 0, other = 0;
      while (threads_[stuck].state == State::kDone) ++stuck;
      while (other < size_ - 1 && (other == stuck || threads_[other].state == State::kDone ||
                                   same_place(threads_[other].where, threads_[stuck].where))) {
        ++other;
      }
      fail(stuck, "deadlock: every thread waits or has returned", other);
    }
    current_ = next();
    thread_index = threads_[current_].index;
    threads_[current_].fiber.enter();
    if (threads_[current_].fiber.finished()) {
      threads_[current_].state = State::kDone;
      warps_[current_ / kLanes].done |= 1u << lane();
      ++done;
      if (arrived_ > 0) {
        int waiting = 0;
        while (threads_[waiting].state != State::kBarrier) ++waiting;
        fail(waiting, "a thread returned without the barrier", current_);
      }
    }
  }
}

void Block::run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t dynamic_bytes) {
  const char* seed = std::getenv("SAELENS_CERTIFY_SHIM_SEED");
  random_.seed((seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10)) * 1000003 + launches_++);
  size_ = static_cast<int>(block.x * block.y * block.z);
  if (size_ > kMostThreads || dynamic_bytes > kDynamicSharedLimit) {
    std::fprintf(stderr, "CUDA host shim: %d threads or %zu bytes of shared memory are too many\n",
                 size_, dynamic_bytes);
    std::abort();
  }
  grid_size = grid;
  block_size = block;
  // Fibers must not move: all at once, at the first launch.
  if (threads_.empty()) threads_ = std::vector<Thread>(kMostThreads);
  for (int i = 0; i < size_; ++i) {
    const unsigned at = static_cast<unsigned>(i);
    threads_[i].index = {at % block.x, at / block.x % block.y, at / block.x / block.y};
    threads_[i].fiber.prepare(&kernel);
  }
  // Blocks, too, come in any order.
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_);
  for (const uint64_t at : order) {
    // Exactly as long as asked for, so that AddressSanitizer sees what goes beyond.
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 16, dynamic_bytes) != 0) std::abort();
    const std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(allocated),
                                                             &std::free);
    std::memset(memory.get(), 0xff, dynamic_bytes);
    dynamic_memory = memory.get();
    run_block({static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
               static_cast<unsigned>(at / grid.x / grid.y)});
  }
}

// One launch at a time: blocks share the static variables that stand for shared memory.
Block the_block;
std::mutex launching;

}  // namespace

void run(const std::function<void()>& kernel, dim3 grid, dim3 block, size_t dynamic_bytes) {
  const std::lock_guard<std::mutex> lock(launching);
  the_block.run(kernel, grid, block, dynamic_bytes);
}

int barrier(int value, const Where& where) { return the_block.barrier(value, where); }

uint64_t collective(Kind kind, unsigned mask, uint64_t value, int source, const Where& where) {
  return the_block.collective(kind, mask, value, source, where);
}

void maybe_yield() { the_block.maybe_yield(); }

int lane() { return the_block.lane(); }

}  // namespace saelens_certify::shim
