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

// Tasks of a product, one a thread: fewer where each would have less than `least` inputs, and more where its chunk of x would take over half
// a second-level cache, which has 1 MB or more where there are 32 registers
template <class T>
int64_t dweight_tasks(int64_t inputs, int64_t threads, int64_t least) {
  constexpr int64_t kMost = (FK_REGISTERS >= 32 ? 512 : 256) * 1024 / (kChunk * sizeof(T)), kWidth = 64 / sizeof(T);
  static_assert(kWidth % kUnits == 0);
  const int64_t worth = smaller(threads, inputs / least > 1 ? inputs / least : 1), needed = (inputs + kMost - 1) / kMost;
  return smaller(worth > needed ? worth : needed, (inputs + kWidth - 1) / kWidth);
}

template <class T>
size_t dweight_scratch_bytes(const Stripes& stripes) {
  const int64_t most = (stripes.inputs + stripes.step() - 1) / stripes.step();  // stripes of the first task
  return (kPanels * kPackedPanel<T> + most * stripes.width / kUnits * kGroup<T>) * sizeof(T);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
