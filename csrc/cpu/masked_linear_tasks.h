// The products of a masked linear map and the sizes of their tasks, for masked_linear.cpp. Included once per instruction set.


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

// Inputs of one task: at most so many that their chunk of x takes half a second-level cache, which has 1 MB or more where there are 32
// registers; two tasks a thread where there are fewer.
template <class T>
int64_t dweight_rows(int64_t inputs, int64_t threads) {
  const int64_t even = (inputs + 2 * threads - 1) / (2 * threads);
  return (smaller(even, FK_REGISTERS >= 32 ? 256 : 128) + kUnits - 1) / kUnits * kUnits;
}

template <class T>
size_t dweight_scratch_bytes(int64_t rows) {
  return (kPanels * kPackedPanel<T> + (rows + kUnits - 1) / kUnits * kGroup<T>) * sizeof(T);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
