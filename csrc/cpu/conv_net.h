// What Glow's conditioner works on, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

// A convolution of channels-last images with `taps` x `taps` weights, the sides padded with zeros
template <class T>
struct Convolution {
  const T *weight, *bias;  // [outputs, inputs, taps, taps] and [outputs]
  int64_t taps, inputs, outputs;
  T* packed;  // the weight as tiles read it, see pack_convolution

  int64_t terms() const { return taps * taps * inputs; }
  int64_t packed_terms() const { return taps == 3 ? 4 * taps * inputs : inputs; }  // four factors for a row of three taps
};

// y = gain * (out * relu(mid * relu(in * x))), with * the three convolutions of 3, 1 and 3 taps and their biases, on images that lie channels
// last. A band is `rows` rows of one image, fewer at its end; it needs a row more of the hidden layers above and below.
template <class T>
struct ConvNetImages {
  int64_t batch, height, width, rows;

  int64_t bands() const { return (height + rows - 1) / rows; }
  int64_t tasks() const { return batch * bands(); }
};

template <class T>
struct ConvNetArgs : ConvNetImages<T> {
  const T* x;
  T *y, *first, *second;  // the hidden layers, where they are kept for a gradient, or null
  Convolution<T> in, mid, out;
  const T* gain;  // whole vectors
};

// The gradient. The convolutions are those that carry it down, with inputs and outputs exchanged and taps in reverse. Sums over positions
// are made part by part; a part is some tasks, one after another.
template <class T>
struct ConvNetGradientArgs : ConvNetImages<T> {
  const T *x, *dy, *first, *second, *gain;
  T* dx;
  Convolution<T> out, mid, in;
  T* sums;  // [parts][places().end], or null where x's gradient alone is wanted

  // Where the sums for each parameter begin, and the end; those for the first weight lie [packed term][output], for the last one
  // [output][packed term], terms being [row of taps][factor][input]
  struct Places {
    int64_t weight_out, weight_mid, weight_in, bias_out, bias_mid, bias_in, end;
  };
  Places places() const {
    Places at{};
    at.weight_mid = out.packed_terms() * out.outputs;
    at.weight_in = at.weight_mid + mid.packed_terms() * mid.outputs;
    at.bias_out = at.weight_in + in.packed_terms() * in.outputs;
    at.bias_mid = at.bias_out + out.inputs;
    at.bias_in = at.bias_mid + mid.inputs;
    at.end = at.bias_in + in.inputs;
    return at;
  }
};

}  // namespace flowkernels
