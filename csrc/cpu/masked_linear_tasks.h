// The sizes of the tasks of a masked linear map's products. Included once per instruction set.

namespace flowkernels {
namespace FK_TARGET {

template <class T>
int64_t panel_width() {
  return kPanel<T>;
}

template <class T>
size_t scratch_bytes() {
  return kChunk * kPanel<T> * sizeof(T);
}

// Inputs of one task: two tasks a thread, of `least` inputs or more, as each packs what it needs of dy; and at most so many that their chunk
// of x takes half a second-level cache, which has 1 MB or more where there are 32 registers
template <class T>
int64_t dweight_rows(int64_t inputs, int64_t threads, int64_t least) {
  constexpr int64_t kMost = FK_REGISTERS >= 32 ? 256 : 128;
  const int64_t even = (inputs + 2 * threads - 1) / (2 * threads);
  return (smaller(even > least ? even : least, kMost) + kUnits - 1) / kUnits * kUnits;
}

template <class T>
size_t dweight_scratch_bytes(int64_t rows) {
  return (kPanels * kPackedPanel<T> + (rows + kUnits - 1) / kUnits * kGroup<T>) * sizeof(T);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
