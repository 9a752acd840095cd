// The order in which an elementwise map's blocks are done, chosen by the memory layout, and its sums, whose order is not. No include
// guard.
//
// Units of work may run anywhere: groups of samples where there is one site, else lines of sites, of all channels or of one. Each
// channel of each line has one sum, in the order of sum_16; with one site each sample has.

#include "cpu/blocks.h"

namespace flowkernels {
namespace FK_TARGET {

template <class E>
class Walk {
  using T = compute_t<E>;

 public:
  // columns: room for n_terms * 16 * transformed elements where args.sums_columns
  Walk(const Elementwise<E>& a, const TileMap<T>& map, T* columns) : args(a), blocks_(a, map), columns_(columns) {}

  void run(int64_t first, int64_t last) {
    if (args.one_site) {
      const int64_t each = args.samples_of_unit;
      if (args.sums[0] == nullptr) return samples(first * each, smaller(last * each, args.batch));
      for (int64_t u = first; u < last; ++u) {
        clear_columns();
        samples(u * each, smaller((u + 1) * each, args.batch));
        finish_columns(u);
      }
      return;
    }
    if (args.together != Together::no) return small_samples(first, last);
    const int64_t n_lines = args.lines;
    while (first < last) {
      const int64_t sample = n_lines * (args.channel_rows ? 1 : args.transformed), b = first / sample;
      const int64_t begin = first - b * sample, end = smaller(last - b * sample, sample);
      if (args.channel_rows) {
        for (int64_t l = begin; l < end; ++l) line_of_all_channels(b, l);
      } else if (n_lines == 1 && args.along != Along::checkerboard) {
        line_of_channels(b, begin, end, 0);
      } else if (args.along == Along::checkerboard) {
        checkered_lines(b, begin, end);
      } else {
        for (int64_t u = begin; u < end; ++u) line_of_channels(b, u / n_lines, u / n_lines + 1, u % n_lines);
      }
      first = b * sample + end;
    }
  }

 private:
  int64_t passing() const { return args.along == Along::checkerboard ? 0 : args.channels - args.transformed; }

  // ---- one site: rows are samples

  void samples(int64_t first, int64_t last) {
    const int64_t n = args.transformed, most = n >= kTile ? 1 : kTile / n;
    for (int64_t b = first, rows; b < last; b += rows) {
      rows = smaller(most, last - b);
      pass_channels({b, 0, 0}, batch_axis, rows, 1);
      double total = 0;
      for (int64_t c = 0; c < n; c += kLine) {
        const int64_t line = smaller(kLine, n - c);
        for (int64_t i = 0; i < line; i += kTile) {
          const int64_t width = smaller(kTile, line - i);
          transform({{b, c + i, 0}, batch_axis, rows, 1, channel_axis, width}, i);
          if (args.sums[0] != nullptr) add_columns(b - first, rows, c + i, width, i);
        }
        if (args.sample_sums != nullptr && rows == 1) total += sum_16(terms_[0], line);
      }
      if (args.sample_sums == nullptr) continue;
      if (rows == 1) {
        args.sample_sums[b] = static_cast<T>(total);
      } else {
        sum_rows(terms_[0], rows, n, args.sample_sums + b);
      }
    }
  }

  // rows of channels: copies the half that passes
  void pass_channels(const Place& at, int row_axis, int64_t rows, int64_t row_step) {
    if (args.along == Along::channels) blocks_.pass(&args.rest_in, args.rest_out, {at, row_axis, rows, row_step, channel_axis, passing()});
  }

  // ---- few sites and channels: several samples in a block

  void small_samples(int64_t first, int64_t last) {
    const int64_t n = args.of_sample, most = kTile / n, sites = n / args.transformed, n_lines = args.lines;
    const bool listed = args.together == Together::lists;
    for (int64_t b = first, rows; b < last; b += rows) {
      rows = smaller(most, last - b);
      if (!listed) blocks_.pass(&args.rest_in, args.rest_out, {{b, 0, 0}, batch_axis, rows, 1, inner_axis, passing() * sites});
      transform({{b, 0, 0}, batch_axis, rows, 1, inner_axis, n, false, 0, listed}, 0);
      if (args.sums[0] == nullptr) continue;
      const int64_t of_line = sites / n_lines, at = b * n_lines * args.transformed;
      for (int i = 0; i < args.n_terms; ++i) {
        if (n_lines == 1 || args.transformed == 1) {
          sum_rows(terms_[i], rows * n_lines * args.transformed, of_line, args.sums[i] + at);
          continue;
        }
        for (int64_t r = 0; r < rows * args.transformed; ++r) {  // lines of each channel to channels of each line
          const int64_t sample = r / args.transformed, c = r - sample * args.transformed;
          for (int64_t l = 0; l < n_lines; ++l) {
            sum_rows(terms_[i] + (r * n_lines + l) * of_line, 1, of_line, args.sums[i] + at + (sample * n_lines + l) * args.transformed + c);
          }
        }
      }
    }
  }

  // ---- channels lie closer together than sites: rows are sites

  void line_of_all_channels(int64_t b, int64_t l) {
    if (args.sums[0] != nullptr) clear_columns();
    if (args.along == Along::checkerboard) {
      const int64_t h = l / args.segments, begin = l % args.segments * 2 * kLine, end = smaller(begin + 2 * kLine, args.inner);
      const int64_t phase = (args.phase + h) & 1, site = h * args.inner + begin;
      rows_of_channels({b, 0, site + phase}, 2, (end - begin - phase + 1) / 2, 0);
      const Block rest{{b, 0, site + 1 - phase}, inner_axis, (end - begin + phase) / 2, 2, channel_axis, args.channels};
      blocks_.pass(&args.in[0], args.out[0], rest);
      for (int i = 1; i < args.n_outputs; ++i) blocks_.pass(nullptr, args.out[i], rest);
    } else {
      const int64_t begin = l * kLine, end = smaller(begin + kLine, args.sites);
      for (int64_t s = begin, rows; s < end; s += rows) {
        rows = args.n_outer == 0 ? end - s : smaller(args.inner - s % args.inner, end - s);
        rows_of_channels({b, 0, s}, 1, rows, s - begin);
      }
    }
    if (args.sums[0] != nullptr) finish_columns(b * args.lines + l);
  }

  void rows_of_channels(Place at, int64_t step, int64_t n_rows, int64_t position) {
    const int64_t n = args.transformed, most = n >= kTile ? 1 : kTile / n;
    for (int64_t r = 0, rows; r < n_rows; r += rows, at.site += rows * step) {
      rows = smaller(most, n_rows - r);
      pass_channels(at, inner_axis, rows, step);
      for (int64_t c = 0; c < n; c += kTile) {
        const int64_t width = smaller(kTile, n - c);
        transform({{at.b, c, at.site}, inner_axis, rows, step, channel_axis, width}, 0);
        if (args.sums[0] != nullptr) add_columns(position + r, rows, c, width, 0);
      }
    }
  }

  // ---- sites lie closer together than channels: rows are channels, or a part of one

  void line_of_channels(int64_t b, int64_t first, int64_t last, int64_t l) {
    const int64_t begin = l * kLine, end = smaller(begin + kLine, args.sites), n = end - begin;
    if (last == args.transformed) pass_sites(b, last, passing(), begin, end);  // odd numbers of channels leave one
    int64_t most = 1;  // channels of a block
    if (args.n_outer == 0 && n <= kTile && n == args.sites) most = kTile / n;
    for (int64_t c = first, rows; c < last; c += rows) {
      rows = smaller(most, last - c);
      if (rows > 1) {
        transform({{b, c, begin}, channel_axis, rows, 1, inner_axis, n}, 0, c < passing());
      } else {
        for_each_run(b, c, begin, end, kTile, [&](const Block& k) { transform(k, k.at.site - begin, c < passing()); });
      }
      if (args.sums[0] == nullptr) continue;
      for (int i = 0; i < args.n_terms; ++i) sum_rows(terms_[i], rows, n, args.sums[i] + (b * args.lines + l) * args.transformed + c);
    }
  }

  void pass_sites(int64_t b, int64_t first, int64_t last, int64_t begin, int64_t end) {
    for (int64_t c = first; c < last; ++c) {
      for_each_run(b, c, begin, end, args.sites, [&](const Block& k) { blocks_.pass(&args.rest_in, args.rest_out, k); });
    }
  }

  // f(block) for the blocks that make up the sites [begin, end) of a channel, in order: at most `most` elements, evenly spaced
  template <class F>
  void for_each_run(int64_t b, int64_t c, int64_t begin, int64_t end, int64_t most, const F& f) {
    for (int64_t s = begin; s < end;) {
      Block k{{b, c, s}, outer_axis, 1, 1, inner_axis, smaller(most, end - s)};
      if (args.n_outer > 0) {
        const int64_t within = s % args.inner, row = s / args.inner % args.outer[0];
        k.n = smaller(k.n, args.inner - within);
        if (within == 0 && k.n == args.inner) {
          k.rows = smaller(args.outer[0] - row, smaller(most / args.inner, (end - s) / args.inner));
        }
      }
      f(k);
      s += k.rows * k.n;
    }
  }

  void checkered_lines(int64_t b, int64_t first, int64_t last) {
    const int64_t n_lines = args.lines, n_segments = args.segments, width = args.inner;
    const int64_t most = width >= kTile ? 1 : 2 * kTile / (width + 1);  // heights of a block
    for (int64_t u = first, rows; u < last; u += rows) {
      const int64_t c = u / n_lines, l = u % n_lines, h = l / n_segments;
      rows = smaller(most, smaller(last - u, n_lines - l));
      const int64_t begin = l % n_segments * 2 * kLine, end = smaller(begin + 2 * kLine, width);
      const int64_t phase = (args.phase + h) & 1;
      for (int64_t w = begin; w < end; w += 2 * kTile) {
        const int64_t n = smaller(2 * kTile, end - w);
        transform({{b, c, h * width + w}, outer_axis, rows, 1, inner_axis, n, true, phase}, (w - begin) / 2);
      }
      if (args.sums[0] == nullptr) continue;
      for (int64_t r = 0, done = 0; r < rows; ++r) {
        const int64_t count = (end - begin - ((phase + r) & 1) + 1) / 2;
        sum_line(b, l + r, c, done, count);
        done += count;
      }
    }
  }

  // ---- sums

  // terms go to position `at` of the buffers
  void transform(const Block& k, int64_t at, bool with_rest = false) {
    T* const terms[] = {terms_[0] + at, terms_[1] + at};
    blocks_.transform(k, terms, with_rest);
  }

  // sums the n terms at position `at`
  void sum_line(int64_t b, int64_t l, int64_t c, int64_t at, int64_t n) {
    for (int i = 0; i < args.n_terms; ++i) args.sums[i][(b * args.lines + l) * args.transformed + c] = sum_16(terms_[i] + at, n);
  }

  void clear_columns() { fill(columns_, args.n_terms * 16 * args.transformed, T(0)); }

  // the order of sum_16 down each column: row number r of a line goes into sum r % 16
  void add_columns(int64_t position, int64_t rows, int64_t c, int64_t n, int64_t at) {
    for (int i = 0; i < args.n_terms; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        T* to = columns_ + (i * 16 + ((position + r) & 15)) * args.transformed + c;
        const T* from = terms_[i] + at + r * n;
        for (int64_t j = 0; j < n; ++j) to[j] += from[j];
      }
    }
  }

  void finish_columns(int64_t part) {
    const int64_t n = args.transformed;
    for (int i = 0; i < args.n_terms; ++i) {
      T* columns = columns_ + i * 16 * n;
      for (int64_t half = 8; half > 0; half /= 2) {
        for (int64_t j = 0; j < half * n; ++j) columns[j] += columns[j + half * n];
      }
      for (int64_t c = 0; c < n; ++c) args.sums[i][part * n + c] = columns[c];
    }
  }

  const Elementwise<E>& args;
  Blocks<E> blocks_;
  T* columns_;
  alignas(64) T terms_[2][kLine + 64];
};

// the units of work [first, last)
template <class E>
FK_CALL void walk(const Elementwise<E>& args, const TileMap<compute_t<E>>& map, compute_t<E>* columns, int64_t first, int64_t last) {
  Walk<E>(args, map, columns).run(first, last);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
