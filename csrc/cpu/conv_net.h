// What Glow's conditioner works on, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

// A convolution of channels-last images with `taps` x `taps` weights, the sides padded with zeros
template <class T>
struct Convolution {
  const T *weight, *bias;  // [outputs, terms] and [outputs]; a term is a row of taps, a column of it and an input channel
  int64_t taps, inputs, outputs;
  T* packed;  // the weight as tiles read it, see pack_convolution

  int64_t row_terms() const { return taps * inputs; }
  int64_t terms() const { return taps * row_terms(); }
};

// y = exp(3 log_gain) * (out * relu(mid * relu(in * x))), with * the three convolutions of 3, 1 and 3 taps and their biases. A task is a
// band of `rows` rows of one image, fewer at its end, with a row more of the hidden layers above and below.
template <class T>
struct ConvNetArgs {
  const T *x, *log_gain;  // [batch, height, width, channels]
  T* y;                   // [batch, height, width, outputs]
  int64_t batch, height, width, rows;
  Convolution<T> in, mid, out;
  T* gain;  // exp(3 log_gain), whole vectors

  int64_t bands() const { return (height + rows - 1) / rows; }
};

}  // namespace flowkernels
