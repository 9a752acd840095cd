// Stages, works, parts and images of the sequential loop in CUDA (autoregressive_schedule.h says what they are): what a loop would work out
// again and again between two barriers is made once, on the device too, and read there.
#pragma once

#include "autoregressive_loop_args.h"

namespace flowkernels {

enum class StageKind : int16_t { end, context, step, push, panel };

struct alignas(16) Stage {
  StageKind kind;
  int16_t layer;  // block of weights: units [j0, j0 + units) of values `layer` over the inputs [k0, k0 + inputs)
  int k0, inputs, j0, units;  // panel: its number, its steps, the first of them, and the units that RegisterPanel has to a lane or 0
  int16_t finish;   // whether the sums are whole after this
  int16_t members;  // stages that share a slot, this and those that follow
  int offset;       // of the image, in chunks
  int16_t at;       // the same within the slot
  int16_t chunks;   // of all members' images
};

// What an image begins with: all that a warp needs to know of a stage, worked out before
struct alignas(16) Head {
  int kind;
  int next;           // where in the slot the image of the next member is; 0 for none
  int units, inputs;  // as in Stage
  int input, own;     // block: the first input and the first unit in the state of a tile; the latter in `outputs` if they are apart
  int phase;          // inputs before the first since a run began
  int shape;          // units to a thread
  int layer, j0;
  int flags;
  int weights;  // where they are in the image, in bytes
};
constexpr int kFinishes = 1, kHasStairs = 2, kIsApart = 4, kHasBfloat16 = 8;  // flags; stairs: not every unit sees all of the inputs

// The weights of a layer that a panel needs, and where they are in its image
struct alignas(16) PanelPart {
  int weights, ld;
  int k0, inputs, j0, units;
  int end;  // where the next layer's begin
  int unused;
};

// The inputs [0, inputs) of this step, counted from the first of them, go into the sums of `targets` units, of which the first `finished`
// are whole then. All integers are whole ones: a warp that takes a work has no time to unpack them.
struct alignas(16) PanelWork {
  int weights, ld;     // where the weight of the first input and the first unit is in the slot, and the stride of an input
  int first, values;   // the first input and the first unit in the state of a tile
  int inputs, targets, finished;
  int activation;      // kThroughHidden: there is more to it than an activation; kFeatures: the layer is the last
  int layer, unit;     // the first unit in its layer
  int staircase;       // 1: not every unit sees all of the inputs
  int unused;
};
constexpr int kThroughHidden = -1, kFeatures = -2;
static_assert(sizeof(Stage) == 32 && sizeof(PanelPart) == 32 && sizeof(PanelWork) == 48 && sizeof(Head) == 48, "8 and 12 integers");

// A panel in registers has, behind its head: a layer each, the steps and one more that is never done, what each unit sees of the panel's
// inputs and in which step it is whole, kPanelUnits a layer.
struct alignas(16) PanelLayer {
  int weights, ld;
  int input, values;  // the first input and the first unit in the state of a tile
  int unit;           // the first in its layer
  int unused[3];
};
struct alignas(16) PanelStep {
  uint32_t counts[kRegisterLayers];  // of each layer: new inputs, and 65,536 times the units that are whole then
  int unit;                          // the first of those units of the last layer
};
struct SeesAndReady {
  int16_t sees, ready;
};
constexpr int kMostPanelWorks = 128;

// Row stride of weights in an image: lanes read aligned groups of units
FK_INLINE int block_ld(int units) { return up_to_multiple(units, 4); }

// Where the weights are in an image, in bytes
FK_INLINE int weights_at(const Stage& stage, int n_layers) {
  int at = sizeof(Head);
  if (stage.kind == StageKind::panel && stage.units > 0)
    at += n_layers * static_cast<int>(sizeof(PanelLayer)) + (stage.inputs + 1) * static_cast<int>(sizeof(PanelStep)) +
          n_layers * kPanelUnits * static_cast<int>(sizeof(SeesAndReady));
  else if (stage.kind == StageKind::panel)
    at += (stage.inputs * n_layers + 1) * static_cast<int>(sizeof(PanelWork));  // and one that is read and never done
  else if (stage.kind == StageKind::push || stage.kind == StageKind::step)
    at += block_ld(stage.units) * 4;  // what each unit sees of the inputs
  return at;
}
FK_INLINE int chunks_of(int64_t bytes) { return static_cast<int>((bytes + 15) / 16); }

}  // namespace flowkernels
