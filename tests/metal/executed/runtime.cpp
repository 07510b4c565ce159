// Runs kernels: threads of a threadgroup are fibers of one system thread, which proceed in random order from one
// meeting point to the next. MSL_COPIES: shaders see copies of the buffers, so that accesses next to them are noticed.
// MSL_RACE: the accesses are checked as race.h says.
#include "include/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "context_switch.h"
#include "race.h"

#if defined(__SANITIZE_ADDRESS__)
#define MSL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MSL_ASAN 1
#endif
#endif
#if MSL_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace msl_runtime {
namespace {

constexpr size_t kStackBytes = 256 << 10, kPageBytes = 16 << 10, kBufferAlignment = 64;

enum class State { kReady, kInExchange, kInSimdgroupBarrier, kInThreadgroupBarrier, kFinished };

struct Fiber {
  char* stack = nullptr;
  void* context = nullptr;
  State state = State::kFinished;
  uint32_t index = 0;  // in the threadgroup
  Site site = {};
  void* exchanged = nullptr;
  Combine combine = nullptr;
  msl_race::Thread race = {};

  uint32_t lane() const { return index % MSL_SIMD_WIDTH; }
  uint32_t simdgroup() const { return index / MSL_SIMD_WIDTH; }
};

// A block of memory that shaders see, with what is around it.
class Memory {
 public:
  Memory(size_t bytes, size_t misalignment) : bytes_(bytes) {
    void* allocated = nullptr;
    if (posix_memalign(&allocated, kBufferAlignment, kBefore + misalignment + bytes + kAfter) != 0) std::abort();
    allocated_ = static_cast<char*>(allocated);
    data_ = allocated_ + kBefore + misalignment;
  }
  Memory(Memory&& other) noexcept : allocated_(other.allocated_), data_(other.data_), bytes_(other.bytes_) {
    other.allocated_ = nullptr;
  }
  ~Memory() { std::free(allocated_); }
  char* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
#if MSL_RACE
  static constexpr size_t kBefore = msl_race::kGuard, kAfter = msl_race::kGuard;
#else
  static constexpr size_t kBefore = 0, kAfter = 0;
#endif
  char *allocated_, *data_;
  size_t bytes_;
};

// One range of the caller's memory. Buffers that overlap share one.
struct Copy {
  char* original;
  Memory memory;
};

// Everything about the dispatch under way.
struct Machine {
  const MslKernel* kernel;
  const MslDispatch* dispatch;
  void (*entry)();
  uint64_t random;
  uint32_t threadgroup[3];
  uint32_t threads;
  std::vector<Fiber*> ready[MSL_MAX_THREADS / MSL_SIMD_WIDTH];  // by simdgroup
  uint32_t favourite;                                           // the simdgroup that goes on if it can
  uint32_t patience;  // the favourite changes once in 2^patience times: some barriers are missed only if one runs ahead
  std::vector<void*> buffers;
  std::vector<Memory> threadgroup_memory;
  std::map<uint32_t, Memory> threadgroup_variables;
  std::vector<std::string> problems;
  bool is_stopped;
};

Machine machine;
std::vector<Fiber> fibers;  // only ever grows: stacks are kept
Fiber* current;             // null: the scheduler
void* scheduler_context;

uint64_t random_number() {
  uint64_t z = machine.random += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

std::string name(const Site& site) {
  return std::string(site.function) + " at " + site.file + ":" + std::to_string(site.line);
}

// Switching

void switch_to(Fiber* to) {
  Fiber* const from = current;
  current = to;
#if MSL_ASAN
  // The scheduler's stack is learnt when a fiber first runs.
  static const void* scheduler_stack;
  static size_t scheduler_stack_bytes;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to == nullptr ? scheduler_stack : to->stack,
                                 to == nullptr ? scheduler_stack_bytes : kStackBytes);
#endif
#if MSL_RACE
  msl_race::run_thread(to == nullptr ? nullptr : &to->race);
#endif
  msl_switch_context(from == nullptr ? &scheduler_context : &from->context,
                     to == nullptr ? scheduler_context : to->context);
#if MSL_ASAN
  const void* last_stack;
  size_t last_stack_bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &last_stack, &last_stack_bytes);
  if (current != nullptr) scheduler_stack = last_stack, scheduler_stack_bytes = last_stack_bytes;
#endif
}

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  machine.ready[fiber.simdgroup()].push_back(&fiber);
}

// The dispatch ends here: no fiber runs again.
[[noreturn]] void stop(const std::string& problem) {
  machine.problems.push_back(problem);
  machine.is_stopped = true;
  switch_to(nullptr);
  std::abort();
}

void run_fiber() {
#if MSL_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  machine.entry();
  current->state = State::kFinished;
  switch_to(nullptr);
  std::abort();
}

// Meeting points

struct Range {
  uint32_t first, end;
};

Range simdgroup_of(uint32_t thread) {
  const uint32_t first = thread / MSL_SIMD_WIDTH * MSL_SIMD_WIDTH;
  return {first, std::min(first + MSL_SIMD_WIDTH, machine.threads)};
}

std::string thread_name(uint32_t thread) {
  const uint32_t* group = machine.threadgroup;
  return "thread " + std::to_string(thread) + " of threadgroup (" + std::to_string(group[0]) + ", " +
         std::to_string(group[1]) + ", " + std::to_string(group[2]) + ")";
}

std::string describe(const Fiber& fiber) {
  return thread_name(fiber.index) + (fiber.state == State::kFinished ? " has returned" : " is in " + name(fiber.site));
}

bool are_at_one_site(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0) &&
         std::strcmp(a.function, b.function) == 0;
}

// Waits for the threads of the range, then lets `meet` do what is to be done once all are there.
template <class Meet>
void wait_for(Range range, State state, Site site, Meet meet) {
  current->state = state;
  current->site = site;
  uint32_t present = range.first;
  while (present < range.end && fibers[present].state == state) ++present;
  if (present == range.end) {
    for (uint32_t i = range.first; i < range.end; ++i) {
      if (are_at_one_site(fibers[i].site, site)) continue;
      stop(std::string(site.function) + " in divergent flow: " + describe(*current) + ", " + describe(fibers[i]));
    }
    meet();
    for (uint32_t i = range.first; i < range.end; ++i) make_ready(fibers[i]);
  }
  switch_to(nullptr);
}

// No thread can go on: some wait for others that are elsewhere.
[[nodiscard]] std::string divergence() {
  for (uint32_t i = 0; i < machine.threads; ++i) {
    const Fiber& waiting = fibers[i];
    if (waiting.state == State::kFinished) continue;
    const bool is_threadgroup = waiting.state == State::kInThreadgroupBarrier;
    const Range range = is_threadgroup ? Range{0, machine.threads} : simdgroup_of(i);
    uint32_t present = 0;
    const Fiber* absent = nullptr;
    for (uint32_t j = range.first; j < range.end; ++j) {
      const bool is_there = fibers[j].state == waiting.state && are_at_one_site(fibers[j].site, waiting.site);
      present += is_there;
      // A simd function that waits is the cause of a barrier's waiting, not the other way round.
      if (!is_there && !(is_threadgroup && fibers[j].state == State::kInExchange)) absent = &fibers[j];
    }
    if (absent == nullptr) continue;
    return name(waiting.site) + " is reached by only " + std::to_string(present) + " of " +
           std::to_string(range.end - range.first) + " threads of the " +
           (is_threadgroup ? "threadgroup" : "simdgroup") + ": " + describe(*absent);
  }
  return "no thread can go on";
}

// Threadgroups

void poison(const Memory& memory) {
  std::memset(memory.data(), machine.dispatch->seed % 2 ? 0xA5 : 0xFF, memory.size());
}

// Stacks are mapped together, with one page that is never accessible before them all: a process that has many shaders
// loaded would run out of mappings otherwise.
char* new_stack() {
  static char* next;
  static size_t left = 0;
  if (left == 0) {
    left = 64;
    void* pages =
        mmap(nullptr, kPageBytes + left * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    mprotect(pages, kPageBytes, PROT_NONE);
    next = static_cast<char*>(pages) + kPageBytes;
  }
  char* stack = next;
  next += kStackBytes;
  --left;
  return stack;
}

void prepare(Fiber& fiber, uint32_t index, uint32_t threadgroup) {
  if (fiber.stack == nullptr) {
    fiber.stack = new_stack();
  }
#if MSL_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  fiber.context = new_context(fiber.stack, kStackBytes, run_fiber);
  fiber.index = index;
  fiber.race = {threadgroup + 1, index, {}};
  make_ready(fiber);
}

// The thread that goes on; null if none can.
Fiber* take_ready() {
  if (machine.is_stopped) return nullptr;
  const uint32_t simdgroups = (machine.threads + MSL_SIMD_WIDTH - 1) / MSL_SIMD_WIDTH;
  const uint64_t random = random_number();
  if ((random & ((1u << machine.patience) - 1)) == 0) machine.favourite = uint32_t((random >> 32) % simdgroups);
  for (uint32_t i = 0; i < simdgroups; ++i) {
    std::vector<Fiber*>& ready = machine.ready[(machine.favourite + i) % simdgroups];
    if (ready.empty()) continue;
    std::swap(ready[(random >> 16) % ready.size()], ready.back());
    Fiber* const next = ready.back();
    ready.pop_back();
    return next;
  }
  return nullptr;
}

void run_threadgroup(uint32_t threadgroup) {
  const uint32_t* grid = machine.dispatch->grid;
  machine.threadgroup[0] = threadgroup % grid[0];
  machine.threadgroup[1] = threadgroup / grid[0] % grid[1];
  machine.threadgroup[2] = threadgroup / grid[0] / grid[1];
  for (const Memory& memory : machine.threadgroup_memory) poison(memory);
  for (const auto& variable : machine.threadgroup_variables) poison(variable.second);
#if MSL_RACE
  msl_race::start_threadgroup();
#endif
  machine.patience = uint32_t(random_number() % 9);
  for (uint32_t i = 0; i < machine.threads; ++i) prepare(fibers[i], i, threadgroup);
  while (Fiber* next = take_ready()) switch_to(next);
  if (machine.is_stopped) return;
  for (uint32_t i = 0; i < machine.threads; ++i) {
    if (fibers[i].state == State::kFinished) continue;
    machine.problems.push_back(divergence());
    machine.is_stopped = true;
    return;
  }
}

// Arguments

std::string argument_name(const MslArgument& argument) {
  return (argument.kind == MSL_BUFFER ? "buffer " : "threadgroup memory ") + std::to_string(argument.index) + " (" +
         argument.name + ")";
}

std::string check_argument(const MslArgument& argument, const MslDispatch& dispatch) {
  if (argument.kind == MSL_THREADGROUP) {
    if (argument.index < dispatch.threadgroup_count && dispatch.threadgroup_bytes[argument.index] != 0) return "";
    return argument_name(argument) + " has no length";
  }
  if (argument.kind != MSL_BUFFER) return "";
  if (argument.index >= dispatch.buffer_count || dispatch.buffers[argument.index] == nullptr) {
    return argument_name(argument) + " is not bound";
  }
  const uint64_t bytes = dispatch.buffer_bytes[argument.index];
  if (bytes < argument.size) {
    return argument_name(argument) + " has " + std::to_string(bytes) + " bytes, needs " + std::to_string(argument.size);
  }
  if (reinterpret_cast<uintptr_t>(dispatch.buffers[argument.index]) % argument.alignment != 0) {
    return argument_name(argument) + " is not aligned to " + std::to_string(argument.alignment) + " bytes";
  }
  return "";
}

// What is wrong with the dispatch; empty if nothing is.
std::string check(const MslKernel& kernel, const MslDispatch& dispatch) {
  uint64_t threads = 1, threadgroups = 1, bytes = kernel.static_threadgroup_bytes;
  for (int i = 0; i < 3; ++i) threads *= dispatch.threads[i], threadgroups *= dispatch.grid[i];
  if (threadgroups == 0) return "the grid is empty";
  if (threadgroups > UINT32_MAX) return "the grid has too many threadgroups";
  if (threads == 0 || threads > MSL_MAX_THREADS) return "a threadgroup of " + std::to_string(threads) + " threads";
  for (uint32_t i = 0; i < dispatch.threadgroup_count; ++i) {
    if (dispatch.threadgroup_bytes[i] % 16 != 0) {
      return "the length of threadgroup memory " + std::to_string(i) + " is not a multiple of 16 bytes";
    }
    bytes += dispatch.threadgroup_bytes[i];
  }
  if (bytes > MSL_MAX_THREADGROUP_BYTES) return std::to_string(bytes) + " bytes of threadgroup memory";
  for (uint32_t i = 0; i < kernel.argument_count; ++i) {
    const std::string problem = check_argument(kernel.arguments[i], dispatch);
    if (!problem.empty()) return problem;
  }
  return "";
}

bool is_declared(uint32_t index) {
  const MslArgument* arguments = machine.kernel->arguments;
  return std::any_of(arguments, arguments + machine.kernel->argument_count, [index](const MslArgument& argument) {
    return argument.kind == MSL_BUFFER && argument.index == index;
  });
}

void write_back(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.original, copy.memory.data(), copy.memory.size());
}

#if MSL_COPIES
// Copies of the buffers, one of all that overlap, in machine.buffers.
std::vector<Copy> copy_buffers() {
  const MslDispatch& dispatch = *machine.dispatch;
  std::vector<uint32_t> order;
  for (uint32_t i = 0; i < dispatch.buffer_count; ++i) {
    if (is_declared(i)) order.push_back(i);
  }
  const auto start = [&](uint32_t i) { return static_cast<char*>(dispatch.buffers[i]); };
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return start(a) < start(b); });
  std::vector<Copy> copies;
  for (size_t i = 0; i < order.size();) {
    char* const first = start(order[i]);
    char* end = first;
    size_t next = i;
    std::string names;
    for (; next < order.size() && (next == i || start(order[next]) < end); ++next) {
      end = std::max(end, start(order[next]) + dispatch.buffer_bytes[order[next]]);
      names += (next == i ? "buffer " : " and ") + std::to_string(order[next]);
    }
    const size_t bytes = size_t(end - first);
    copies.push_back({first, Memory(bytes, reinterpret_cast<uintptr_t>(first) % kBufferAlignment)});
    char* const copy = copies.back().memory.data();
    std::memcpy(copy, first, bytes);
    for (; i < next; ++i) machine.buffers[order[i]] = copy + (start(order[i]) - first);
#if MSL_RACE
    msl_race::add_region(copy, bytes, msl_race::kDevice, names);
#endif
  }
  return copies;
}
#else
std::vector<Copy> copy_buffers() {
  std::copy_n(machine.dispatch->buffers, machine.buffers.size(), machine.buffers.begin());
  return {};
}
#endif

void allocate_threadgroup_memory() {
  for (uint32_t i = 0; i < machine.dispatch->threadgroup_count; ++i) {
    machine.threadgroup_memory.emplace_back(machine.dispatch->threadgroup_bytes[i], 0);
#if MSL_RACE
    const Memory& memory = machine.threadgroup_memory.back();
    if (memory.size() == 0) continue;
    msl_race::add_region(memory.data(), memory.size(), msl_race::kThreadgroup,
                         "threadgroup memory " + std::to_string(i));
#endif
  }
}

int finish(const MslDispatch& dispatch, const MslKernel& kernel, const std::vector<std::string>& problems) {
  std::string text;
  for (const std::string& problem : problems)
    text += (text.empty() ? "" : "\n") + std::string(kernel.name) + ": " + problem;
  if (dispatch.error_bytes != 0) snprintf(dispatch.error, dispatch.error_bytes, "%s", text.c_str());
  return problems.empty() ? 0 : 1;
}

}  // namespace

void exchange(void* mine, Combine combine, Site site) {
  current->exchanged = mine;
  const Range range = simdgroup_of(current->index);
  wait_for(range, State::kInExchange, site, [&] {
    void* lanes[MSL_SIMD_WIDTH] = {};
    for (uint32_t i = range.first; i < range.end; ++i) lanes[i - range.first] = fibers[i].exchanged;
    combine(lanes);
  });
}

void barrier(bool is_threadgroup, uint32_t memory, Site site) {
  const Range range = is_threadgroup ? Range{0, machine.threads} : simdgroup_of(current->index);
  const State state = is_threadgroup ? State::kInThreadgroupBarrier : State::kInSimdgroupBarrier;
  wait_for(range, state, site, [&] {
    for (uint32_t i = range.first; i < range.end; ++i) {
      for (int m = 0; m < msl_race::kMemories; ++m) {
        if ((memory >> m & 1) == 0) continue;
        msl_race::Clock& clock = fibers[i].race.clock;
        ++clock.any[m];
        if (is_threadgroup) ++clock.threadgroup[m];
      }
    }
  });
}

uint32_t lane() { return current->lane(); }

void fail(Site site, const char* problem) { stop(name(site) + " " + problem + ": " + thread_name(current->index)); }

void shuffle(uint32_t* order, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t j = uint32_t(random_number() % (i + 1));
    order[i] = order[j];
    order[j] = i;
  }
}

void* buffer(uint32_t index) { return machine.buffers[index]; }

void* threadgroup_memory(uint32_t index) { return machine.threadgroup_memory[index].data(); }

void* threadgroup_variable(uint32_t index, const char* name, size_t bytes) {
  auto found = machine.threadgroup_variables.find(index);
  if (found == machine.threadgroup_variables.end()) {
    found = machine.threadgroup_variables.emplace(index, Memory(bytes, 0)).first;
    poison(found->second);
#if MSL_RACE
    msl_race::add_region(found->second.data(), bytes, msl_race::kThreadgroup, name);
#else
    (void)name;
#endif
  }
  return found->second.data();
}

Index3 builtin(Builtin which) {
  const uint32_t *size = machine.dispatch->threads, *grid = machine.dispatch->grid, *group = machine.threadgroup;
  const uint32_t index = current->index;
  const Index3 thread = {{index % size[0], index / size[0] % size[1], index / size[0] / size[1]}};
  switch (which) {
    case Builtin::kThreadPositionInGrid:
      return {{group[0] * size[0] + thread.v[0], group[1] * size[1] + thread.v[1], group[2] * size[2] + thread.v[2]}};
    case Builtin::kThreadPositionInThreadgroup:
      return thread;
    case Builtin::kThreadgroupPositionInGrid:
      return {{group[0], group[1], group[2]}};
    case Builtin::kThreadsPerThreadgroup:
      return {{size[0], size[1], size[2]}};
    case Builtin::kThreadgroupsPerGrid:
      return {{grid[0], grid[1], grid[2]}};
    case Builtin::kThreadsPerGrid:
      return {{grid[0] * size[0], grid[1] * size[1], grid[2] * size[2]}};
    case Builtin::kThreadIndexInThreadgroup:
      return {{index}};
    case Builtin::kThreadIndexInSimdgroup:
      return {{current->lane()}};
    case Builtin::kSimdgroupIndexInThreadgroup:
      return {{index / MSL_SIMD_WIDTH}};
    case Builtin::kSimdgroupsPerThreadgroup:
      return {{(machine.threads + MSL_SIMD_WIDTH - 1) / MSL_SIMD_WIDTH}};
    case Builtin::kThreadsPerSimdgroup:
      break;
  }
  return {{MSL_SIMD_WIDTH}};
}

int run(const MslKernel& kernel, void (*entry)(), const MslDispatch& dispatch) {
  static std::mutex turn;
  const std::lock_guard<std::mutex> lock(turn);
  const std::string problem = check(kernel, dispatch);
  if (!problem.empty()) return finish(dispatch, kernel, {problem});

  machine = Machine();
  machine.kernel = &kernel;
  machine.dispatch = &dispatch;
  machine.entry = entry;
  machine.random = dispatch.seed;
  machine.threads = dispatch.threads[0] * dispatch.threads[1] * dispatch.threads[2];
  machine.buffers.resize(dispatch.buffer_count);
  if (fibers.size() < machine.threads) fibers.resize(machine.threads);
#if MSL_RACE
  msl_race::start(&machine.problems);
#endif
  allocate_threadgroup_memory();
  const std::vector<Copy> copies = copy_buffers();

  std::vector<uint32_t> order(dispatch.grid[0] * dispatch.grid[1] * dispatch.grid[2]);
  shuffle(order.data(), uint32_t(order.size()));
  for (const uint32_t threadgroup : order) {
    if (!machine.is_stopped) run_threadgroup(threadgroup);
  }
  write_back(copies);
#if MSL_RACE
  msl_race::stop();
#endif
  return finish(dispatch, kernel, machine.problems);
}

}  // namespace msl_runtime
