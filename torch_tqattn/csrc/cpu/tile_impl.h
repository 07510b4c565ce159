// How attention walks its positions and queries.
//
// Part of kernels_impl.h: compiled once for each instruction set.

constexpr int kMaxTile = 64;
constexpr int kLogitRow = kMaxTile + 16;  // from one row's logits to the next one's

// Calls function with std::integral_constant<int, rows in this group> for groups of at most 4 rows.
template <typename Function>
void for_row_groups(int64_t rows, Function function) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) function(r, std::integral_constant<int, 4>());
  if (rows - r == 3) function(r, std::integral_constant<int, 3>());
  if (rows - r == 2) function(r, std::integral_constant<int, 2>());
  if (rows - r == 1) function(r, std::integral_constant<int, 1>());
}
