// All steps of a level of Glow for CPU tensors: conditioners of conv_net_kernel.h and what glow_step_kernel.h joins. What their gradients will
// ask for is kept if wanted.
//
// A few images at a time pass through all steps: what lies between one kernel and the next stays in a core's caches, and threads meet once
// a level instead of twice a step. Where there are fewer images than threads, all of them share each step.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "cpu/conv_net.h"
#include "cpu/elementwise.h"
#include "cpu/glow_step.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"

#define FK_KERNEL "cpu/glow_steps_targets.h"
#include "cpu/for_each_target.h"

#include "cpu/conv_net_calls.h"

namespace flowkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kParameters = 7;  // of a network

void check(bool ok, const char* what) { STD_TORCH_CHECK(ok, "flowkernels::glow_steps: ", what); }

// What each step's gradients ask for, [steps, batch, height, width, ...]: the rows that its coupling is given, what its network makes of its
// inputs, and the inputs. The first coupling of the inverse, that of the last step, is given x itself. The hidden layers are in the
// networks' arguments.
template <class T>
struct Kept {
  T *rows, *raw, *inputs;  // null where nothing is kept
};

// Images [batch, height, width, channels], contiguous, or, of x, channels first
template <class T>
struct Level {
  int64_t batch, height, width, channels, context_features;
  bool inverse, channels_first;
  const T *x, *context;
  T *y, *logabsdet;
  Kept<T> kept;
  std::vector<ConvNetArgs<T>> networks;
  std::vector<Packing<T>> packings;
  std::vector<const T*> weights, biases, gains;

  int64_t steps() const { return static_cast<int64_t>(weights.size()); }
  int64_t sites() const { return height * width; }
  int64_t image() const { return sites() * channels; }
  int64_t half() const { return channels / 2; }
  int64_t inputs() const { return half() + context_features; }
  // where a step's part of what is kept begins, each pixel having `width` elements
  T* at(T* data, int64_t step, int64_t image, int64_t width) const { return data + (step * batch + image) * sites() * width; }
};

// What a thread works in while a kernel runs: the kernel's own, and a packed network
struct Scratch {
  size_t kernel, packed;  // bytes, whole cache lines
  size_t bytes() const { return kernel + packed; }
};

// Some images on their way through the steps
template <class T>
class Images {
 public:
  static int64_t size(const Level<T>& level, int64_t n) {
    const int64_t tiles = n * ((level.sites() + GlowStepArgs<T>::kRows - 1) / GlowStepArgs<T>::kRows);
    const int64_t input = level.context_features > 0 ? level.inputs() : 0;
    return n * (3 * level.image() + level.sites() * (level.half() + input)) + tiles + n * kDoubles;
  }

  // room: size() elements. threads: for each step. own: what one thread works in; null: each thread its own
  Images(const Level<T>& level, int64_t first, int64_t n, T* room, int64_t threads, const Scratch& scratch, char* own)
      : level_(level), first_(first), n_(n), threads_(threads), scratch_(scratch), own_(own), logs_(reinterpret_cast<double*>(room)),
        rows_(room + n * kDoubles), other_(rows_ + n * level.image()), raw_(other_ + n * level.image()), passing_(raw_ + n * level.image()),
        input_(passing_ + n * level.sites() * level.half()), tile_logs_(input_ + (level.context_features > 0 ? n * level.sites() * level.inputs() : 0)) {
    std::fill(logs_, logs_ + n, 0.0);
  }

  void run() {
    const T* x = level_.x + first_ * level_.image();
    T* const y = level_.y + first_ * level_.image();
    const int64_t steps = level_.steps();
    if (level_.inverse) {
      take_passing(x);
      for (int64_t i = steps - 1; i >= 0; --i) {
        condition(i);
        step(i + 1 == steps ? x : rows(i), i + 1 == steps, raw(i), i, i == 0 ? y : rows(i - 1));
      }
    } else {
      step(x, true, nullptr, 0, rows(0));
      for (int64_t i = 0; i < steps; ++i) {
        condition(i);
        step(rows(i), false, raw(i), i + 1, i + 1 == steps ? y : rows(i + 1));
      }
    }
    for (int64_t b = 0; b < n_; ++b) level_.logabsdet[first_ + b] = static_cast<T>(logs_[b]);
  }

 private:
  static constexpr int64_t kDoubles = sizeof(double) / sizeof(T);

  // run(first, last, what a thread works in)
  template <class F>
  void each(int64_t tasks, const F& run) const {
    if (own_) return run(0, tasks, own_);
    in_shares(tasks, threads_, [&](int64_t first, int64_t last) { run(first, last, static_cast<char*>(thread_scratch(scratch_.bytes()))); });
  }

  // what the coupling of step i is given, and what its network returns
  T* rows(int64_t i) const { return level_.kept.rows ? level_.at(level_.kept.rows, i, first_, level_.channels) : i % 2 ? other_ : rows_; }
  T* raw(int64_t i) const { return level_.kept.raw ? level_.at(level_.kept.raw, i, first_, level_.channels) : raw_; }

  // the first half of x's channels
  void take_passing(const T* x) const {
    const int64_t sites = level_.sites(), half = level_.half();
    const int64_t channel = level_.channels_first ? sites : 1, site = level_.channels_first ? 1 : level_.channels;
    for (int64_t b = 0; b < n_; ++b)
      for (int64_t s = 0; s < sites; ++s)
        for (int64_t c = 0; c < half; ++c) passing_[(b * sites + s) * half + c] = x[b * level_.image() + s * site + c * channel];
  }

  // raw(i), of what passes and the context
  void condition(int64_t i) const {
    ConvNetArgs<T> args = level_.networks[i];
    args.batch = n_;
    args.x = inputs(i);
    args.y = raw(i);
    if (args.first) {
      args.first = level_.at(args.first, 0, first_, args.mid.inputs);
      args.second = level_.at(args.second, 0, first_, args.out.inputs);
    }
    each(args.tasks(), [&](int64_t first, int64_t last, char* scratch) {
      ConvNetArgs<T> own = args;
      level_.packings[i].pack(own, level_.gains[i], reinterpret_cast<T*>(scratch + scratch_.kernel));
      for (int64_t task = first; task < last; ++task) FK_DISPATCH(conv_net_band<T>(own, task, reinterpret_cast<T*>(scratch)));
    });
  }

  const T* inputs(int64_t i) const {
    const int64_t half = level_.half(), width = level_.inputs(), sites = level_.sites();
    if (!level_.kept.inputs && level_.context_features == 0) return passing_;
    T* const made = level_.kept.inputs ? level_.at(level_.kept.inputs, i, first_, width) : input_;
    for (int64_t b = 0; b < n_; ++b) {
      const T* context = level_.context + (first_ + b) * level_.context_features;
      for (int64_t s = b * sites; s < (b + 1) * sites; ++s) {
        std::copy_n(passing_ + s * half, half, made + s * width);
        std::copy_n(context, level_.context_features, made + s * width + half);
      }
    }
    return made;
  }

  // matrix: of step `matrix`; none beyond the last
  void step(const T* from, bool of_x, const T* raw, int64_t matrix, T* to) const {
    GlowStepArgs<T> args{};
    args.batch = n_, args.sites = level_.sites(), args.channels = level_.channels;
    args.inverse = level_.inverse, args.channels_first = of_x && level_.channels_first;
    args.x = from, args.raw = raw;
    if (matrix < level_.steps()) args.weight = level_.weights[matrix], args.bias = level_.biases[matrix];
    args.y = to, args.passing = passing_, args.tile_logs = tile_logs_;
    each(args.tiles(), [&](int64_t first, int64_t last, char* scratch) { FK_DISPATCH(run_glow_step<T>(args, scratch, false, first, last)); });
    if (!raw) return;
    const int64_t of_sample = args.tiles_of_sample();
    for (int64_t b = 0; b < n_; ++b)
      for (int64_t t = 0; t < of_sample; ++t) logs_[b] += tile_logs_[b * of_sample + t];
  }

  const Level<T>& level_;
  const int64_t first_, n_, threads_;
  const Scratch scratch_;
  char* const own_;
  double* const logs_;
  T *const rows_, *const other_, *const raw_, *const passing_, *const input_, *const tile_logs_;
};

template <class T>
void run(Level<T>& level) {
  // Of the rows of a group of images, which stay in the second-level cache beside a step's weights: those are packed once for each group.
  constexpr int64_t kBytes = 1 << 19;
  double work = 0;
  for (const ConvNetArgs<T>& network : level.networks)
    for (const Convolution<T>* c : {&network.in, &network.mid, &network.out}) work += static_cast<double>(c->terms() * c->outputs);
  work *= static_cast<double>(level.batch * level.sites());
  const int64_t threads = threads_for(work);
  // images, rather than parts of a step, to each thread
  const bool apart = level.batch >= threads || !share_images(level.batch, work / static_cast<double>(level.steps()));

  Scratch scratch{(FK_DISPATCH(glow_step_scratch<T>(level.channels, false)) + 63) / 64 * 64, 0};
  for (ConvNetArgs<T>& network : level.networks) {
    network.batch = level.batch, network.height = level.height, network.width = level.width;
    level.packings.emplace_back(network, false, level.channels);
    scratch.kernel = std::max(scratch.kernel, plan_bands(network, apart ? 1 : threads));
    scratch.packed = std::max(scratch.packed, level.packings.back().bytes());
  }

  if (!apart) {
    const std::unique_ptr<T[]> room(new T[Images<T>::size(level, level.batch)]);
    return Images<T>(level, 0, level.batch, room.get(), threads, scratch, nullptr).run();
  }
  const int64_t bytes_of_all = Images<T>::size(level, level.batch) * static_cast<int64_t>(sizeof(T));
  const int64_t least = std::max(threads, (bytes_of_all + kBytes - 1) / kBytes);
  const int64_t groups = std::min(level.batch, (least + threads - 1) / threads * threads);
  const int64_t most = (level.batch + groups - 1) / groups;
  const size_t bytes = scratch.bytes() + Images<T>::size(level, most) * sizeof(T);
  for_each_task(groups, threads, [&](int64_t group) {
    const int64_t first = group * level.batch / groups, n = (group + 1) * level.batch / groups - first;
    char* const own = static_cast<char*>(thread_scratch(bytes));
    Images<T>(level, first, n, reinterpret_cast<T*>(own + scratch.bytes()), 1, scratch, own).run();
  });
}

using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// y, log|det| of the couplings, and if `keep` what Kept is and the hidden layers, else empty tensors
template <class T>
std::vector<Tensor> run_level(const Tensor& x, const Maybe& context, const Tensors& networks, const Tensors& weights, const Tensors& biases,
                              bool inverse, bool keep) {
  check(x.dim() == 4 && x.is_cpu() && x.size(3) >= 2 && x.size(3) % 2 == 0, "x must be [batch, height, width, channels], an even number of them");
  const size_t steps = weights.size();
  check(steps > 0 && biases.size() == steps && networks.size() == steps * kParameters, "every step must have a network, a weight and a bias");
  Level<T> level{};
  level.batch = x.size(0), level.height = x.size(1), level.width = x.size(2), level.channels = x.size(3);
  level.inverse = inverse;
  level.channels_first = !x.is_contiguous();
  check(!level.channels_first || channels_lie_first(x), "x must be contiguous, channels first or last");
  level.x = data_of<T>(x);
  if (context) {
    check(context->dim() == 2, "context must be [batch, features]");
    level.context_features = context->size(1);
    level.context = checked_data<T>("glow_steps", *context, {level.batch, level.context_features});
  }
  for (size_t i = 0; i < steps; ++i) {
    const std::span<const Tensor, kParameters> parameters(networks.data() + i * kParameters, kParameters);
    level.networks.push_back(network<T>(parameters.template first<6>(), level.inputs()));
    const ConvNetArgs<T>& made = level.networks.back();
    check(made.in.outputs > 0 && made.mid.outputs > 0 && made.out.outputs == level.channels, "a network does not fit x");
    check(!keep || (made.in.outputs == level.networks[0].in.outputs && made.mid.outputs == level.networks[0].mid.outputs),
          "where a gradient is asked for, all networks must have hidden layers of the same widths");
    level.gains.push_back(checked_data<T>("glow_steps", parameters[6], {level.channels}));
    level.weights.push_back(checked_data<T>("glow_steps", weights[i], {level.channels, level.channels}));
    level.biases.push_back(checked_data<T>("glow_steps", biases[i], {level.channels}));
  }
  Tensor y = empty(x, sizes_of(x)), logabsdet = empty(x, {level.batch});
  std::vector<Tensor> made{y, logabsdet};
  const auto keeps = [&](int64_t width, int64_t steps) {
    made.push_back(empty(x, {keep ? steps : 0, level.batch, level.height, level.width, width}));
    return keep ? static_cast<T*>(made.back().mutable_data_ptr()) : nullptr;
  };
  const int64_t all = level.steps();
  T* const rows = keeps(level.channels, inverse ? all - 1 : all);
  T* const raw = keeps(level.channels, all);
  T* const inputs = keeps(level.inputs(), all);
  T* const first = keeps(level.networks[0].mid.inputs, all);
  T* const second = keeps(level.networks[0].out.inputs, all);
  if (y.numel() == 0) {
    std::fill_n(static_cast<T*>(logabsdet.mutable_data_ptr()), level.batch, T(0));
    return made;
  }
  level.kept = {rows, raw, inputs};
  for (size_t i = 0; i < steps && keep; ++i) {
    ConvNetArgs<T>& network = level.networks[i];
    network.first = level.at(first, i, 0, network.mid.inputs), network.second = level.at(second, i, 0, network.out.inputs);
  }
  level.y = static_cast<T*>(y.mutable_data_ptr());
  level.logabsdet = static_cast<T*>(logabsdet.mutable_data_ptr());
  run<T>(level);
  return made;
}

std::vector<Tensor> run_level(const Tensor& x, Maybe context, Tensors networks, Tensors weights, Tensors biases, bool inverse, bool keep) {
  for (Tensors* tensors : {&networks, &weights, &biases})
    for (Tensor& t : *tensors) t = made_contiguous(t);
  if (context) context = made_contiguous(*context);
  if (x.scalar_type() == ScalarType::Double) return run_level<double>(x, context, networks, weights, biases, inverse, keep);
  check(x.scalar_type() == ScalarType::Float, "x must be float32 or float64");
  return run_level<float>(x, context, networks, weights, biases, inverse, keep);
}

std::tuple<Tensor, Tensor> glow_steps(const Tensor& x, Maybe context, Tensors networks, Tensors weights, Tensors biases, bool inverse) {
  const std::vector<Tensor> made = run_level(x, context, networks, weights, biases, inverse, false);
  return {made[0], made[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> glow_steps_training(const Tensor& x, Maybe context, Tensors networks,
                                                                                       Tensors weights, Tensors biases, bool inverse) {
  const std::vector<Tensor> made = run_level(x, context, networks, weights, biases, inverse, true);
  return {made[0], made[1], made[2], made[3], made[4], made[5], made[6]};
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  if (flowkernels::hardware_target() == flowkernels::Target::none) return;
  m.impl("glow_steps", TORCH_BOX(&flowkernels::glow_steps));
  m.impl("glow_steps_training", TORCH_BOX(&flowkernels::glow_steps_training));
}
