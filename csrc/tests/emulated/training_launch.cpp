#include "tests/emulated/register.h"
//
#include "cuda/training_launch.cu"
