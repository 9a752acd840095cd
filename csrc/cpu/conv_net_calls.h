// From the tensors of Glow's conditioner to what kernels work on: shapes, bands, packed weights. After cpu/for_each_target.h has included
// cpu/conv_net_kernel.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <span>
#include <vector>

#include "cpu/conv_net.h"
#include "cpu/shares.h"
#include "cpu/tensor.h"

namespace flowkernels {

inline void check_conv_net(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::conv_net: ", what); }

// Python has checked what users get wrong; here only what would corrupt memory.
template <class T>
Convolution<T> convolution(const torch::stable::Tensor& weight, int64_t taps, int64_t inputs) {
  check_conv_net(weight.dim() == 4, "weights must have four dimensions");
  return {checked_data<T>("conv_net", weight, {weight.size(0), inputs, taps, taps}), nullptr, taps, inputs, weight.size(0), nullptr};
}

// The parameters of a network, in the order of the schema, but for the gain
template <class T>
ConvNetArgs<T> network(std::span<const torch::stable::Tensor, 6> parameters, int64_t channels) {
  ConvNetArgs<T> args{};
  args.in = convolution<T>(parameters[0], 3, channels);
  args.mid = convolution<T>(parameters[2], 1, args.in.outputs);
  args.out = convolution<T>(parameters[4], 3, args.mid.outputs);
  args.in.bias = checked_data<T>("conv_net", parameters[1], {args.in.outputs});
  args.mid.bias = checked_data<T>("conv_net", parameters[3], {args.mid.outputs});
  args.out.bias = checked_data<T>("conv_net", parameters[5], {args.out.outputs});
  return args;
}

template <class T>
void set_images(ConvNetImages<T>& images, const torch::stable::Tensor& x) {
  check_conv_net(x.dim() == 4 && x.is_cpu() && x.is_contiguous(), "x must be [batch, height, width, channels], contiguous");
  images.batch = x.size(0), images.height = x.size(1), images.width = x.size(2);
}

// Rows of a band: an image, or what fits a thread's part of the last cache, or less where there are fewer images than `tasks`. Smaller bands
// would save less than it costs to compute the rows where they meet twice. channels: of a row
template <class T>
int64_t rows_of(const ConvNetImages<T>& images, int64_t channels, int64_t tasks) {
  constexpr int64_t kBytes = 1 << 22;
  const int64_t fits = std::max<int64_t>(kBytes / ((images.width + 1) * channels * static_cast<int64_t>(sizeof(T))) - 2, 1);
  const int64_t bands = std::max((images.height + fits - 1) / fits, (tasks + images.batch - 1) / images.batch);
  return (images.height + bands - 1) / bands;
}

// How the convolutions of a network, and exp(3 log_gain), are packed. Each thread packs them for itself: to write a line that another has
// read takes many times as long as to pack what is in it.
template <class T>
class Packing {
 public:
  // reverse: for the gradient. outputs: of the network
  template <class Args>
  Packing(const Args& args, bool reverse, int64_t outputs) : reverse_(reverse), outputs_(outputs) {
    size_ = whole(outputs);
    int64_t turned = 0;
    for (const Convolution<T>* c : {&args.in, &args.mid, &args.out}) {
      size_ += FK_DISPATCH(packed_convolution_size<T>(*c));
      turned = std::max(turned, c->taps * c->taps * whole(c->outputs) * (reverse ? 1 : c->inputs));
      places_.emplace_back(reverse ? 0 : c->terms());
      if (!reverse) FK_DISPATCH(find_terms<T>(*c, places_.back().data()));
    }
    turned_ = size_;
    size_ = (size_ + turned + 15) / 16 * 16;
  }

  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }

  // room: of bytes() bytes
  template <class Args>
  void pack(Args& args, const T* log_gain, T* room) const {
    args.gain = room;
    FK_DISPATCH(conv_net_gain<T>(log_gain, outputs_, room));
    T* next = room + whole(outputs_);
    auto place = places_.begin();
    for (Convolution<T>* c : {&args.in, &args.mid, &args.out}) {
      c->packed = next;
      next += FK_DISPATCH(packed_convolution_size<T>(*c));
      if (reverse_)
        FK_DISPATCH(pack_reverse_convolution<T>(*c, room + turned_));
      else
        FK_DISPATCH(pack_convolution<T>(*c, place->data(), room + turned_));
      ++place;
    }
  }

 private:
  static int64_t whole(int64_t n) { return FK_DISPATCH(whole_vectors<T>(n)); }

  bool reverse_;
  int64_t outputs_, size_, turned_;
  std::vector<std::vector<int64_t>> places_;
};

// Sets the rows of a band, and returns the bytes that a band works in, whole cache lines.
template <class T>
size_t plan_bands(ConvNetArgs<T>& args, int64_t tasks) {
  const int64_t hidden = (args.first ? args.mid.inputs : 0) + 3 * args.out.inputs;  // the second layer and its factors, twice as many
  args.rows = rows_of(args, 2 * args.in.inputs + hidden, tasks);
  return (FK_DISPATCH(conv_net_scratch_bytes<T>(args)) + 63) / 64 * 64;
}

// Whether images are worth more than a thread each: bands of one compute the rows where they meet twice.
inline bool share_images(int64_t batch, double multiply_adds) { return multiply_adds > 4 * kParallelMultiplyAdds * static_cast<double>(batch); }

template <class T>
int64_t threads_of(const ConvNetImages<T>& images, std::initializer_list<Convolution<T>> convolutions) {
  double terms = 0;
  for (const Convolution<T>& c : convolutions) terms += static_cast<double>(c.terms() * c.outputs);
  const double work = terms * static_cast<double>(images.batch * images.height * images.width);
  return share_images(images.batch, work) ? threads_for(work) : std::min(threads_for(work), std::max<int64_t>(images.batch, 1));
}

}  // namespace flowkernels
