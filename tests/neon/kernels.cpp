// Runs the CPU kernels that have no instruction set of x86-64, on made-up caches, and writes all results to a file. The
// same program for arm64, where they use NEON, has to write the same numbers.
#include "cpu/kernels.h"

#include <cstdio>
#include <cstring>
#include <vector>

namespace {

using namespace tqattn;
using namespace tqattn::cpu;

constexpr int kSlots = 288, kSinks = 4, kFirst = 3, kBlock = 32, kTail = 64, kCoded = 256, kLength = 290;

uint64_t state = 1;

uint32_t random_bits() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(state >> 33);
}

std::vector<float> numbers(size_t count, float scale = 1.0f, float offset = 0.0f) {
  std::vector<float> out(count);
  for (float& x : out) x = (static_cast<float>(random_bits()) / 2147483648.0f - 0.5f) * scale + offset;
  return out;
}

std::vector<c10::Half> halves(size_t count) {
  std::vector<c10::Half> out;
  for (float x : numbers(count)) out.push_back(c10::Half(x));
  return out;
}

template <typename T>
void write(std::FILE* file, const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), file);
}

// One side of a cache, full of anything.
struct Store {
  std::vector<uint8_t> codes;
  std::vector<float> norms;
  std::vector<c10::Half> means, tail;
  HeadStore head{};

  Store(const StorageFormat& format, const Codebook* codebook, int64_t head_dim)
      : norms(numbers(kSlots * norm_groups(head_dim), 0.2f, 0.5f)),
        means(halves(kSlots / kBlock * head_dim)),
        tail(halves((kSinks + kTail) * head_dim)) {
    if (format.is_coded()) {
      codes.resize(kSlots * format.row_bytes(head_dim));
      for (uint8_t& code : codes) code = static_cast<uint8_t>(random_bits());
    } else {
      const std::vector<c10::Half> dense = halves(kSlots * head_dim);
      codes.resize(dense.size() * 2);
      std::memcpy(codes.data(), dense.data(), codes.size());
    }
    head = {codes.data(),
            norms.data(),
            means.data(),
            tail.data(),
            kFirst,
            &format,
            codebook,
            codebook != nullptr ? &level_table(*codebook) : nullptr,
            format.is_coded() ? format.row_bytes(head_dim) : head_dim * 2,
            1.0f};
  }
};

TqAttendParams attend_params(int64_t head_dim, float softcap) {
  TqAttendParams params{};
  params.head_dim = static_cast<uint32_t>(head_dim);
  params.slots = kSlots;
  params.tail_slots = kTail;
  params.sink_length = kSinks;
  params.block_size = kBlock;
  params.coded = kCoded;
  params.length = kLength;
  params.softcap = softcap;
  return params;
}

void run_attend(std::FILE* file, const HeadStore& store, int64_t head_dim, int64_t rows) {
  const TqAttendParams params = attend_params(head_dim, rows == 3 ? 5.0f : 0.0f);
  const std::vector<float> q = numbers(rows * head_dim);
  std::vector<float> out(rows * head_dim), sums(rows * 2);
  std::vector<int64_t> begin(rows, kFirst), end(rows, kLength);
  begin[rows / 2] = 40;
  end[rows - 1] = 200;
  AttendTask task{&params,      store,      store,   q.data(),   rows,        3,        kFirst, kLength,
                  begin.data(), end.data(), nullptr, out.data(), sums.data(), head_dim, 2};
  baseline_kernels().attend(task);
  write(file, out);
  write(file, sums);
}

void run_encode(std::FILE* file, const HeadStore& store, int64_t head_dim, Encode encode) {
  const std::vector<float> x = numbers(kBlock * head_dim);
  const EncodeTask task{store,  x.data(), InputType::kFloat, head_dim, kBlock, 2 * kBlock, head_dim, kSlots, kTail, 0,
                        kBlock, encode};
  std::vector<c10::Half> gathered(kBlock * head_dim);
  baseline_kernels().encode(task, kBlock, 2 * kBlock, gathered.data());
  std::vector<float> decoded((kLength - kFirst) * head_dim);
  baseline_kernels().decode(store, attend_params(head_dim, 0.0f), kFirst, kLength, decoded.data());
  write(file, decoded);
}

void run_all(std::FILE* file, const StorageFormat& format, const Codebook* codebook) {
  for (const int64_t head_dim : {64, 80, 96, 128, 192, 256, 512}) {
    Store store(format, codebook, head_dim);
    for (const int64_t rows : {1, 2, 3, 4, 7, 20}) run_attend(file, store.head, head_dim, rows);
    // Plain: the codebooks of exact levels have no other way.
    run_encode(file, store.head, head_dim, codebook != nullptr && codebook->integers ? Encode::kFast : Encode::kPlain);
    const std::vector<float> x = numbers(3 * head_dim);
    std::vector<float> rotated(x.size());
    for (const bool inverse : {false, true}) {
      baseline_kernels().rotate(x.data(), rotated.data(), 3, head_dim, inverse, 1.5f);
      write(file, rotated);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::FILE* file = count == 2 ? std::fopen(arguments[1], "wb") : nullptr;
  if (file == nullptr) return 1;
  std::puts(baseline_kernels().name);
  for (const char* name : {"f16", "tq2", "tq3", "tq4", "tq5", "tq6", "tq8", "tq5-byte", "tq6-byte"}) {
    const StorageFormat& format = find_format(name);
    run_all(file, format, format.is_coded() ? &format_codebook(format.bits) : nullptr);
  }
  for (const int bits : {4, 5, 6, 8}) run_all(file, find_format(bits == 4 ? "tq4" : "tq8"), &exact_codebook(bits));
  return std::fclose(file);
}
