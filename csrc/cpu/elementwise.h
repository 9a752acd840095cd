// What ops on [batch, channels, *sites] tensors share on the host: memory layout of results, evenly spaced sites, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "cpu/element.h"
#include "cpu/tensor.h"

namespace flowkernels {

constexpr int kMaxDims = 12, kMaxSiteAxes = kMaxDims - 2;
constexpr int64_t kTile = 512;   // elements that are transformed at a time
constexpr int64_t kLine = 1024;  // elements that are summed at a time
// Bytes of x from which lines are asked for ahead. Measured beside a 32 MB cache: at 256 MB that saves a sixth of an affine coupling's
// time, forward and backward, at 64 MB nothing. Stores past the caches, which save the read of what is written, were slower: they wait
// where they alternate with arithmetic.
constexpr int64_t kFarBytes = int64_t{128} << 20;

// Axes of a view. Sites that lie evenly in all tensors are one axis, inner_axis; otherwise there are outer ones too.
enum Axis : int { batch_axis, channel_axis, inner_axis, outer_axis, n_axes = inner_axis + kMaxSiteAxes };

// A tensor [batch, channels, *sites], sites folded into axes, of which the first varies fastest.
template <class E>
struct View {
  E* data = nullptr;
  int64_t stride[n_axes] = {};
};

enum class Along { channels, alternate_channels, checkerboard };

// How samples too small to fill a block share one: not at all; where the sites of a sample's channels lie evenly, as rows; by lists of
// the offsets of a checkerboard's sites.
enum class Together { no, rows, lists };

// A map of a part of the elements of [batch, channels, *sites] tensors, element by element, the others passing unchanged; and sums.
template <class E>
struct Elementwise {
  using T = compute_t<E>;
  bool bfloat16;  // what Half stands for
  int64_t batch, channels, transformed;
  int64_t sites, inner, outer[kMaxSiteAxes - 1];  // sites = inner * outer[0] * ...
  int n_outer;
  Along along;
  int64_t phase;      // parity of the first transformed channel, or of the transformed sites
  bool one_site;      // rows are samples
  bool channel_rows;  // channels lie closer together than sites: rows are sites

  int n_inputs, n_outputs;
  View<const E> in[4];  // of the transformed channels
  View<E> out[3];
  View<const E> whole_in, rest_in;  // of the first input: all channels, and those that pass unchanged
  View<E> whole_out, rest_out;      // of the first output

  int n_parameters;
  const T* parameter[3];  // one value for each transformed channel, or one for all, with stride 0
  int64_t parameter_stride[3];
  const T* per_sample;
  int64_t per_sample_stride;

  // Sites are cut into lines: 1024 sites, or for a checkerboard those transformed among 2048 of one height. Terms that the map yields
  // for each element are summed over each line of each channel, into [batch, lines, transformed]. With one site they are summed over
  // groups of samples, into [units, transformed], or over the channels of each sample.
  int n_terms;
  T* sums[2];
  T* sample_sums;

  // what `plan` fills in
  int64_t segments;  // lines of one height
  int64_t lines;     // of a sample
  Together together;
  int64_t of_sample;  // transformed elements
  int64_t samples_of_unit, units;
  bool sums_columns;
  bool far;  // x alone is many times a last-level cache
};

// whether channels follow each other as sites do, in a view of n channels
template <class E, class Element>
bool channels_follow(const Elementwise<E>& args, const View<Element>& view, int64_t n) {
  return n <= 1 || view.stride[channel_axis] == args.sites * view.stride[inner_axis];
}

template <class E>
Together small_samples_of(const Elementwise<E>& args) {
  if (args.one_site || args.channel_rows || args.of_sample > kTile / 2) return Together::no;
  // wider rows are taken apart by vectors
  if (args.along == Along::checkerboard) return args.inner < 16 && args.inner % 2 == 0 ? Together::lists : Together::no;
  bool rows = args.n_outer == 0 && channels_follow(args, args.rest_in, args.channels - args.transformed);
  rows = rows && channels_follow(args, args.rest_out, args.channels - args.transformed);
  for (int i = 0; i < args.n_inputs; ++i) rows = rows && channels_follow(args, args.in[i], args.transformed);
  for (int i = 0; i < args.n_outputs; ++i) rows = rows && channels_follow(args, args.out[i], args.transformed);
  return rows ? Together::rows : Together::no;
}

// How the work is divided, once all else is known. Sums never depend on it: where they go across samples, a unit is a fixed number.
template <class E>
void plan(Elementwise<E>& args, bool sums) {
  args.segments = (args.inner + 2 * kLine - 1) / (2 * kLine);
  args.lines = args.along == Along::checkerboard ? args.outer[0] * args.segments : (args.sites + kLine - 1) / kLine;
  args.of_sample = args.transformed * args.sites / (args.along == Along::checkerboard ? 2 : 1);
  args.together = small_samples_of(args);
  args.samples_of_unit = sums ? kLine : std::max<int64_t>(1, kTile / args.transformed);
  const int64_t units_of_sample = args.together != Together::no ? 1 : args.lines * (args.channel_rows ? 1 : args.transformed);
  args.units = args.one_site ? (args.batch + args.samples_of_unit - 1) / args.samples_of_unit : args.batch * units_of_sample;
  args.sums_columns = sums && (args.one_site || args.channel_rows);
  args.far = args.batch * args.channels * args.sites * static_cast<int64_t>(sizeof(E)) >= kFarBytes;
}

inline torch::stable::Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, torch::headeronly::ScalarType type) {
  return empty_strided(dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)));
}

inline torch::stable::Tensor empty_vector(int64_t n, torch::headeronly::ScalarType type) {
  const int64_t stride = 1;
  return empty_strided(1, &n, &stride, type);
}

// Channels-last for images and volumes whose channels lie closer together than their sites: memory_format_of in ops/_layout.py.
inline bool is_channels_last(const torch::stable::Tensor& t) {
  const int64_t dims = t.dim();
  if (dims < 4 || dims > 5 || t.size(1) <= 1 || t.stride(1) <= 0 || t.is_contiguous()) return false;
  bool any = false;
  for (int64_t d = 2; d < dims; ++d) {
    if (t.size(d) <= 1) continue;
    if (t.stride(d) <= t.stride(1)) return false;
    any = true;
  }
  return any;
}

template <class E>
constexpr torch::headeronly::ScalarType compute_type =
    sizeof(compute_t<E>) == 8 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;

// Uninitialised, of the shape of `like`, in the layout of results.
inline torch::stable::Tensor empty_in_layout_of(const torch::stable::Tensor& like, torch::headeronly::ScalarType type) {
  const int64_t dims = like.dim();
  int64_t sizes[kMaxDims], strides[kMaxDims], next = 1;
  for (int64_t d = 0; d < dims; ++d) sizes[d] = like.size(d);
  const bool channels_last = is_channels_last(like);
  auto place = [&](int64_t d) {
    strides[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  };
  if (channels_last) place(1);
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (d != 1 || !channels_last) place(d);
  }
  return empty_strided(dims, sizes, strides, type);
}
inline torch::stable::Tensor empty_in_layout_of(const torch::stable::Tensor& like) { return empty_in_layout_of(like, like.scalar_type()); }

// the transformed channels of a view of all, or those that pass
template <class E, class Element>
View<Element> part_of(const Elementwise<E>& args, View<Element> view, bool transformed) {
  const int64_t stride = view.stride[channel_axis], passing = args.channels - args.transformed;
  if (args.along == Along::alternate_channels) {
    view.data += (transformed ? args.phase : 1 - args.phase) * stride;
    view.stride[channel_axis] = 2 * stride;
  } else if (args.along == Along::channels && (args.phase == 1) == transformed) {  // what comes second
    view.data += (transformed ? passing : args.transformed) * stride;
  }
  return view;
}

// The sites of several tensors of the same sites, folded into as few axes as all of them allow.
struct Sites {
  int64_t count = 1, inner = 1, outer[kMaxSiteAxes - 1] = {};
  int n_outer = 0;

  // keep: leave the two axes of an image alone
  Sites(const torch::stable::Tensor* const* tensors, int n, bool keep) {
    const int64_t dims = tensors[0]->dim();
    int axes = 0;  // found so far
    int64_t size[kMaxSiteAxes];
    for (int64_t d = dims - 1; d >= 2; --d) {
      const int64_t extent = tensors[0]->size(d);
      count *= extent;
      if (extent == 1 && !keep) continue;
      bool joins = axes > 0 && !keep;
      for (int i = 0; i < n && joins; ++i) joins = tensors[i]->stride(d) == stride_[i][axes - 1] * size[axes - 1];
      if (joins) {
        size[axes - 1] *= extent;
        continue;
      }
      size[axes] = extent;
      for (int i = 0; i < n; ++i) stride_[i][axes] = tensors[i]->stride(d);
      ++axes;
    }
    inner = axes > 0 ? size[0] : 1;
    n_outer = std::max(axes - 1, 0);
    for (int i = 0; i < n_outer; ++i) outer[i] = size[i + 1];
  }

  // of tensor number `index`
  template <class E>
  View<E> view(const torch::stable::Tensor& t, E* data, int index) const {
    View<E> result;
    result.data = data;
    result.stride[batch_axis] = t.stride(0);
    result.stride[channel_axis] = t.stride(1);
    for (int i = 0; i <= n_outer; ++i) result.stride[inner_axis + i] = stride_[index][i];
    return result;
  }

 private:
  static constexpr int kMaxTensors = 8;
  int64_t stride_[kMaxTensors][kMaxSiteAxes] = {};
};

// The first n_whole inputs, and the first output, have all channels; the others the transformed ones.
template <class E>
void set_views(Elementwise<E>& args, const torch::stable::Tensor* const* in, int n_inputs, int n_whole,
               const torch::stable::Tensor* const* out, int n_outputs) {
  const torch::stable::Tensor* all[7];
  std::copy(in, in + n_inputs, all);
  std::copy(out, out + n_outputs, all + n_inputs);
  const Sites sites(all, n_inputs + n_outputs, args.along == Along::checkerboard);
  args.bfloat16 = in[0]->scalar_type() == torch::headeronly::ScalarType::BFloat16;
  args.sites = sites.count;
  args.inner = sites.inner;
  args.n_outer = sites.n_outer;
  std::copy(sites.outer, sites.outer + sites.n_outer, args.outer);
  args.one_site = sites.count == 1 && args.along != Along::checkerboard;
  args.channel_rows = !args.one_site && is_channels_last(*out[0]);
  args.n_inputs = n_inputs;
  args.n_outputs = n_outputs;
  for (int i = 0; i < n_inputs; ++i) {
    const View<const E> view = sites.view(*in[i], data_of<E>(*in[i]), i);
    args.in[i] = i < n_whole ? part_of(args, view, true) : view;
    if (i == 0) args.whole_in = view, args.rest_in = part_of(args, view, false);
  }
  for (int i = 0; i < n_outputs; ++i) {
    const View<E> view = sites.view(*out[i], static_cast<E*>(out[i]->mutable_data_ptr()), n_inputs + i);
    args.out[i] = i == 0 ? part_of(args, view, true) : view;
    if (i == 0) args.whole_out = view, args.rest_out = part_of(args, view, false);
  }
}

}  // namespace flowkernels
