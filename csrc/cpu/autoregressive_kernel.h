// The fused sequential loop. Included once per instruction set (for_each_target.h), after staircase_kernel.h.
//
// The steps are visited by recursion: run(a, b) runs the first half of the steps, pushes what it produced into the pending sums of
// the second half as dense blocks, and runs the second half. Each weight inside the staircase is used once, nearly all of them in
// large blocks, at every size and without a panel width to choose; each sum still receives its inputs in ascending order.
// Two forms of the state, RowLanes and UnitLanes, differ in what the lanes of a vector hold, and give the same bits.

namespace flowkernels {
namespace FK_TARGET {

template <class T>
FK_INLINE ValueAndLog<Vec<T>> transform(const AutoregressiveArgs<T>& args, Vec<T> x, Vec<T> shift, Vec<T> raw) {
  const Form form = static_cast<Form>(args.form);
  return args.inverse ? invert_form(form, args.scale, x, shift, raw) : apply_form(form, args.scale, x, shift, raw);
}

// x of n rows, one feature's; log_of(r, log-derivative)
template <class T, class Shift, class Raw, class Log>
FK_INLINE void transform_rows(const AutoregressiveArgs<T>& args, T* x, int64_t n, const Shift& shift, const Raw& raw, const Log& log_of) {
  const Form form = static_cast<Form>(args.form);
  const bool inverse = args.inverse;
  with_scale_map<Vec<T>>(args.scale, [&](const auto& map) {
    for (int64_t r = 0; r < n; r += lanes<T>) {
      const Vec<T> from = load(x + r), by = shift(r);
      const FormScale<Vec<T>> scale = form_scale(map, form, inverse, raw(r));
      store(x + r, transform_scale(form, inverse, scale, from, by));
      log_of(r, scale.log);
    }
  });
}

// adds the log-derivative of the p-th feature
template <class T>
FK_INLINE void add_log(T* chunk, T* total, Vec<T> log_derivative, int64_t p) {
  if (p % kLogChunk == 0) {
    store(total, load(total) + load(chunk));
    store(chunk, log_derivative);
  } else {
    store(chunk, load(chunk) + log_derivative);
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels

#include "cpu/autoregressive_rows.h"
#include "cpu/autoregressive_units.h"

namespace flowkernels {
namespace FK_TARGET {

// units of layer l known after step s, and before it; layer 0 is the features
template <class T>
FK_INLINE int64_t step_end(const AutoregressiveArgs<T>& args, int64_t s, int l) {
  return args.ends[s * (args.n_layers + 1) + l];
}
template <class T>
FK_INLINE int64_t step_begin(const AutoregressiveArgs<T>& args, int64_t s, int l) {
  return s == 0 ? 0 : step_end(args, s - 1, l);
}

// One step: the hidden units that the newest features complete, layer by layer, then the features that those complete. Units read what
// has become known since step `from` at once, so that their sums are loaded and stored once for several steps.
template <class State, class T>
void run_step(State& state, const AutoregressiveArgs<T>& args, int64_t s, int64_t from) {
  for (int l = 1; l <= args.n_layers; ++l) {
    const int64_t j0 = step_begin(args, s, l), j1 = step_end(args, s, l);
    if (j0 == j1) continue;
    const int source = args.layers[l - 1].source;
    const int64_t k0 = step_begin(args, from, source), k1 = step_end(args, s, source);
    if (l < args.n_layers && state.push_and_finish(l, k0, k1, j0, j1)) continue;
    state.push_layer(l, k0, k1, j0, j1);
    if (l < args.n_layers)
      state.finish_hidden(l, j0, j1);
    else
      state.finish_features(args.output_columns.features_in(j0), args.output_columns.features_in(j1));
  }
}

// The same where lanes are units: what has become known is pushed at once into all units up to the end of the last step, so that the units
// of the next step wait for the newest values alone.
template <class State, class T>
void run_step_ahead(State& state, const AutoregressiveArgs<T>& args, int64_t s, int64_t last) {
  for (int l = 1; l <= args.n_layers && s < last; ++l) {
    const int source = args.layers[l - 1].source;
    state.fetch_layer(l, step_begin(args, s + 1, source), step_end(args, s + 1, source), step_begin(args, s + 1, l), step_end(args, last, l));
  }
  for (int l = 1; l <= args.n_layers; ++l) {
    const int64_t j0 = step_begin(args, s, l), j1 = step_end(args, s, l);
    const int source = args.layers[l - 1].source;
    state.push_layer(l, step_begin(args, s, source), step_end(args, s, source), j0, step_end(args, last, l));
    if (j0 == j1) continue;
    if (l < args.n_layers)
      state.finish_hidden(l, j0, j1);
    else
      state.finish_features(args.output_columns.features_in(j0), args.output_columns.features_in(j1));
  }
}

template <class State, class T>
void run_steps(State& state, const AutoregressiveArgs<T>& args, int64_t a, int64_t b) {
  if (b - a <= State::kFewSteps) {
    for (int64_t s = a; s < b; ++s) {
      if constexpr (State::kPushesAhead)
        run_step_ahead(state, args, s, b - 1);
      else
        run_step(state, args, s, a);
    }
    return;
  }
  const int64_t middle = a + (b - a) / 2;
  run_steps(state, args, a, middle);
  for (int l = 1; l <= args.n_layers; ++l) {
    const int source = args.layers[l - 1].source;
    state.push_layer(l, step_begin(args, a, source), step_end(args, middle - 1, source), step_end(args, middle - 1, l), step_end(args, b - 1, l));
  }
  run_steps(state, args, middle, b);
}

template <class State, class T>
void run_all_steps(State& state, const AutoregressiveArgs<T>& args) {
  if (args.n_steps) run_steps(state, args, int64_t(0), args.n_steps);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
