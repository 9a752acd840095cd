// A map of packed elements as a function, so that the walk over a tensor's blocks is compiled once for all maps.
#pragma once

#include <cstdint>

#include "cpu/elementwise.h"

namespace flowkernels {

// What a map works on: rows of n elements, contiguous in each row. Parameters, per_sample and terms are packed, and have room for a
// vector more. Where `rest_from` is not null, as many elements are to be copied from there.
template <class T>
struct Streams {
  int64_t rows, n;
  const T* in[4];
  T* out[3];
  int64_t in_row[4], out_row[3];  // from one row to the next
  const T* per_sample;
  const T* parameters[3];
  T* terms[2];
  const T* rest_from;
  T* rest_to;
  bool far;  // Elementwise::far
};

// The function for one instruction set, and what else it is told.
template <class T>
struct TileMap {
  void (*tile)(const void* told, const Streams<T>& streams);
  const void* told;

  void operator()(const Streams<T>& streams) const { tile(told, streams); }
};

// Runs the map over all blocks, on several threads where that pays. For float, double and Half, in elementwise.cpp.
template <class E>
void run_elementwise(const Elementwise<E>& args, const TileMap<compute_t<E>>& map);

}  // namespace flowkernels
