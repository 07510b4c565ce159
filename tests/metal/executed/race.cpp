#include "race.h"

#include <dlfcn.h>

#include <algorithm>
#include <set>

#include "kernel_abi.h"

namespace msl_race {
namespace {

struct Access {
  uint32_t threadgroup = 0;  // 0: none
  uint32_t thread = 0, barriers = 0, any_barriers = 0;
  uintptr_t code = 0;

  uint32_t simdgroup() const { return thread / MSL_SIMD_WIDTH; }
};

// Of one byte: the last write, and of the reads since then those that nothing later is ordered after.
struct Shadow {
  Access write, read;
  bool by_many_lanes = false, by_many_simdgroups = false, by_many_threadgroups = false;
};

struct Region {
  char *first, *end;
  Memory memory;
  std::string name;
  std::vector<Shadow> bytes;
};

std::vector<Region> regions;
std::vector<std::string>* problems;
std::set<std::pair<uintptr_t, uintptr_t>> seen;
const Thread* current;
constexpr size_t kMaxProblems = 20;

// runner.py replaces code addresses, {+0x...}, by source lines.
std::string code_name(uintptr_t code) {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(code), &info);
  char text[32];
  snprintf(text, sizeof text, "{+0x%zx}", size_t(code - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  return text;
}

std::string thread_name(const Access& access) {
  return "thread " + std::to_string(access.thread) + " of threadgroup " + std::to_string(access.threadgroup - 1);
}

void report(const Region& region, const char* address, const std::string& text, uintptr_t code, uintptr_t other) {
  if (problems->size() >= kMaxProblems || !seen.insert({code, other}).second) return;
  problems->push_back(text + " (" + region.name + ", byte " + std::to_string(address - region.first) + ")");
}

void report_race(const Region& region, const char* address, const char* verb, const Access& now, const char* other_verb,
                 const Access& other) {
  report(region, address,
         "race: " + thread_name(now) + " " + verb + " at " + code_name(now.code) + " what " + thread_name(other) + " " +
             other_verb + " at " + code_name(other.code),
         now.code, other.code);
}

bool is_ordered(const Access& before, const Access& now) {
  if (before.threadgroup == 0) return true;
  if (before.threadgroup != now.threadgroup) return false;
  if (before.thread == now.thread || before.barriers != now.barriers) return true;
  return before.simdgroup() == now.simdgroup() && before.any_barriers != now.any_barriers;
}

bool is_write_ordered_after_reads(const Shadow& shadow, const Access& now) {
  const Access& read = shadow.read;
  if (read.threadgroup == 0) return true;
  if (shadow.by_many_threadgroups || read.threadgroup != now.threadgroup) return false;
  if (read.barriers != now.barriers) return true;
  if (shadow.by_many_simdgroups || read.simdgroup() != now.simdgroup()) return false;
  if (read.any_barriers != now.any_barriers) return true;
  return !shadow.by_many_lanes && read.thread == now.thread;
}

void note_read(Shadow& shadow, const Access& now) {
  const Access& last = shadow.read;
  if (last.threadgroup != 0 && last.threadgroup != now.threadgroup) shadow.by_many_threadgroups = true;
  const bool is_same_interval = last.threadgroup == now.threadgroup && last.barriers == now.barriers;
  shadow.by_many_simdgroups = is_same_interval && (shadow.by_many_simdgroups || last.simdgroup() != now.simdgroup());
  shadow.by_many_lanes = is_same_interval && last.simdgroup() == now.simdgroup() &&
                         last.any_barriers == now.any_barriers && (shadow.by_many_lanes || last.thread != now.thread);
  shadow.read = now;
}

void check_byte(Region& region, char* address, bool is_write, const Access& now) {
  Shadow& shadow = region.bytes[size_t(address - region.first)];
  if (!is_write && region.memory == kThreadgroup && shadow.write.threadgroup == 0) {
    report(region, address, thread_name(now) + " reads what nobody has written at " + code_name(now.code), now.code, 0);
    return;
  }
  if (!is_ordered(shadow.write, now)) {
    report_race(region, address, is_write ? "writes" : "reads", now, "wrote", shadow.write);
  }
  if (is_write) {
    if (!is_write_ordered_after_reads(shadow, now)) report_race(region, address, "writes", now, "read", shadow.read);
    shadow = Shadow();
    shadow.write = now;
  } else {
    note_read(shadow, now);
  }
}

void check(void* pointer, size_t size, bool is_write, void* code) {
  if (current == nullptr) return;
  char* const address = static_cast<char*>(pointer);
  for (Region& region : regions) {
    if (address + size <= region.first - kGuard || address >= region.end + kGuard) continue;
    const Access now = {current->threadgroup, current->index, current->clock.threadgroup[region.memory],
                        current->clock.any[region.memory], reinterpret_cast<uintptr_t>(code)};
    if (address < region.first || address + size > region.end) {
      report(region, address, "out of bounds: " + thread_name(now) + " at " + code_name(now.code), now.code, 1);
      return;
    }
    for (size_t i = 0; i < size; ++i) check_byte(region, address + i, is_write, now);
    return;
  }
}

}  // namespace

void start(std::vector<std::string>* problems_found) {
  regions.clear();
  seen.clear();
  problems = problems_found;
}

void stop() { regions.clear(); }

void add_region(char* first, size_t bytes, Memory memory, const std::string& name) {
  for (const Region& region : regions) {
    if (region.first == first) return;
  }
  regions.push_back({first, first + bytes, memory, name, std::vector<Shadow>(bytes)});
}

void start_threadgroup() {
  for (Region& region : regions) {
    if (region.memory == kThreadgroup) region.bytes.assign(region.bytes.size(), Shadow());
  }
}

void run_thread(const Thread* thread) { current = thread; }

}  // namespace msl_race

extern "C" {
#define HOOK(name, size, is_write) \
  void __tsan_##name(void* address) { msl_race::check(address, size, is_write, __builtin_return_address(0)); }
#define HOOKS(size)                       \
  HOOK(read##size, size, false)           \
  HOOK(write##size, size, true)           \
  HOOK(unaligned_read##size, size, false) \
  HOOK(unaligned_write##size, size, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
#define RANGE_HOOK(name, is_write)                                         \
  void __tsan_##name(void* address, size_t size) {                         \
    msl_race::check(address, size, is_write, __builtin_return_address(0)); \
  }
RANGE_HOOK(read_range, false)
RANGE_HOOK(write_range, true)
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  msl_race::check(const_cast<void*>(from), size, false, __builtin_return_address(0));
  msl_race::check(to, size, true, __builtin_return_address(0));
  return __builtin_memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) {
  msl_race::check(const_cast<void*>(from), size, false, __builtin_return_address(0));
  msl_race::check(to, size, true, __builtin_return_address(0));
  return __builtin_memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  msl_race::check(to, size, true, __builtin_return_address(0));
  return __builtin_memset(to, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
