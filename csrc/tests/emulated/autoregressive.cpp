#include "tests/emulated/register.h"
//
#include "cuda/autoregressive.cu"
