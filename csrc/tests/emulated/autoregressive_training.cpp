#include "tests/emulated/register.h"
//
#include "cuda/autoregressive_training.cu"
