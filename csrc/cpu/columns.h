// Matrices whose rows become columns and back, where lanes are rows. Included once per instruction set, after simd.h.
//
// `position` names the place of each column on the other side; null leaves them where they are.

namespace flowkernels {
namespace FK_TARGET {

template <class T>
FK_INLINE Vec<T> load_some(const T* p, int64_t n) {
  return n >= lanes<T> ? load(p) : load_partial(p, static_cast<int>(n));
}
template <class T>
FK_INLINE void store_some(T* p, Vec<T> v, int64_t n) {
  n >= lanes<T> ? store(p, v) : store_partial(p, v, static_cast<int>(n));
}

// to[position of c][r] = from[r][c] for n rows; zeros behind them, up to `rows`, which is a whole number of vectors
template <class T>
void read_columns(const T* from, int64_t ld, int64_t n, int64_t columns, const int64_t* position, T* to, int64_t rows) {
  for (int64_t r = 0; r < rows; r += lanes<T>)
    for (int64_t c = 0; c < columns; c += lanes<T>) {
      Vec<T> block[lanes<T>];
      for (int i = 0; i < lanes<T>; ++i) block[i] = r + i < n ? load_some(from + (r + i) * ld + c, columns - c) : zero<T>();
      transpose(block);
      for (int i = 0; i < lanes<T> && c + i < columns; ++i) store(to + (position ? position[c + i] : c + i) * rows + r, block[i]);
    }
}

// to[r][c] = from[position of c][r] for n rows
template <class T>
void write_columns(const T* from, int64_t rows, int64_t n, int64_t columns, const int64_t* position, T* to, int64_t ld) {
  // rows of less than a vector, one behind the other: what is stored beyond a row, the next one stores anew
  const int64_t whole = kSlowPartialStores && columns < lanes<T> && ld == columns ? n - (lanes<T> + columns - 1) / columns + 1 : 0;
  for (int64_t r = 0; r < n; r += lanes<T>)
    for (int64_t c = 0; c < columns; c += lanes<T>) {
      Vec<T> block[lanes<T>];
      for (int i = 0; i < lanes<T>; ++i) block[i] = c + i < columns ? load(from + (position ? position[c + i] : c + i) * rows + r) : zero<T>();
      transpose(block);
      for (int i = 0; i < lanes<T> && r + i < n; ++i) {
        T* at = to + (r + i) * ld + c;
        if (r + i < whole)
          store(at, block[i]);
        else
          store_some(at, block[i], columns - c);
      }
    }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
